"""Base classes of the data modules: splits and loaders of every data set, and the classification data sets' part."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from datamodules.bands import BandEvalTransform, BandTrainTransform
from datamodules.batch import BatchTransform
from datamodules.classes import Classes
from datamodules.corruptions import CorruptTransform
from datamodules.holdout import hold_out
from datamodules.images import LabelledImages, Subset, draw_shots
from datamodules.loader import BatchFetcher, ImageSet, Loader, TrainLoader, stack
from datamodules.resident import Labels, Residents, fits
from datamodules.sampler import EvalSampler, TrainSampler, repeat_factors
from datamodules.sizes import SizeSchedule
from datamodules.split_checks import check_labels, warn_of_few_images
from datamodules.token_maps import LabelMaps
from datamodules.transforms import PILLOW_MODES, Augment, EvalTransform, TrainTransform

SPLITS = ("train", "val", "test")
# VOLO's published nets have 1.15, the largest share: a share above 1 adds a black border.
MAX_CROP_PCT = 1.2


class ImageData(pl.LightningDataModule, ABC):
    """Images in the splits train, val and test, whose batches depend on the seed alone.

    The module docstring of `datamodules.batch` specifies the batches.

    Args:
        root: folder of the data.
        image_size: side, or (height, width), of the images that the net receives.
        mean: mean of each channel, for values from 0 to 1.
        std: standard deviation of each channel, for values from 0 to 1.
        in_chans: number of channels: 3, or 1 for grey images.
        num_workers: number of loading processes per device. None means the number of available cores divided by the
            number of devices, at most 16. The content of a batch does not depend on it.
        broken_limit: share of a split's images that may be unreadable before the run stops.
        sampler: repeat_factor draws training images with rare classes more often (`sampler.repeat_factors`), balanced
            draws all classes equally often (`sampler.draw_balanced`). None draws each image once in an epoch.
        repeat_threshold: share of the images below which a class is rare.
        batch_size: number of images per step and device.
        seed: seed of the order and of the augmentation.

    Attributes:
        class_names: readable names of the classes, by label.
        has_bands: whether images are bands in the files' units, as `datamodules.bands` reads them.
        samplers: values that the argument `sampler` takes.
        train_transform: transform of a training sample.
        eval_transform: transform of an evaluation sample.
        repeats: number of times that an image occurs in the order of an epoch.
        collate: function that joins samples to a batch.
        broken: for each split, the reason why an image is unreadable, by the position of the image.

    Raises:
        ValueError: if an argument is out of its range or `root` is missing. Loading raises it if the content of `root`
            is not as expected.
    """

    class_names: Sequence[str]
    has_bands = False
    samplers: Sequence[str] = ("repeat_factor",)
    train_transform: Callable[[dict], dict]
    eval_transform: Callable[[dict], dict]
    repeats = 1
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
        sampler: str | None = None,
        repeat_threshold: float = 1e-3,
        batch_size: int,
        seed: int = 0,
    ):
        super().__init__()
        if in_chans < 1 or (in_chans not in PILLOW_MODES and not self.has_bands):
            raise ValueError(f"data.in_chans must be 1 or 3, not {in_chans!r}; data=image_folder takes any number")
        if not len(mean) == len(std) == in_chans:
            given = f"{len(mean)} and {len(std)}"
            raise ValueError(f"data.mean and data.std need {in_chans} values for data.in_chans={in_chans}, not {given}")
        if not 0 <= broken_limit <= 1:
            raise ValueError(f"data.broken_limit must be a share from 0 to 1, not {broken_limit!r}")
        if sampler not in (None, *self.samplers):
            raise ValueError(f"data.sampler must be {' or '.join(self.samplers)} or null, not {sampler!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size!r}")
        self.root = self.find_root(root)
        self.image_size = image_size if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
        self.mean, self.std, self.in_chans = tuple(mean), tuple(std), in_chans
        self.batch_size, self.seed = batch_size, seed
        self.num_workers = num_workers
        self.broken_limit = broken_limit
        self.sampler, self.repeat_threshold = sampler, repeat_threshold
        self.broken: dict[str, dict[int, str]] = {split: {} for split in SPLITS}
        self._images: dict[str, Any] = {}

    @abstractmethod
    def load(self, split: str) -> ImageSet:
        """Read the images of one of `splits`."""

    @property
    def splits(self) -> Sequence[str]:
        """Splits that have their own images; without a test split, testing uses the validation split."""
        return SPLITS

    def find_root(self, root: str | None) -> Path | None:
        """Return the folder to read, or None for a data set that needs no folder."""
        if root is None:
            raise ValueError(f"{type(self).__name__} needs a folder: data.root=FOLDER")
        folder = Path(root).expanduser()
        if not folder.is_dir():
            raise ValueError(f"data.root={root} is {'not a folder' if folder.exists() else 'missing'}")
        return folder

    @property
    def note(self) -> dict[str, str]:
        """Facts about the data that a result states beside their name."""
        return {}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def class_ids(self) -> list[int]:
        """Number of each class in the data's files, by label."""
        return list(range(self.num_classes))

    @property
    def classes_of_net(self) -> Classes:
        """The classes that a net for these data predicts."""
        return Classes(list(self.class_names), self.class_ids)

    @staticmethod
    def published_classes() -> Classes | None:
        """Return the classes if they are known without the data; otherwise None."""
        return None

    def images(self, split: str) -> Any:
        """Return the images of train, val or test; they are read on first use."""
        split = "val" if split == "test" and "test" not in self.splits else split
        if split not in self._images:
            self._images[split] = self.load(split)
            warn_of_few_images(len(self._images[split]), split)
            self.check(self._images[split], split)
        return self._images[split]

    def check(self, images: Any, split: str) -> None:
        """Check the images of a split that has just been read.

        Raises:
            ValueError: if they are not as expected.
        """

    @property
    def size_schedule(self) -> SizeSchedule | None:
        """Sizes of the training images if they change during training; None if they have the data's size."""
        return None

    def groups(self, images: Any) -> np.ndarray | None:
        """Return the group (N,) of each training image if a batch should hold images of one group only, else None."""
        return None

    def image_classes(self, images: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the position of the image (A,) and the class (A,) of each training object.

        Raises:
            ValueError: if the classes in an image are not known before it is read.
        """
        raise ValueError(
            "data.sampler=repeat_factor is for classification and detection: the classes that a segmentor sees in an "
            "image depend on the crop, and are not known before each mask is read"
        )

    def names(self, split: str) -> list[str]:
        """Return the names of a split's images, by position."""
        images = self.images(split)
        return [images.name(i) for i in range(len(images))]

    def train_dataloader(self) -> TrainLoader:
        images = self.images("train")
        factors = None
        if self.sampler == "repeat_factor":
            factors = repeat_factors(*self.image_classes(images), len(images), self.repeat_threshold)
        classes = images.labels if self.sampler == "balanced" else None
        sampler = TrainSampler(
            len(images), self.batch_size, seed=self.seed, repeats=self.repeats, groups=self.groups(images),
            factors=factors, classes=classes, size_of=self.size_schedule, **self._ranks,
        )  # fmt: skip
        fetch, residents = self._source("train")
        return TrainLoader(fetch, sampler, residents=residents, **self._loader_arguments("train"))

    def val_dataloader(self) -> Loader:
        return self._eval_dataloader("val")

    def test_dataloader(self) -> Loader:
        return self._eval_dataloader("test")

    def ordered_dataloader(self, split: str) -> Loader:
        """Return the images of any split in their order, all prepared as in evaluation, those of train too."""
        fetch = BatchFetcher(self.images(split), self.eval_transform, self.collate)
        sampler = EvalSampler(len(self.images(split)), self.batch_size)
        return Loader(fetch, sampler, **self._loader_arguments(split))

    def _eval_dataloader(self, split: str) -> Loader:
        sampler = EvalSampler(len(self.images(split)), self.batch_size, **self._ranks)
        fetch, residents = self._source(split)
        return Loader(fetch, sampler, residents=residents, **self._loader_arguments(split))

    def _source(self, split: str) -> tuple[BatchFetcher, Callable[[dict], dict] | None]:
        """Return what makes a split's batches, and what adds the images to batches that come without them."""
        transform = self.train_transform if split == "train" else self.eval_transform
        return BatchFetcher(self.images(split), transform, self.collate), None

    @property
    def _gpu(self) -> torch.device | None:
        """Return the GPU that trains, or None if there is none."""
        device = self.trainer.strategy.root_device if self.trainer else None
        return device if device is not None and device.type == "cuda" else None

    @property
    def _ranks(self) -> dict[str, int]:
        trainer = self.trainer
        return {"rank": trainer.global_rank, "world_size": trainer.world_size} if trainer else {}

    def _loader_arguments(self, split: str) -> dict:
        workers = self.num_workers
        if workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            workers = min(16, max(1, cores // (self.trainer.num_devices if self.trainer else 1)))
        return {
            "num_workers": workers,
            "pin_memory": self._gpu is not None,
            "broken": self.broken[split],
            "broken_limit": self.broken_limit,
        }


class ClassificationData(ImageData):
    """Images with one label each.

    Args:
        image_size: side, or (height, width), of the images that the net receives.
        crop_pct: share of the resized image that evaluation's crop keeps, as in timm.
        crop_mode: center, squash or border, as in timm.
        interpolation: interpolation of evaluation's resizing, as in timm.
        flip: whether a mirrored image keeps its label. If it does not, the recipe's hflip and vflip are not applied.
        shots: number of images of each class to train on, drawn by the seed. None means all images.
        augment: the recipe's augmentation, with the fields of `datamodules.transforms.Augment`. None means no
            augmentation.
        token_maps: folder of label maps of the training images, as `datamodules.token_maps` reads them.
        corrupt: `name` and `severity` of a corruption of the test images (`datamodules.corruptions`), or None.
        batch_size: number of images per step and device.
        holdout: number of training images of each class that are taken out of the training split and replace the
            validation split; None leaves the splits as they are.
        common: arguments of `ImageData`.

    Attributes:
        class_subset: labels of the only logits that evaluation compares; None compares all logits.

    Raises:
        ValueError: if an argument is out of its range.
    """

    class_subset: list[int] | None = None
    samplers = ("repeat_factor", "balanced")
    train_transform: TrainTransform
    eval_transform: EvalTransform

    def __init__(
        self,
        *,
        image_size: int | Sequence[int] = 224,
        crop_pct: float = 0.875,
        crop_mode: str = "center",
        interpolation: str = "bicubic",
        flip: bool = True,
        shots: int | None = None,
        augment: Mapping | None = None,
        token_maps: str | None = None,
        corrupt: Mapping | None = None,
        batch_size: int = 64,
        holdout: int | None = None,
        **common: Any,
    ):
        super().__init__(image_size=image_size, batch_size=batch_size, **common)
        if not 0 < crop_pct <= MAX_CROP_PCT:
            raise ValueError(f"data.crop_pct must be above 0 and at most {MAX_CROP_PCT}, not {crop_pct!r}")
        config = {} if augment is None else dict(augment)
        if shots is not None and shots < 1:
            raise ValueError(f"data.shots must be at least 1, or null for all images, not {shots!r}")
        self.flip, self.shots = flip, shots
        if not flip:
            config |= {"hflip": 0.0, "vflip": 0.0}
        self.augment = Augment.from_config(config)
        self.repeats = self.augment.repeats
        self.token_maps = token_maps
        train, evaluation = (
            (BandTrainTransform, BandEvalTransform) if self.has_bands else (TrainTransform, EvalTransform)
        )
        self.train_transform = train(self.augment, self.image_size, mean=self.mean, in_chans=self.in_chans)
        self.eval_transform = evaluation(
            self.image_size,
            crop_pct=crop_pct,
            crop_mode=crop_mode,
            interpolation=interpolation,
            mean=self.mean,
            in_chans=self.in_chans,
        )
        self.corrupt = corrupt
        # Transforms of training samples by size, if the size changes during training.
        self._by_size = {
            size: train(self.augment, size, mean=self.mean, in_chans=self.in_chans) for size in self.augment.sizes or ()
        }
        self.holdout = holdout
        # Images of a split by its name, without those that `holdout` and `shots` leave out.
        self._chosen: dict[str, LabelledImages] = {}
        self._batch_transform: BatchTransform | None = None
        self._residents: dict[str, Residents] = {}

    @property
    def classes_of_net(self) -> Classes:
        return Classes(list(self.class_names), self.class_ids, self.class_subset)

    @abstractmethod
    def load(self, split: str) -> LabelledImages: ...

    @property
    def size_schedule(self) -> SizeSchedule | None:
        if self.augment.sizes is None:
            return None
        epochs = self.trainer.max_epochs if self.trainer and self.trainer.max_epochs else 1
        return SizeSchedule(self.augment.sizes, self.augment.size_by == "step", self.seed, epochs)

    def images(self, split: str) -> Any:
        if split not in self._chosen:
            if self.holdout is None or split == "test":
                images = super().images(split)
            else:
                train, held = hold_out(super().images("train"), self.holdout)
                images = train if split == "train" else held
            if self.shots is not None and split == "train":
                drawn = draw_shots(images.labels, np.ones(len(images), bool), self.shots, self.seed)
                images = Subset(images, np.flatnonzero(drawn))
            self._chosen[split] = images
        return self._chosen[split]

    def image_classes(self, images: LabelledImages) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(len(images)), images.labels

    def check(self, images: LabelledImages, split: str) -> None:
        check_labels(images.labels, self.class_names, split)

    def _source(self, split: str) -> tuple[BatchFetcher, Callable[[dict], dict] | None]:
        images, train, device = self.images(split), self.train_transform, self._gpu
        changes = split == "train" and self.augment.sizes is not None
        if split == "test" and self.corrupt is not None:
            return BatchFetcher(images, CorruptTransform(self.eval_transform, **self.corrupt), self.collate), None
        if split == "train" and self.token_maps is not None:
            return BatchFetcher(LabelMaps(images, self.token_maps, self.num_classes), train, self.collate), None
        if device is not None and not changes and fits(images, train if split == "train" else self.eval_transform):
            if split not in self._residents:
                self._residents[split] = (
                    Residents.of_training(images, train, device) if split == "train"
                    else Residents.of_evaluation(images, self.eval_transform, device)
                )  # fmt: skip
            residents = self._residents[split]
            return BatchFetcher(Labels(images), residents.draw, self.collate), residents
        if split != "train":
            return super()._source(split)
        if self.augment.decode is not None:
            images = images.encoded()
        return BatchFetcher(images, train, self.collate, self._by_size), None

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        if self._batch_transform is None:
            sampler = self.train_transform.sampler
            fill = (0, 0, 0) if sampler is None else sampler.fill
            self._batch_transform = BatchTransform(self.mean, self.std, self.num_classes, self.augment, fill)
        return self._batch_transform(batch)
