"""Which samples make which batch. A loader's sampler yields one `Plan` a batch.

With global batches of B·W samples (B a rank, W ranks), step t takes the positions [t·B·W, (t + 1)·B·W) of the epoch's
order and rank r every W-th of them from the r-th on: W ranks with B together see what one process with B·W sees.
"""

import math
import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Plan(NamedTuple):
    """One batch to fetch."""

    index: list[int]  # (B,) positions in the data set; -1 is padding
    copy: list[int]  # (B,) which of its repeats within the epoch a sample is
    key: tuple[int, int] | None = None  # (seed, epoch), the source of the samples' randomness; None: nothing is random
    seed: int | None = None  # for what is drawn for the batch as a whole


class TrainSampler(Sampler[Plan]):
    """Shuffled batches of the training set, resumable at any batch.

    The order follows from (seed, epoch). The last uneven batch is dropped; a set smaller than one global batch makes
    one smaller batch. `repeats` copies of an image stand side by side in the order, so that they fall into one global
    batch and onto different ranks, and an epoch keeps its number of steps, hence sees 1/repeats of the images
    (repeated augmentation: Hoffer et al., arXiv:1901.09335; Berman et al., arXiv:1902.05509; used by DeiT).

    Args:
        length: samples in the set.
        batch_size: samples a rank takes in one step.
        groups: (length,) the group of each sample; those of a global batch are of one, but for an epoch's last ones.

    Raises:
        ValueError: there are fewer samples than ranks.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int = 0,
        repeats: int = 1,
        groups: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        if length < world_size:
            raise ValueError(f"{length} training images cannot be shared among {world_size} processes")
        self.length, self.seed, self.repeats, self.groups = length, seed, repeats, groups
        self.batch_size = min(batch_size, length // world_size)
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.start = 0  # first batch of the next iteration
        self.consumed = 0  # batches of this epoch that the training loop has taken; the loader counts them

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[Plan]:
        start, self.start = self.start, 0
        size = self.batch_size * self.world_size
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        order = order if self.groups is None else in_groups(order, self.groups, size)
        order, copy = order.repeat(self.repeats)[: self.length], np.arange(self.length) % self.repeats
        for step in range(start, len(self)):
            mine = slice(step * size + self.rank, (step + 1) * size, self.world_size)
            draw = random.Random(repr((self.seed, self.epoch, step, self.rank)))
            yield Plan(order[mine].tolist(), copy[mine].tolist(), (self.seed, self.epoch), draw.getrandbits(63))

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; an epoch that is being resumed goes on where it was."""
        if epoch != self.epoch:
            self.epoch, self.start, self.consumed = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batches": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]
        self.start = self.consumed = state["batches"]


def in_groups(order: np.ndarray, groups: np.ndarray, size: int) -> np.ndarray:
    """`order` with samples of one group in each run of `size`, as the runs fill up; what fills none comes last."""
    runs, rest = [], []
    for group in np.unique(groups):
        places = np.flatnonzero(groups[order] == group)
        whole = len(places) // size * size
        runs += [*places[:whole].reshape(-1, size)]
        rest.append(places[whole:])
    runs.sort(key=lambda run: run[-1])
    return order[np.concatenate([*runs, np.sort(np.concatenate(rest))])]


class EvalSampler(Sampler[Plan]):
    """All samples once and in order, as many batches on every rank; index -1 pads the last ones."""

    def __init__(self, length: int, batch_size: int, *, rank=0, world_size=1):
        self.length, self.batch_size, self.rank, self.world_size = length, batch_size, rank, world_size

    def __len__(self) -> int:
        return math.ceil(self.length / (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Plan]:
        size = self.batch_size * self.world_size
        for start in range(0, self.length, size):
            places = range(start + self.rank, start + size, self.world_size)
            if start + size > self.length:  # the last batch is as small as it can be
                places = places[: math.ceil((self.length - start) / self.world_size)]
            yield Plan([i if i < self.length else -1 for i in places], [0] * len(places))
