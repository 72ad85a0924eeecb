"""What a real Trainer sees after resuming: exactly the batches that an unbroken run would have seen."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from datamodules.digits import Digits
from datamodules.images import ArrayImages

STEPS = 3  # batches an epoch


class FewDigits(Digits):
    def load(self, split):
        images = super().load(split)
        return ArrayImages(images.images[:50], images.labels[:50], split)


class Recorder(pl.LightningModule):
    """Trains a linear net on the mean pixel and keeps a fingerprint of every batch."""

    def __init__(self, path, save_at=None, save_at_epoch_end=None):
        super().__init__()
        self.net = nn.Linear(3, 10)
        self.path, self.save_at, self.save_at_epoch_end = path, save_at, save_at_epoch_end
        self.seen = []

    def training_step(self, batch, batch_idx):
        digest = (batch["image"].double().sum().item(), batch["index"].tolist(), batch["seed"])
        self.seen.append((self.current_epoch, batch_idx, digest))
        return nn.functional.cross_entropy(self.net(batch["image"].mean((2, 3))), batch["label"])

    def validation_step(self, batch, batch_idx):
        pass

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if (self.current_epoch, batch_idx) == self.save_at:
            self.trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self):
        if self.current_epoch == self.save_at_epoch_end:
            self.trainer.save_checkpoint(self.path)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(tmp_path, workers, ckpt_path=None, **recorder):
    augment = {"scale": [0.6, 1.0], "color_jitter": 0.3, "erasing": 0.5, "auto_augment": "rand-m9-mstd0.5-inc1"}
    data = FewDigits(image_size=16, batch_size=16, augment=augment, num_workers=workers, seed=3)
    module = Recorder(tmp_path / "saved.ckpt", **recorder)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    module = fit(tmp_path_factory.mktemp("whole"), workers=0)
    assert [place[:2] for place in module.seen] == [(epoch, i) for epoch in range(3) for i in range(STEPS)]
    assert len({str(place) for place in module.seen}) == 3 * STEPS  # every batch is another
    return module.seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("epoch, batch", [(0, 0), (0, 2), (1, 1), (1, STEPS - 1), (0, STEPS - 1)])
def test_within_an_epoch(whole, tmp_path, workers, epoch, batch):
    first = fit(tmp_path, workers, save_at=(epoch, batch))
    assert first.seen == whole
    resumed = fit(tmp_path, workers, ckpt_path=tmp_path / "saved.ckpt")
    assert resumed.seen == whole[epoch * STEPS + batch + 1 :]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("epoch", [0, 1])
def test_at_the_end_of_an_epoch(whole, tmp_path, workers, epoch):
    fit(tmp_path, 0, save_at_epoch_end=epoch)
    resumed = fit(tmp_path, workers, ckpt_path=tmp_path / "saved.ckpt")
    assert resumed.seen == whole[(epoch + 1) * STEPS :]
