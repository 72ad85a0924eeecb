"""Loaders whose batches depend on the seed alone, neither on the number of workers nor on where training resumed.

They read map-style data sets (`ImageSet`), whose samples are dicts of arrays with the key `image`.
"""

import logging
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.decode import BrokenImage
from datamodules.sampler import EvalSampler, Plan, TrainSampler
from datamodules.sizes import Size

logger = logging.getLogger(__name__)

# Signals that ask a run to stop. The process that trains saves and then ends its loading processes.
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR2}
# Largest number of images that are read for one place in a batch before the run stops.
MAX_ATTEMPTS = 100


class ImageSet(Protocol):
    """Interface of the data sets that a loader reads."""

    @property
    def blank(self) -> dict:
        """Sample that stands for padding."""
        ...

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: int) -> dict:
        """Read the sample at a position, or raise `BrokenImage`."""
        ...

    def name(self, index: int) -> str:
        """Return the name of the sample at a position."""
        ...


@contextmanager
def private_rng(device: torch.device | None = None) -> Iterator[None]:
    """Restore the global random generators of Python, NumPy and torch (CPU and `device`) when the block ends.

    Inside the block they may be seeded and used freely: augmentations of timm and torchvision draw from them.
    """
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device is not None and device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def seed_rng(*key: int, device: torch.device | None = None) -> None:
    """Seed the global generators that `private_rng` restores from the numbers in `key`."""
    random.seed(repr(key))
    np.random.seed(random.getrandbits(32))
    torch.default_generator.manual_seed(random.getrandbits(63))
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(random.getrandbits(63))


