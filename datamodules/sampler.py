"""Samplers: they assign samples to batches and yield one `Plan` per batch.

W ranks with B samples each form a global batch of B·W samples. Step t takes the entries [t·B·W, (t + 1)·B·W) of the
epoch's order, and rank r takes every W-th of these entries, starting at the r-th. So W ranks with B samples each see
the same samples per step as one process with B·W samples.
"""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from datamodules.images import index_in_class
from datamodules.sizes import Size
from retinue.utils.arithmetic import ceil_div


class Plan(NamedTuple):
    """Plan of one batch.

    Attributes:
        index: (B,) positions in the data set; -1 is padding.
        copy: (B,) number of each sample among the repeats of its image within the epoch, from 0.
        key: (seed, epoch), the source of the samples' randomness. None means that nothing is random.
        seed: seed of what is drawn once for the whole batch; None in evaluation.
        size: size of the images; None is the data's.
    """

    index: list[int]
    copy: list[int]
    key: tuple[int, int] | None = None
    seed: int | None = None
    size: Size | None = None


class TrainSampler(Sampler[Plan]):
    """Sampler of shuffled training batches that can be resumed at any batch.

    The order depends on (seed, epoch) alone. The last, incomplete batch is dropped; a data set smaller than one global
    batch makes one smaller batch. The `repeats` copies of an image are adjacent in the order, so they fall into one
    global batch and onto different ranks. An epoch keeps its number of steps and therefore sees 1/repeats of the images
    (repeated augmentation: Hoffer et al., arXiv:1901.09335; Berman et al., arXiv:1902.05509; used by DeiT).

    Args:
        length: number of samples in the data set.
        batch_size: number of samples per rank and step.
        seed: seed of the order and of the samples' randomness.
        repeats: number of copies of an image in the order of an epoch.
        groups: (length,) group of each sample. A global batch holds samples of one group only, except at the end of an
            epoch. None means no groups.
        factors: (length,) expected number of times, at least 1, that each sample is drawn for the order of an epoch, of
            which the first `length` entries are taken; see `repeat_factors`. None draws each sample once.
        size_of: size of the images of a batch by (epoch, step). None is the data's size.
        classes: (length,) class of each sample, to draw all classes equally often; see `draw_balanced`. None draws each
            sample once.
        rank: global rank of this process.
        world_size: number of processes.

    Raises:
        ValueError: if there are fewer samples than ranks.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int = 0,
        repeats: int = 1,
        groups: np.ndarray | None = None,
        factors: np.ndarray | None = None,
        size_of: Callable[[int, int], Size] | None = None,
        classes: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        if length < world_size:
            raise ValueError(f"{length} training images cannot be shared among {world_size} processes")
        self.length, self.seed, self.repeats, self.groups = length, seed, repeats, groups
        self.factors, self.classes, self.size_of = factors, classes, size_of
        self.batch_size = min(batch_size, length // world_size)
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        # First batch of the next iteration.
        self.start = 0
        # Number of batches of this epoch that the training loop has consumed; the loader counts them.
        self.consumed = 0

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[Plan]:
        start, self.start = self.start, 0
        size = self.batch_size * self.world_size
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.factors is not None:
            order = rng.permutation(draw_copies(self.factors, rng))[: self.length]
        elif self.classes is not None:
            order = draw_balanced(self.classes, rng)
        else:
            order = rng.permutation(self.length)
        order = order if self.groups is None else group_batches(order, self.groups, size)
        order = order.repeat(self.repeats)[: self.length]
        is_drawn_once = self.factors is None and self.classes is None
        copy = np.arange(self.length) % self.repeats if is_drawn_once else index_in_class(order)
        for step in range(start, len(self)):
            entries = slice(step * size + self.rank, (step + 1) * size, self.world_size)
            batch_rng = random.Random(repr((self.seed, self.epoch, step, self.rank)))
            size_of_images = self.size_of(self.epoch, step) if self.size_of else None
            yield Plan(
                order[entries].tolist(), copy[entries].tolist(), (self.seed, self.epoch), batch_rng.getrandbits(63),
                size_of_images,
            )  # fmt: skip

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; an epoch that is being resumed continues where it stopped."""
        if epoch != self.epoch:
            self.epoch, self.start, self.consumed = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches that were consumed."""
        return {"epoch": self.epoch, "batches": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume at the state that `state_dict` returned."""
        self.epoch = state["epoch"]
        self.start = self.consumed = state["batches"]


