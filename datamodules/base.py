"""The data modules' common part: splits, loaders and their order; and that of every classification set."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl

from datamodules.batch import BatchTransform
from datamodules.images import LabelledImages
from datamodules.loader import Fetch, ImageSet, Loader, TrainLoader, stack
from datamodules.sampler import EvalSampler, TrainSampler
from datamodules.transforms import MODES, Augment, EvalTransform, TrainTransform

SPLITS = ("train", "val", "test")


class ImageData(pl.LightningDataModule, ABC):
    """Images in splits train, val and test, whose batches follow from the seed alone.

    A batch is a dict of `image`, `index` (B,) (position in the split; -1 marks padding, not to be counted), in training
    `seed`, and what a subclass adds.

    Args:
        root: folder of the data.
        image_size: side, or (height, width), of what the net sees.
        mean, std: of the channels, for values from 0 to 1.
        in_chans: 3, or 1 for grey.
        num_workers: processes that load, for each device; None: as many as there are cores for it, at most 16. What is
            in a batch does not depend on it.
        broken_limit: share of a split's images that may be unreadable before the run stops.
        batch_size: images a step on each device.
        seed: of the order and the augmentation.

    Raises:
        ValueError: a value is out of its range, or the root is missing; later: what is in it is not as expected.
    """

    class_names: Sequence[str]  # for people, by label
    train_transform: Callable[[dict], dict]  # of a sample
    eval_transform: Callable[[dict], dict]
    repeats = 1  # times that an image stands in the order of an epoch
    collate: Callable[[Sequence[dict]], dict] = staticmethod(stack)

    def __init__(
        self,
        *,
        root: str | None = None,
        image_size: int | Sequence[int],
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        in_chans: int = 3,
        num_workers: int | None = None,
        broken_limit: float = 0.01,
        batch_size: int,
        seed: int = 0,
    ):
        super().__init__()
        if in_chans not in MODES:
            raise ValueError(f"data.in_chans must be 1 or 3, not {in_chans!r}")
        if not len(mean) == len(std) == in_chans:
            given = f"{len(mean)} and {len(std)}"
            raise ValueError(f"data.mean and data.std need {in_chans} values for data.in_chans={in_chans}, not {given}")
        if not 0 <= broken_limit <= 1:
            raise ValueError(f"data.broken_limit is a share from 0 to 1, not {broken_limit!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size!r}")
        self.root = self.find_root(root)
        self.image_size = image_size if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
        self.mean, self.std, self.in_chans = tuple(mean), tuple(std), in_chans
        self.batch_size, self.seed = batch_size, seed
        self.num_workers = num_workers
        self.broken_limit = broken_limit
        self.broken: dict[str, dict[int, str]] = {split: {} for split in SPLITS}  # reasons, by position
        self._sets: dict[str, Any] = {}

    @abstractmethod
    def load(self, split: str) -> ImageSet:
        """The images of `split`, one of `splits`."""

    @property
    def splits(self) -> Sequence[str]:
        """Those that have images of their own; without test the test split is val."""
        return SPLITS

    def find_root(self, root: str | None) -> Path | None:
        """The folder to read; a set that needs none takes none."""
        if root is None:
            raise ValueError(f"{type(self).__name__} needs a folder: data.root=FOLDER")
        folder = Path(root).expanduser()
        if not folder.is_dir():
            raise ValueError(f"data.root={root} is {'not a folder' if folder.exists() else 'missing'}")
        return folder

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def images(self, split: str) -> Any:
        """The images of train, val or test, read on first use."""
        split = "val" if split == "test" and "test" not in self.splits else split
        if split not in self._sets:
            self._sets[split] = self.load(split)
        return self._sets[split]

    def groups(self, images: Any) -> np.ndarray | None:
        """A group for each training image, where batches are better of one."""
        return None

    def names(self, split: str) -> list[str]:
        """Names of a split's images, by position."""
        images = self.images(split)
        return [images.name(i) for i in range(len(images))]

    def train_dataloader(self) -> TrainLoader:
        images = self.images("train")
        groups = self.groups(images)
        order = {"seed": self.seed, "repeats": self.repeats, **self._ranks}
        sampler = TrainSampler(len(images), self.batch_size, groups=groups, **order)
        return TrainLoader(Fetch(images, self.train_transform, self.collate), sampler, **self._loading("train"))

    def val_dataloader(self) -> Loader:
        return self._eval_dataloader("val")

    def test_dataloader(self) -> Loader:
        return self._eval_dataloader("test")

    def _eval_dataloader(self, split: str) -> Loader:
        images = self.images(split)
        sampler = EvalSampler(len(images), self.batch_size, **self._ranks)
        return Loader(Fetch(images, self.eval_transform, self.collate), sampler, **self._loading(split))

    @property
    def _ranks(self) -> dict[str, int]:
        trainer = self.trainer
        return {"rank": trainer.global_rank, "world_size": trainer.world_size} if trainer else {}

    def _loading(self, split: str) -> dict:
        workers = self.num_workers
        if workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            workers = min(16, max(1, cores // (self.trainer.num_devices if self.trainer else 1)))
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        how = {"num_workers": workers, "pin_memory": on_gpu, "broken_limit": self.broken_limit}
        return how | {"broken": self.broken[split]}


class ClassificationData(ImageData):
    """Images with one label each.

    A batch has `image` (uint8 (B, C, H, W), channels-last memory; float32 and normalised once it is on the device),
    `label` (B,) and, where images are mixed in training, `target` (B, K).

    Args:
        crop_pct, crop_mode, interpolation: evaluation's resize and crop, as timm means them.
        flip: whether a mirrored image keeps its label; if not, the recipe's hflip and vflip are not applied.
        augment: the recipe's augmentation, the fields of `datamodules.transforms.Augment`; None: none.
        common: arguments of `ImageData`.
    """

    class_subset: list[int] | None = None  # the only logits to compare in evaluation, where not all of them

    def __init__(
        self,
        *,
        image_size: int | Sequence[int] = 224,
        crop_pct: float = 0.875,
        crop_mode: str = "center",
        interpolation: str = "bicubic",
        flip: bool = True,
        augment: Mapping | None = None,
        batch_size: int = 64,
        **common: Any,
    ):
        super().__init__(image_size=image_size, batch_size=batch_size, **common)
        if not 0 < crop_pct <= 1:
            raise ValueError(f"data.crop_pct must be above 0 and at most 1, not {crop_pct!r}")
        flips = {} if flip else {"hflip": 0.0, "vflip": 0.0}
        self.augment = Augment.from_config(dict(augment or {}) | flips)
        self.repeats = self.augment.repeats
        how = {"mean": self.mean, "in_chans": self.in_chans}
        self.train_transform = TrainTransform(self.augment, self.image_size, **how)
        self.eval_transform = EvalTransform(
            self.image_size, crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation, **how
        )
        self._batch_transform: BatchTransform | None = None

    @abstractmethod
    def load(self, split: str) -> LabelledImages: ...

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        if self._batch_transform is None:
            self._batch_transform = BatchTransform(self.mean, self.std, self.num_classes, self.augment)
        return self._batch_transform(batch)
