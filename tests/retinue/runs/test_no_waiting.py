"""A training step never waits for the device: the CPU reads nothing that the device computes.

Tensors on the meta device have no values, so that reading one is an error, as is moving one to the CPU or asking how
many entries are not zero. A run on this device therefore finds every place that would wait for a GPU. Sending a number
to a GPU waits, too, so the tests allow it in the first step only.
"""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import SingleDeviceStrategy

from retinue.runs.checkpoints import Checkpoints
from retinue.runs.config import register_resolvers
from retinue.runs.ema import EMA
from retinue.runs.progress import TrainingLog
from retinue.runs.training import build_data, build_task, build_trainer
from retinue.utils.paths import CONF

STEPS = 3


class Stop(Exception):
    """End of a run before anything is read for the log."""


class StopAfterSteps(Callback):
    """Stop when `STEPS` steps have been taken."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == STEPS:
            raise Stop


class StopBeforeTheEnd(Callback):
    """Stop when all batches have been validated, before the figures are read."""

    def on_validation_epoch_end(self, trainer, pl_module):
        raise Stop


class SendNothing(Callback):
    """Make it an error to send numbers from Python to the device from the second step on."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.monkeypatch.setattr(torch, "tensor", tensor_on_cpu)


def tensor_on_cpu(values, device="cpu", *, tensor=torch.tensor, **arguments):
    """Return `torch.tensor(values, ...)`, which must not be on the meta device."""
    assert torch.device(device).type == "cpu", "this value is sent to the device in every step"
    return tensor(values, device=device, **arguments)


class MetaAccelerator(CPUAccelerator):
    """The accelerator of the CPU for the meta device."""

    def setup_device(self, device):
        pass


class MetaStrategy(SingleDeviceStrategy):
    """One meta device, whose net cannot be moved to the CPU when the training ends."""

    def __init__(self):
        super().__init__(torch.device("meta"), accelerator=MetaAccelerator())

    def teardown(self):
        pass


@pytest.fixture(autouse=True)
def loaders_have_lengths(monkeypatch):
    """Skip Lightning's question for the lengths of the loaders, which it asks before the first step."""
    for loop in ("fit_loop", "evaluation_loop"):
        monkeypatch.setattr(f"pytorch_lightning.loops.{loop}.has_len_all_ranks", lambda *arguments: True)


def prepare(folder, overrides, callbacks, **arguments):
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["data.num_workers=0", "recipe.batch_size=32", f"run_dir={folder}", *overrides])
    datamodule = build_data(cfg)
    task = build_task(cfg, datamodule)
    ema = [EMA(cfg.recipe.ema.decay, cfg.recipe.ema.warmup)] if cfg.recipe.ema.decay is not None else []
    callbacks = [*ema, TrainingLog(), Checkpoints(folder, "val/top1", every_minutes=10), *callbacks]
    return task, datamodule, build_trainer(cfg, callbacks=callbacks, logger=False, **arguments)


def meta_trainer(folder, overrides, callbacks):
    return prepare(folder, ["trainer=cpu", *overrides], callbacks, strategy=MetaStrategy(), accelerator="auto")


RECIPES = [
    ["model=timm", "model.name=resnet10t"],
    ["recipe.clip_grad=1.0", "trainer.accumulate_grad_batches=2"],
    ["model=timm", "model.name=resnet10t", "recipe=deit", "recipe.augment.device=gpu", "recipe.epochs=5"],
]


@pytest.fixture
def teacher(tmp_path):
    """Return overrides for a recipe with a teacher, whose weights lie in a file."""
    torch.save(timm.create_model("resnet10t", num_classes=10).state_dict(), tmp_path / "teacher.pth")
    return ["task.distillation.teacher=resnet10t", f"task.distillation.weights={tmp_path / 'teacher.pth'}"]


@pytest.mark.parametrize("overrides", RECIPES, ids=["small", "biformer", "deit"])
def test_a_step_reads_nothing_from_the_device(tmp_path, monkeypatch, teacher, overrides):
    overrides = [*overrides, *teacher] if overrides is RECIPES[-1] else overrides
    task, datamodule, trainer = meta_trainer(tmp_path, overrides, [SendNothing(monkeypatch), StopAfterSteps()])
    with pytest.raises(Stop):
        trainer.fit(task, datamodule=datamodule)
    assert trainer.global_step == STEPS
    assert next(task.parameters()).is_meta


def test_a_validation_step_reads_nothing_from_the_device(tmp_path):
    task, datamodule, trainer = meta_trainer(tmp_path, RECIPES[0], [StopBeforeTheEnd()])
    with pytest.raises(Stop):
        trainer.validate(task, datamodule=datamodule)
    assert task._val_sums is not None
    assert task._val_sums.is_meta


def test_reading_a_figure_would_be_noticed(tmp_path):
    class Reader(Callback):
        def on_train_batch_end(self, trainer, pl_module: Any, outputs, batch, batch_idx):
            pl_module.running_figures()

    task, datamodule, trainer = meta_trainer(tmp_path, RECIPES[0], [Reader(), StopAfterSteps()])
    with pytest.raises((RuntimeError, NotImplementedError), match=r"meta"):
        trainer.fit(task, datamodule=datamodule)


@pytest.mark.parametrize("last", [False, True])
def test_throughput_includes_the_steps_that_the_gpu_has_not_finished(last):
    trainer: Any = SimpleNamespace(
        is_last_batch=last,
        strategy=SimpleNamespace(root_device=torch.device("cuda")),
        world_size=1,
        fit_loop=SimpleNamespace(_should_accumulate=lambda: True),
    )
    training_log: Any = TrainingLog()
    with mock.patch("torch.cuda.synchronize") as wait:
        training_log.on_train_batch_end(trainer, None, None, {"index": [0, 0]}, 0)
    assert wait.call_count == last and training_log.images == 2


class Strict(Callback):
    """Make every wait for the GPU an error, from the second step on."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("default" if trainer.global_step == STEPS else "error")
        if trainer.global_step == STEPS:
            raise Stop


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("overrides", RECIPES, ids=["small", "biformer", "deit"])
def test_a_step_on_a_gpu_waits_for_nothing(tmp_path, teacher, overrides):
    overrides = [*overrides, *teacher] if overrides is RECIPES[-1] else overrides
    task, datamodule, trainer = prepare(tmp_path, ["trainer=gpu", *overrides], [Strict()])
    try:
        with pytest.raises(Stop):
            trainer.fit(task, datamodule=datamodule)
    finally:
        torch.cuda.set_sync_debug_mode("default")
