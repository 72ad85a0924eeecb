"""Checkpoints are written whole or not at all, and the newest readable one is resumed."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from retinue.runs.checkpoints import AtomicCheckpointIO, Checkpoints, find_resume


@pytest.fixture
def full_disk(monkeypatch):
    """Let every write of more than 10 kB fail as on a full disk."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, full_disk):
    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"step": torch.tensor(1)}, path)
    with pytest.raises(ValueError, match=r"could not save .*last\.ckpt: .*the checkpoint before it is kept"):
        io.save_checkpoint({"weights": torch.zeros(100_000)}, path)
    assert torch.load(path, weights_only=True) == {"step": torch.tensor(1)}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_resume_skips_checkpoints_that_cannot_be_read(tmp_path, caplog):
    assert find_resume(tmp_path) == (None, 0)
    for step, name in enumerate(("best", "previous", "last")):
        torch.save({"global_step": step, "weights": torch.rand(1000)}, tmp_path / f"{name}.ckpt")
    assert find_resume(tmp_path) == (tmp_path / "last.ckpt", 2)

    last = tmp_path / "last.ckpt"
    last.write_bytes(last.read_bytes()[:2000])
    with caplog.at_level(logging.WARNING):
        assert find_resume(tmp_path) == (tmp_path / "previous.ckpt", 1)
    assert "last.ckpt cannot be read" in caplog.text

    for name in ("previous", "best"):
        (tmp_path / f"{name}.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the checkpoints in .* can be read; rerun=true starts anew"):
        find_resume(tmp_path)


def test_a_checkpoint_that_would_execute_code_is_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="none of the checkpoints"):
        find_resume(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_an_epoch_without_a_validation_is_saved_and_is_never_the_best(tmp_path, monkeypatch):
    callback, saved, trainer = Checkpoints(tmp_path, "val/top1"), [], SimpleNamespace(world_size=1)
    monkeypatch.setattr(callback, "save", lambda trainer, is_best: saved.append(is_best))
    for top1 in (None, 0.5, None, 0.4, 0.6):
        task: Any = SimpleNamespace(val_figures={} if top1 is None else {"val/top1": top1})
        callback.on_train_epoch_end(trainer, task)  # pyright: ignore[reportArgumentType]
    assert saved == [False, True, False, False, True] and callback.best == 0.6
