"""No command loses or overwrites a run: rerun=true, evaluations, foreign folders, and folders after an error."""

import errno
import json
import shutil

import pytest

from ops import backend
from retinue.runs.config import evaluation_folder
from retinue.runs.folders import is_run
from retinue.runs.replacement import MADE_BY_A_RUN, MOVING, REPLACED, recover, set_aside
from retinue.runs.result_file import read_result
from tests.retinue.runs.cli import SMALL, SWIN, CommandLine, result

QUICK = ("recipe.epochs=1", "trainer.limit_train_batches=2")
EVAL = ("trainer.accelerator=cpu", "data.num_workers=0")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Train a run with an evaluation, and return its folder; tests work on a copy."""
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def run(cli, finished):
    """Return the folder of a finished run with an evaluation, a copy that the test may change."""
    kept = finished / "run"
    if not kept.exists():
        assert cli.train(*QUICK, "hydra.run.dir=run").code == 0
        assert cli("eval", "run=run", *EVAL).code == 0
        shutil.copytree("run", kept)
        shutil.rmtree("run")
    shutil.copytree(kept, "run")
    return cli.folder / "run"


def content(folder):
    """Return the bytes of all files below a folder by their paths, without logs."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".log"
    }


DIVERGES = ("recipe.optimizer.lr=1e30", "recipe.schedule.warmup_epochs=0", "recipe.clip_grad=null")


@pytest.mark.parametrize("arguments", [("recipe.loss=mse",), ("weights=nowhere.pth",), DIVERGES])
def test_a_rerun_that_fails_before_its_first_checkpoint_leaves_the_old_run(cli, run, arguments):
    before = content(run)
    outcome = cli.train(*QUICK, "hydra.run.dir=run", "rerun=true", *arguments)
    assert outcome.error
    assert content(run) == before
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_a_rerun_with_kernels_that_cannot_run_leaves_the_old_run(cli, run, monkeypatch):
    monkeypatch.setitem(backend._state, "backend", "auto")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    before = content(run)
    assert "cannot run as a kernel" in cli.train(*QUICK, "hydra.run.dir=run", "rerun=true", "ops.backend=triton").error
    assert content(run) == before


def test_a_rerun_replaces_the_run_and_its_evaluations(cli, run):
    assert list(run.glob("evaluation/*/result.json"))
    assert cli.train(*QUICK, "hydra.run.dir=run", "rerun=true", "recipe.optimizer.lr=0.0001").code == 0
    assert not (run / "evaluation").exists() and not (run / REPLACED).exists()
    assert read_result(run)


def test_a_rerun_that_was_killed_before_its_first_checkpoint_brings_the_old_run_back(cli, run):
    before = content(run)
    set_aside(run)
    (run / "config.yaml").write_text("half")
    (run / "metrics.csv").write_text("step\n1\n")
    again = cli.train(*QUICK, "hydra.run.dir=run")
    assert again.code == 0 and "epoch" not in again.err
    assert content(run) == before


def test_a_kill_at_any_step_of_a_replacement_loses_no_run(tmp_path, monkeypatch):
    """Fail at each file operation in turn, as a kill would, and check that `recover` brings the old run back."""
    from retinue.runs import replacement

    names = [name for name in MADE_BY_A_RUN if name not in ("tensorboard", "wandb")]

    def old_run(folder):
        for name in names:
            path = folder / name if "." in name else folder / name / "file"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"old {name}")

    class Killed(BaseException):
        pass

    def kill_after(count):
        """Let the `count`-th and all later moves fail."""
        left = [count]

        def move(source, target):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            shutil.move(source, target)

        monkeypatch.setattr(replacement.os, "replace", move)

    old_run(tmp_path / "expected")
    expected = content(tmp_path / "expected")
    for kill in range(len(names) + 1):
        folder = tmp_path / f"aside-{kill}"
        old_run(folder)
        kill_after(kill)
        with pytest.raises(Killed):
            set_aside(folder)
        monkeypatch.undo()
        recover(folder)
        assert content(folder) == expected
    for kill in range(len(names) + 1):
        folder = tmp_path / f"back-{kill}"
        old_run(folder)
        set_aside(folder)
        (folder / "config.yaml").write_text("new")
        kill_after(kill)
        with pytest.raises(Killed):
            recover(folder)
        monkeypatch.undo()
        recover(folder)
        assert content(folder) == expected and not (folder / MOVING).exists()
    folder = tmp_path / "done"
    old_run(folder)
    set_aside(folder)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/last.ckpt").write_text("new")
    recover(folder)
    assert content(folder) == {"checkpoints/last.ckpt": b"new"}


