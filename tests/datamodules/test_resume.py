"""After resuming, a real Trainer receives exactly the batches that an uninterrupted run receives."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from datamodules.digits import Digits
from datamodules.images import ArrayImages

EPOCHS, STEPS = 3, 3


class FewDigits(Digits):
    def load(self, split):
        images = super().load(split)
        return ArrayImages(images.images[:50], images.labels[:50], split)


class Recorder(pl.LightningModule):
    """Linear net on the mean pixel that keeps a fingerprint of every batch.

    It saves a checkpoint in `folder` after every batch and at the end of every epoch.
    """

    def __init__(self, folder=None):
        super().__init__()
        self.net = nn.Linear(3, 10)
        self.folder = folder
        self.fingerprints = []

    def training_step(self, batch, batch_idx):
        digest = (batch["image"].double().sum().item(), batch["index"].tolist(), batch["seed"])
        self.fingerprints.append((self.current_epoch, batch_idx, digest))
        return nn.functional.cross_entropy(self.net(batch["image"].mean((2, 3))), batch["label"])

    def validation_step(self, batch, batch_idx):
        pass

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.folder:
            self.trainer.save_checkpoint(self.folder / f"{self.current_epoch}-{batch_idx}.ckpt")

    def on_train_epoch_end(self):
        if self.folder:
            self.trainer.save_checkpoint(self.folder / f"{self.current_epoch}-end.ckpt")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(workers, folder=None, ckpt_path=None):
    augment = {"scale": [0.6, 1.0], "color_jitter": 0.3, "erasing": 0.5, "auto_augment": "rand-m9-mstd0.5-inc1"}
    data = FewDigits(image_size=16, batch_size=16, augment=augment, num_workers=workers, seed=3)
    module = Recorder(folder)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module.fingerprints


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Return the folder of checkpoints and the fingerprints of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    fingerprints = fit(2, folder)
    assert [fingerprint[:2] for fingerprint in fingerprints] == [(e, i) for e in range(EPOCHS) for i in range(STEPS)]
    # All batches differ.
    assert len({str(fingerprint) for fingerprint in fingerprints}) == EPOCHS * STEPS
    return folder, fingerprints


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name, batches", [("0-0", 1), ("0-2", 3), ("0-end", 3), ("1-1", 5), ("1-2", 6), ("1-end", 6)])
def test_a_resumed_run_gets_the_remaining_batches(whole_run, name, batches, workers):
    folder, fingerprints = whole_run
    assert fit(workers, ckpt_path=folder / f"{name}.ckpt") == fingerprints[batches:]
