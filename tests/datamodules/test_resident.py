"""Data sets on the device give, to the bit, the batches that the CPU makes of the same images."""

import pytest
import torch

from datamodules import resident
from datamodules.digits import Digits
from datamodules.loader import BatchFetcher
from datamodules.resident import Labels
from tests.datamodules.test_resume import FewDigits

SQUARES = {"pad_crop": 4, "hflip": 0.5, "vflip": 0.3}
OPS = SQUARES | {"auto_augment": "rand-m9-mstd0.5-inc1", "device": "gpu", "interpolation": "random"}


def batches(data):
    made = []
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        made += [data.on_after_batch_transfer(batch, 0) for batch in loader]
    return made


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"augment": SQUARES},
        {"augment": OPS},
        {"augment": SQUARES | {"mixup": 0.8, "erasing": 0.5, "repeats": 2}, "image_size": (40, 48)},
        {"augment": SQUARES, "in_chans": 1, "mean": (0.5,), "std": (0.5,), "image_size": 24},
    ],
)
def test_batches_equal_those_of_the_cpu(monkeypatch, options, workers):
    options = {"image_size": 32, "batch_size": 16, "num_workers": workers, "seed": 3} | options
    expected = batches(FewDigits(**options))
    monkeypatch.setattr(Digits, "_gpu", torch.device("cpu"))
    data = FewDigits(**options)
    fetch, residents = data._source("train")
    assert residents is not None
    assert isinstance(fetch.dataset, Labels)
    for ours, theirs in zip(batches(data), expected, strict=True):
        assert ours.keys() == theirs.keys()
        keys = ours.keys() - {"mix"}
        assert all(torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key])) for key in keys)


@pytest.mark.parametrize(
    "options", [{"augment": SQUARES | {"scale": (0.5, 1.0)}}, {"augment": OPS | {"device": None}}, {"image_size": 2000}]
)
def test_images_that_do_not_fit_are_loaded_as_before(monkeypatch, options):
    monkeypatch.setattr(Digits, "_gpu", torch.device("cpu"))
    monkeypatch.setattr(resident, "MAX_BYTES", 10**8)
    data = FewDigits(**({"image_size": 32, "batch_size": 16} | options))
    fetch, residents = data._source("train")
    assert residents is None
    assert isinstance(fetch, BatchFetcher)
    assert "image" in fetch.dataset[0]


def test_without_a_gpu_nothing_is_kept():
    assert FewDigits(batch_size=16)._source("train")[1] is None