@contextmanager
def stop_signals_held() -> Iterator[None]:
    """Hold signals that ask to stop until the block ends; processes that are started inside begin with them held."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def outlive_stop_signals(worker: int) -> None:
    """Keep a loading process alive when its process group is told to stop, so that the run can save; `worker_init_fn`.

    The process ends when its parent has ended, or sends SIGTERM, as torch does to a loading process that hangs.

    Args:
        worker: number of the loading process, which is not used.
    """
    for number in STOP_SIGNALS - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and hasattr(signal, "sigtimedwait"):
        threading.Thread(target=_end_with_parent, args=(parent.pid,), daemon=True).start()
    else:
        # macOS cannot tell who sent a signal, so there every SIGTERM ends the process.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_with_parent(parent: int | None) -> None:
    # SIGTERM is held in all threads of this process, hence it waits to be read here.
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, 0.5)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)


def stack(samples: Sequence[dict]) -> dict:
    """Join samples of equal shapes to one batch; images become (B, C, H, W) in channels-last memory.

    `ops` stays an array of NumPy, which Lightning leaves on the CPU.
    """
    batch = {}
    for key in samples[0]:
        arrays = [np.asarray(sample[key]) for sample in samples]
        # Without `out`, np.stack may keep the strides of views, and the memory would not be contiguous.
        out = np.stack(arrays, out=np.empty((len(arrays), *arrays[0].shape), arrays[0].dtype))
        batch[key] = out if key == "ops" else torch.from_numpy(out)
    if "image" in batch:
        batch["image"] = batch["image"].permute(0, 3, 1, 2)  # (B, H, W, C) → (B, C, H, W)
    return batch


class BatchFetcher(Dataset):
    """Data set of a `Loader`, whose item for a `Plan` is the batch of that plan.

    In training, a broken image is replaced by another image, drawn from the sample's own randomness. In evaluation it
    is replaced by padding. `batch["index"]` holds the positions of the images that were read, and -1 for padding.
    `batch["broken"]` lists the position of each unreadable image and the reason.

    Args:
        dataset: the data set to read.
        transform: transform of a sample.
        collate: function that joins samples to a batch.
        by_size: transforms of samples for the sizes that plans name.

    Raises:
        ValueError: if `MAX_ATTEMPTS` images in a row are broken; raised when a batch is read.
    """

    def __init__(
        self,
        dataset: ImageSet,
        transform: Callable[[dict], dict],
        collate: Callable[[Sequence[dict]], dict] = stack,
        by_size: Mapping[Size, Callable[[dict], dict]] | None = None,
    ):
        self.dataset, self.transform, self.collate = dataset, transform, collate
        self.by_size = {} if by_size is None else by_size

    def __getitem__(self, plan: Plan) -> dict:
        broken: list[tuple[int, str]] = []
        transform = self.transform if plan.size is None else self.by_size[plan.size]
        with private_rng():
            pairs = zip(plan.index, plan.copy, strict=True)
            batch = self.collate([self._sample(index, copy, plan.key, transform, broken) for index, copy in pairs])
        batch["broken"] = broken
        return batch if plan.seed is None else batch | {"seed": plan.seed}

    def _sample(
        self,
        index: int,
        copy: int,
        key: tuple[int, int] | None,
        transform: Callable[[dict], dict],
        broken: list[tuple[int, str]],
    ) -> dict:
        if key is not None:
            seed_rng(*key, index, copy)
        for _ in range(MAX_ATTEMPTS):
            try:
                sample = self.dataset[index] if index >= 0 else self.dataset.blank
                return transform(sample) | {"index": np.int64(index)}
            except BrokenImage as error:
                broken.append((index, str(error)))
                index = -1 if key is None else random.randrange(len(self.dataset))
        raise ValueError(f"{MAX_ATTEMPTS} images in a row are broken, the last one {self.dataset.name(broken[-1][0])}")


def _unchanged(batch: Any) -> Any:
    return batch


class Loader(DataLoader):
    """Loader of the batches that its sampler plans; it logs, counts and limits broken images.

    Iteration starts when the first batch is requested, not in `iter`, because Lightning calls `iter` before it sets the
    sampler's epoch.

    Args:
        fetch: makes the batch of a plan.
        sampler: plans the batches.
        num_workers: number of loading processes; 0 loads in this process.
        pin_memory: whether batches are copied to pinned memory.
        broken: dict that receives the reason for each broken image, by position; all loaders of one split share it.
        broken_limit: share of the data set's images that may be broken.
        residents: adds the images to batches that come without them; None for batches with images.

    Raises:
        ValueError: if more images than that are broken; raised when a batch is read.
    """

    def __init__(
        self,
        fetch: BatchFetcher,
        sampler: TrainSampler | EvalSampler,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        broken: dict[int, str] | None = None,
        broken_limit: float = 1.0,
        residents: Callable[[dict], dict] | None = None,
    ):
        super().__init__(
            fetch,
            batch_size=None,
            # The data set returns whole batches; torch would turn the arrays in them to tensors.
            collate_fn=_unchanged,
            sampler=sampler,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=outlive_stop_signals,
            # Without a generator of its own, each iteration would draw a seed from the global one.
            generator=torch.Generator(),
        )
        self.images = fetch.dataset
        self.broken = {} if broken is None else broken
        self.broken_limit = broken_limit
        self.residents = residents

    def __iter__(self):
        with stop_signals_held() if self.num_workers else nullcontext():
            batches = super().__iter__()
        for batch in batches:
            for index, reason in batch.pop("broken"):
                self._report(index, reason)
            yield batch if self.residents is None else self.residents(batch)

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
    """Training loader that can be saved and resumed at any batch.

    It counts the batches of the epoch that the training loop has consumed. After `load_state_dict` the next iteration
    gives the remaining batches of that epoch, and the iteration after it starts at batch 0. `len` is always the number
    of batches of a whole epoch. Lightning keeps the state in its checkpoints.
    """

    sampler: TrainSampler

    def __iter__(self):
        self.sampler.consumed = self.sampler.start
        for batch in super().__iter__():
            self.sampler.consumed += 1
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; an epoch that is being resumed continues where it stopped."""
        self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches that were consumed."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume at the state that `state_dict` returned."""
        self.sampler.load_state_dict(state)
