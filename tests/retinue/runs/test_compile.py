"""Runs with `task.compile`: their folder, their result and how they go on; the choices that are refused."""

import shutil
from unittest import mock

import torch

from retinue.runs.checkpoints import PREVIOUS
from retinue.tasks import compilation
from tests.retinue.runs.cli import result

# Compiled drop paths draw other numbers.
RUN = (
    "+model.args.drop_path_rate=0.0", "recipe.ema.decay=0.9", "trainer.accumulate_grad_batches=2",
    "trainer.limit_train_batches=4", "task.grad_checkpointing=true",
)  # fmt: skip


def test_compiled_runs_have_the_folder_and_the_result_of_an_uncompiled_run(cli, monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    # Otherwise swin_nano is compiled as a whole.
    monkeypatch.setattr(compilation, "MIN_BLOCKS_PER_KIND", 1)
    assert cli.train(*RUN).code == 0
    [folder] = cli.folder.glob("outputs/*/*/*/*")
    expected = result(folder)["metrics"]
    names = list(torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"])

    torch.compiler.reset()
    outcome = cli.train(*RUN, "task.compile=true", "rerun=true")
    assert outcome.code == 0, outcome.err
    assert result(folder)["metrics"] == expected
    assert list(torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]) == names

    # The run goes on from the end of its first epoch.
    (folder / "result.json").unlink()
    shutil.move(folder / "checkpoints" / PREVIOUS, folder / "checkpoints/last.ckpt")
    outcome = cli.train(*RUN, "task.compile=true")
    assert outcome.code == 0 and "going on from" in outcome.err, outcome.err
    assert result(folder)["metrics"] == expected

    with mock.patch("torch.compiler.cudagraph_mark_step_begin") as begin:
        outcome = cli.train(*RUN, "task.compile=reduce-overhead", "rerun=true")
    assert outcome.code == 0, outcome.err
    assert result(folder)["metrics"] == expected
    assert begin.call_count > 2 * 4


def test_auto_compiles_nothing_on_the_cpu(cli, monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "no such compiler")
    outcome = cli.train("task.compile=auto", "recipe.epochs=1")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("task.compile=auto: the net is not compiled, since there is no GPU") == 1


def test_cuda_graphs_are_refused_where_they_cannot_run(cli):
    error = cli("train", "task.compile=reduce-overhead", "trainer.devices=2", "trainer.accelerator=cpu").error
    assert "task.compile=reduce-overhead is for one device: task.compile=true compiles for several" in error
    error = cli("train", "task=segmentation", "task.compile=reduce-overhead").error
    assert "task.compile must be true or false or auto, not 'reduce-overhead'" in error
