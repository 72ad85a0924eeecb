from pathlib import Path

import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from retinue.results.search import Search, read_space
from retinue.runs.config import register_resolvers
from retinue.utils.paths import CONF

# Overrides for trials that take seconds.
QUICK = (
    "model=swin", "model.size=nano", "+model.args.depths=[1,1,1,1]", "data.image_size=16", "recipe.epochs=3",
    "recipe.batch_size=32", "recipe.schedule.warmup_epochs=0", "trainer.limit_train_batches=3",
    "trainer.accelerator=cpu", "logger=none", "data.num_workers=0",
)  # fmt: skip


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    register_resolvers()


def space_file(**space):
    """Write a search space to space.yaml, and return its path."""
    Path("space.yaml").write_text(yaml.safe_dump(space))
    return "space.yaml"


def test_pruning_waits_for_the_warm_up_in_steps_or_epochs():
    for task, recipe, steps in (("detection", "coco_1x", 500), ("classification", "small_data", 0)):
        lr = {"recipe.optimizer.lr": FloatDistribution(1e-5, 2e-5)}
        pruning = (
            Search(Path(task).absolute(), lr, [f"task={task}", f"recipe={recipe}"], 0).config(0, {}).callbacks.pruning
        )
        assert (pruning.warmup_steps, pruning.warmup) == (steps, 0 if steps else 2)


def test_the_trials_are_one_group_in_wandb():
    def group(*overrides):
        space = {"seed": IntDistribution(0, 9)}
        return Search(Path("a").absolute(), space, ["logger=wandb", *overrides], 0).config(0, {}).logger.wandb.group

    assert group() == "search/a"
    Path("a").rename("b")
    assert group("logger.wandb.group=mine") == "mine"


def test_a_trial_that_another_process_runs_is_left_to_it():
    space = {"recipe.optimizer.lr": FloatDistribution(1e-4, 1e-3)}
    first, second = (Search(Path("search").absolute(), space, QUICK, 0) for _ in range(2))
    number = first.study.ask({**space}).number
    with first._claim(number) as is_claimed:
        assert is_claimed
        # The only trial is claimed, so the second process has nothing to do.
        second.run(1)
        assert second.study.trials[number].state == TrialState.RUNNING
    with second._claim(number) as is_claimed:
        assert is_claimed


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"low": 1, "high": 5}, IntDistribution(1, 5)),
        ({"low": 0.1, "high": 1, "log": True}, FloatDistribution(0.1, 1.0, log=True)),
        (["adamw", "lamb", None], CategoricalDistribution(["adamw", "lamb", None])),
        ([["agent", "window"], "window"], CategoricalDistribution(["[agent,window]", "window"])),
    ],
)
def test_a_space_has_ranges_and_choices(values, expected):
    assert read_space(space_file(**{"a.b": values})) == {"a.b": expected}


@pytest.mark.parametrize(
    "values", [{"low": 1}, {"low": 0.1, "high": 1, "lg": True}, {"low": 2, "high": 1}, [], "adamw"]
)
def test_other_entries_of_a_space_are_refused(values):
    with pytest.raises(ValueError, match=r"^space\.yaml: a\.b"):
        read_space(space_file(**{"a.b": values}))


@pytest.mark.parametrize("path", sorted((CONF / "search").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_keys_of_every_space_are_keys_of_train_py(path, tmp_path):
    Search(tmp_path, read_space(path.stem), QUICK, 0)
    with pytest.raises(Exception, match="no_such_key"):
        Search(tmp_path, read_space(space_file(**{"recipe.no_such_key": [1]})), QUICK, 0)


@pytest.mark.parametrize("damage", [b"\x00\xff\n", b"{}\n", b"[1]\n"])
def test_a_damaged_journal_is_one_line(damage):
    lr, folder = {"recipe.optimizer.lr": FloatDistribution(1e-5, 2e-5)}, Path("search").absolute()
    Search(folder, lr, [], 0)
    journal = folder / "journal.log"
    journal.write_bytes(damage + journal.read_bytes())
    with pytest.raises(ValueError, match=r"journal\.log cannot be read: .*remove its damaged lines"):
        Search(folder, lr, [], 0)
