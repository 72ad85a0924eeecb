import signal
from pathlib import Path

import pytest
import yaml
from optuna.distributions import FloatDistribution
from optuna.trial import create_trial

from retinue.results.search import Search, read_space
from retinue.runs.config import register_resolvers
from scripts import search
from tests.retinue.results.test_search import QUICK, space_file
from tests.retinue.runs.cli import result, rows, start, stop_when


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    register_resolvers()


def trials(name):
    """Return the rows of a search's trials.csv by the names of the trials."""
    return {row["what"]: row for row in rows(f"outputs/search/{name}/trials.csv")}


def test_trials_are_runs_and_the_same_command_adds_trials(capsys):
    search.main(["space=lr_wd", "trials=2", *QUICK])
    first, folder = trials("lr_wd"), Path("outputs/search/lr_wd")
    assert len(first) == 2
    for name, row in first.items():
        assert 1e-4 <= float(row["recipe.optimizer.lr"]) <= 1e-2 and row["state"] == "complete"
        config = yaml.safe_load((folder / name / "config.yaml").read_text())
        assert config["recipe"]["optimizer"]["weight_decay"] == float(row["recipe.optimizer.weight_decay"])
        validations = [float(r["val/top1"]) for r in rows(folder / name / "metrics.csv") if r["val/top1"]]
        assert float(row["val"]) == max(validations) and len(validations) == 3
    out = capsys.readouterr().out
    best = max(first.values(), key=lambda row: float(row["val"]))
    assert f"recipe.optimizer.lr={best['recipe.optimizer.lr']}" in out.split("best: python train.py ")[1]

    results = {name: (folder / name / "result.json").stat().st_mtime_ns for name in first}
    search.main(["space=lr_wd", "trials=3", *QUICK])
    again = trials("lr_wd")
    assert len(again) == 3 and {name: again[name] for name in first} == first
    assert {name: (folder / name / "result.json").stat().st_mtime_ns for name in first} == results
    assert len({row["recipe.optimizer.lr"] for row in again.values()}) == 3


@pytest.mark.parametrize(("steps", "state", "epochs"), [(0, "pruned", "2"), (100, "complete", "3")])
def test_a_trial_below_the_median_is_ended_early(steps, state, epochs):
    space = {"recipe.optimizer.lr": FloatDistribution(1e-5, 2e-5)}
    name = space_file(**{"recipe.optimizer.lr": {"low": 1e-5, "high": 2e-5}})
    quick = (*QUICK, f"+recipe.schedule.warmup_steps={steps}") if steps else QUICK
    study = Search(Path("outputs/search/space").absolute(), space, quick, 0).study
    for _ in range(5):
        study.add_trial(
            create_trial(
                value=1.0,
                params={"recipe.optimizer.lr": 1e-5},
                distributions=space,  # pyright: ignore[reportArgumentType]
                intermediate_values={1: 0.0, 2: 1.0, 3: 1.0},
            )
        )
    search.main([f"space={name}", "trials=6", *quick])
    row = trials("space")["trial-5"]
    assert (row["state"], row["epochs"]) == (state, epochs)
    assert result(Path("outputs/search/space/trial-5"))["epochs"] == int(epochs)


def test_a_killed_search_resumes_its_last_trial(tmp_path):
    command = ("scripts/search", "space=lr_wd", "trials=1", *QUICK, "checkpoint.every_steps=1", "recipe.epochs=4")
    killed = start(*command, folder=tmp_path)
    stop_when(killed, tmp_path / "outputs/search/lr_wd/trial-0/checkpoints/last.ckpt", signal.SIGKILL)
    config = Path("outputs/search/lr_wd/trial-0/config.yaml").read_text()
    again = start(*command, folder=tmp_path)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert "going on from" in err and "trial 0: " in out
    assert Path("outputs/search/lr_wd/trial-0/config.yaml").read_text() == config
    assert {name: (row["state"], row["epochs"]) for name, row in trials("lr_wd").items()} == {
        "trial-0": ("complete", "4")
    }


def test_a_failed_trial_does_not_stop_the_others(capsys):
    name = space_file(**{"model.mixers": ["windw", "window"]})
    search.main([f"space={name}", "trials=6", *QUICK[:4], "recipe.epochs=1", *QUICK[5:]])
    finished = list(trials("space").values())
    assert {row["state"] for row in finished} == {"complete", "fail"}
    assert all(("windw" in row["failed"]) == (row["state"] == "fail") for row in finished)


def test_a_search_in_which_everything_fails_ends(tmp_path):
    with pytest.raises(
        ValueError, match=r"the first 3 trials failed, the last one with .*augment\.auto_augment=.rnd-m9"
    ):
        search.main(["space=lr_wd", "trials=9", *QUICK, "recipe.augment.auto_augment=rnd-m9"])
    assert [row["state"] for row in trials("lr_wd").values()] == ["fail"] * 3


def test_unknown_spaces_keys_and_other_searches_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"no search space 'lr_w'\. Did you mean 'lr_wd'"):
        search.main(["space=lr_w", *QUICK])
    with pytest.raises(Exception, match="no_such_key"):
        search.main(["space=lr_wd", *QUICK, "no_such_key=1"])
    assert not list(tmp_path.iterdir())
    Search(tmp_path / "outputs/search/lr_wd", read_space("lr_wd"), QUICK, 0)
    with pytest.raises(ValueError, match="holds a search with other overrides"):
        search.main(["space=lr_wd", *QUICK, "seed=1"])