def test_an_evaluation_never_replaces_a_run(cli, run):
    before = content(run)
    error = cli("eval", "run=run", "hydra.run.dir=run", *EVAL).error
    assert "run holds a run, whose files could be replaced: choose another folder" in error
    error = cli("eval", "run=run", "hydra.run.dir=run/checkpoints/x", *EVAL).error
    assert "lies inside the run" in error
    assert content(run) == before


def test_a_result_comes_before_the_pictures(cli, run, monkeypatch):
    shutil.rmtree(run)

    def fail(path, *arguments):
        raise ValueError("no picture")

    monkeypatch.setattr("retinue.runs.training.plot_curves", fail)
    outcome = cli.train(*QUICK, "hydra.run.dir=run")
    assert outcome.code == 0 and "curves.png cannot be drawn from metrics.csv: no picture" in outcome.err
    assert read_result(run)

    def fill_the_disk(path, *arguments):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("retinue.tasks.classification.plot_confusion", fill_the_disk)
    assert (
        "evaluated/confusion.png: No space left on device; make room"
        in cli("eval", "run=run", *EVAL, "hydra.run.dir=evaluated").error
    )
    assert result(cli.folder / "evaluated")["metrics"]


def test_a_folder_of_something_else_is_refused(cli, run):
    [evaluated] = run.glob("evaluation/*")
    shutil.copytree(evaluated, "evaluated")
    for rerun in ("rerun=false", "rerun=true"):
        error = cli.train(*QUICK, "hydra.run.dir=evaluated", rerun).error
        assert "evaluated holds an evaluation: choose another hydra.run.dir" in error

    (run / "config.yaml").unlink()
    # Its own result is accepted without the config.
    assert cli.train(*QUICK, "hydra.run.dir=run").code == 0
    assert "a result.json without its config.yaml" in cli.train("recipe.epochs=3", "hydra.run.dir=run").error
    (run / "result.json").unlink()
    before = content(run)
    assert "run holds checkpoints without their config.yaml" in cli.train(*QUICK, "hydra.run.dir=run").error
    assert content(run) == before


def test_a_run_inside_a_run_is_refused(cli, run):
    before = content(run)
    for inside in ("run/again", "run/evaluation/a/b", "run/checkpoints"):
        error = cli.train(*QUICK, f"hydra.run.dir={inside}").error
        assert f"{inside} lies inside the run {run}" in error
    assert content(run) == before
    # The config.yaml of another project is no run.
    (cli.folder / "config.yaml").write_text("a: 1\n")
    assert not is_run(cli.folder)


def test_an_error_leaves_no_folder_that_it_made(cli, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "kept").mkdir()
    for program, extra in (("train", (*SWIN, *SMALL, "recipe.loss=mse")), ("eval", ("model=swin",))):
        assert cli(program, f"hydra.run.dir={outside}/kept/made/deep", *extra).error
    assert [path.name for path in outside.rglob("*")] == ["kept"]
    assert cli("train", "-m", *SWIN, *SMALL, f"hydra.sweep.dir={outside}/kept/sweep", "recipe.loss=mse").code == 2
    assert list(cli.folder.iterdir()) == []


def test_spellings_of_a_run_are_one_evaluation(cli: CommandLine, run):
    from hydra import compose, initialize_config_dir

    from retinue.runs.config import register_resolvers
    from retinue.utils.paths import CONF

    register_resolvers()
    (cli.folder / "a").mkdir()
    folders = set()
    for spelling in ("run", "run/", "./run", "a/../run", str(run)):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            folders.add(evaluation_folder(compose("eval", [f"run={spelling}"])))
    assert len(folders) == 1 and folders.pop().startswith("run/evaluation/")


def test_the_content_of_a_weights_file_is_part_of_the_identity(cli, run):
    shutil.copy(run / "checkpoints/best.ckpt", "start.ckpt")
    tuned = (*QUICK, "hydra.run.dir=tuned", "weights=start.ckpt")
    assert cli.train(*tuned).code == 0
    before = json.loads((cli.folder / "tuned/result.json").read_text())["config_sha256"]
    # The same content under another name is the same run.
    shutil.copy("start.ckpt", "copy.ckpt")
    again = cli.train(*tuned[:-1], "weights=./copy.ckpt")
    assert again.code == 0 and "epoch" not in again.err
    assert cli.train(*QUICK, "hydra.run.dir=other", "seed=1").code == 0
    shutil.copy("other/checkpoints/best.ckpt", "start.ckpt")
    assert "holds a run with weights=" in cli.train(*tuned).error
    assert cli.train(*tuned, "rerun=true").code == 0
    assert json.loads((cli.folder / "tuned/result.json").read_text())["config_sha256"] != before