def repeat_factors(image: np.ndarray, label: np.ndarray, length: int, threshold: float) -> np.ndarray:
    """Return the repeat factor of each image by the rarest class in it.

    The factor of a class c in a share f(c) of the images is max(1, sqrt(threshold / f(c))), and that of an image is the
    largest factor of its classes, or 1 without objects (LVIS: Gupta et al., CVPR 2019, arXiv:1908.03195, appendix B).

    Args:
        image: (A,) position of the image of each object.
        label: (A,) class of each object, 0 or more.
        length: N, number of images.
        threshold: share of the images below which a class is rare.

    Returns:
        float64 (N,), at least 1.
    """
    classes = int(label.max(initial=0)) + 1
    image, label = np.divmod(np.unique(image * classes + label), classes)
    share = np.bincount(label, minlength=classes) / length
    factors = np.ones(length)
    np.maximum.at(factors, image, np.sqrt(threshold / share[label]))
    return factors


def draw_copies(factors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return each position as often as its factor says: a fraction of a copy is a whole one with that probability."""
    whole = np.floor(factors)
    return np.arange(len(factors)).repeat((whole + (rng.random(len(factors)) < factors - whole)).astype(np.int64))


def draw_balanced(classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw as many samples as there are, each class equally often, and shuffle them.

    The classes that have samples are drawn equally often, up to one draw. Within a class, the numbers of draws of two
    samples differ by at most one.

    Args:
        classes: (N,) class of each sample, by position.
        rng: source of the randomness.

    Returns:
        (N,) positions of the drawn samples.
    """
    drawn = []
    # The shares of an array are equal up to one entry, and the first classes get the larger ones.
    present = rng.permutation(np.unique(classes))
    for label, share in zip(present, np.array_split(classes, len(present)), strict=True):
        members = np.flatnonzero(classes == label)
        rounds = [rng.permutation(members) for _ in range(ceil_div(len(share), len(members)))]
        drawn.append(np.concatenate([members[:0], *rounds])[: len(share)])
    return rng.permutation(np.concatenate(drawn))


def group_batches(order: np.ndarray, groups: np.ndarray, size: int) -> np.ndarray:
    """Rearrange `order` so that each batch of `size` samples holds samples of one group.

    A batch comes at the place where its last sample is in `order`. The samples that fill no whole batch come last.

    Args:
        order: (N,) positions of the samples, which may occur several times.
        groups: (N,) group of each sample, by position.
        size: number of samples in a batch.

    Returns:
        (N,) the same positions, rearranged.
    """
    batches, leftovers = [], []
    for group in np.unique(groups):
        entries = np.flatnonzero(groups[order] == group)
        in_batches = len(entries) // size * size
        batches += [*entries[:in_batches].reshape(-1, size)]
        leftovers.append(entries[in_batches:])
    batches.sort(key=lambda batch: batch[-1])
    return order[np.concatenate([*batches, np.sort(np.concatenate(leftovers))])]


class EvalSampler(Sampler[Plan]):
    """Sampler of evaluation batches: all samples once and in order.

    Every rank gets the same number of batches; index -1 pads the last ones.

    Args:
        length: number of samples in the data set.
        batch_size: number of samples per rank and step.
        rank: global rank of this process.
        world_size: number of processes.
    """

    def __init__(self, length: int, batch_size: int, *, rank=0, world_size=1):
        self.length, self.batch_size, self.rank, self.world_size = length, batch_size, rank, world_size

    def __len__(self) -> int:
        return ceil_div(self.length, self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[Plan]:
        size = self.batch_size * self.world_size
        for start in range(0, self.length, size):
            positions = range(start + self.rank, start + size, self.world_size)
            if start + size > self.length:
                # The last batch has as few samples per rank as possible.
                positions = positions[: ceil_div(self.length - start, self.world_size)]
            yield Plan([i if i < self.length else -1 for i in positions], [0] * len(positions))
