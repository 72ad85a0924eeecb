"""Loaders whose batches follow from the seed alone, not from workers or the point of resumption.

A data set for them is map-style (`ImageSet`); its samples are dicts of arrays, one of them `image`.
"""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.decode import BrokenImage
from datamodules.sampler import EvalSampler, Plan, TrainSampler

logger = logging.getLogger(__name__)

ATTEMPTS = 100  # replacements for one broken image


class ImageSet(Protocol):
    """What a loader needs of a data set: samples by position, where `BrokenImage` may be raised, and their names.

    `blank` is a sample that may stand for padding.
    """

    @property
    def blank(self) -> dict: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict: ...
    def name(self, index: int) -> str: ...


@contextmanager
def private_rng(device: torch.device | None = None) -> Iterator[None]:
    """Inside, the global generators of Python, NumPy and torch (CPU and `device`) may be seeded and used (augmentations
    of timm and torchvision draw from them); on leaving they are as they were."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device is not None and device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def seed_rng(*key: int, device: torch.device | None = None) -> None:
    """Seed the global generators (those that `private_rng` keeps) from the numbers in `key`."""
    random.seed(repr(key))
    np.random.seed(random.getrandbits(32))
    torch.default_generator.manual_seed(random.getrandbits(63))
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(random.getrandbits(63))


def stack(samples: Sequence[dict]) -> dict:
    """Samples of equal shapes to one batch; images become (B, C, H, W) in channels-last memory."""
    batch = {}
    for key in samples[0]:
        arrays = [np.asarray(sample[key]) for sample in samples]
        out = np.empty((len(arrays), *arrays[0].shape), arrays[0].dtype)  # else np.stack may keep the strides of views
        batch[key] = torch.from_numpy(np.stack(arrays, out=out))
    batch["image"] = batch["image"].permute(0, 3, 1, 2)  # (B, H, W, C) → (B, C, H, W)
    return batch


class Fetch(Dataset):
    """Makes the batch of a `Plan`: the data set of a `Loader`.

    A broken image is replaced in training by another one, drawn from the sample's own randomness, and in evaluation
    by padding. `batch["index"]` has the positions that were read, -1 for padding; `batch["broken"]` says which ones
    could not be, and why.
    """

    def __init__(
        self, dataset: ImageSet, transform: Callable[[dict], dict], collate: Callable[[Sequence[dict]], dict] = stack
    ):
        self.dataset, self.transform, self.collate = dataset, transform, collate

    def __getitem__(self, plan: Plan) -> dict:
        broken: list[tuple[int, str]] = []
        with private_rng():
            places = zip(plan.index, plan.copy, strict=True)
            batch = self.collate([self._sample(index, copy, plan.key, broken) for index, copy in places])
        batch["broken"] = broken
        return batch if plan.seed is None else batch | {"seed": plan.seed}

    def _sample(self, index: int, copy: int, key: tuple[int, int] | None, broken: list[tuple[int, str]]) -> dict:
        if key is not None:
            seed_rng(*key, index, copy)
        for _ in range(ATTEMPTS):
            try:
                sample = self.dataset[index] if index >= 0 else self.dataset.blank
                return self.transform(sample) | {"index": np.int64(index)}
            except BrokenImage as error:
                broken.append((index, str(error)))
                index = -1 if key is None else random.randrange(len(self.dataset))
        raise ValueError(f"{ATTEMPTS} images in a row are broken, the last one {self.dataset.name(broken[-1][0])}")


class Loader(DataLoader):
    """Gives the batches of its sampler's plans, and names, counts and limits broken images.

    Iteration starts with the first batch that is asked for, not with `iter`: Lightning calls `iter` before it tells
    the sampler the epoch.

    Args:
        broken: filled with {position: reason}; shared among the loaders of one data set.
        broken_limit: share of the set's images above which broken ones stop the run with a ValueError.
    """

    def __init__(
        self,
        fetch: Fetch,
        sampler: TrainSampler | EvalSampler,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        broken: dict[int, str] | None = None,
        broken_limit: float = 1.0,
    ):
        super().__init__(
            fetch,
            batch_size=None,
            sampler=sampler,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else each iteration draws a seed from the global one
        )
        self.images = fetch.dataset
        self.broken = {} if broken is None else broken
        self.broken_limit = broken_limit

    def __iter__(self):
        for batch in super().__iter__():
            for index, reason in batch.pop("broken"):
                self._report(index, reason)
            yield batch

    def _report(self, index: int, reason: str) -> None:
        if index in self.broken:
            return
        self.broken[index] = reason
        logger.warning("broken image skipped: %s (%s)", self.images.name(index), reason)
        if len(self.broken) > self.broken_limit * len(self.images):
            names = ", ".join(self.images.name(i) for i in list(self.broken)[:3])
            raise ValueError(
                f"{len(self.broken)} of {len(self.images)} images are broken, more than data.broken_limit="
                f"{self.broken_limit} permits: {names}{', ...' if len(self.broken) > 3 else ''}"
            )


class TrainLoader(Loader):
    """A `Loader` that knows how many batches of which epoch the training loop has taken.

    After `load_state_dict` the next iteration gives the rest of that epoch and the one after it starts at 0;
    `len` is always a whole epoch. Lightning keeps the state in its checkpoints.
    """

    sampler: TrainSampler

    def __iter__(self):
        self.sampler.consumed = self.sampler.start
        for batch in super().__iter__():
            self.sampler.consumed += 1
            yield batch

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.load_state_dict(state)
