"""Images for self-supervised pretraining: those of any data set, with the views that a method takes of each image."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from datamodules.base import ClassificationData, ImageData
from datamodules.batch import BatchTransform
from datamodules.images import LabelledImages, Subset
from datamodules.loader import BatchFetcher, Loader, seed_rng
from datamodules.sampler import EvalSampler
from datamodules.transforms import Augment
from datamodules.views import View, ViewTransform, stack_views


class HeldOutFetcher(BatchFetcher):
    """Fetcher whose views of an image follow from (seed, position), so that each evaluation sees the same ones.

    Args:
        seed: the run's seed.
        arguments: as those of `BatchFetcher`.
    """

    def __init__(self, *arguments: Any, seed: int):
        super().__init__(*arguments)
        self.seed = seed

    def _sample(self, index: int, *arguments: Any) -> dict:
        seed_rng(self.seed, index)
        return super()._sample(index, *arguments)


class PretrainingData(ImageData):
    """The images of a data set with views of them.

    A batch that the task receives has these keys (B images, V views), beside `index` and in training `seed`
    (`datamodules.batch`):

        views   list of V dicts: `image`, float32 (B, C, h, w), normalised, in channels-last memory; for a view with a
                mask `mask`, bool (B, rows, columns), True where a patch is masked
        image   in evaluation only: float32 (B, C, H, W), the image as a classifier is evaluated on it
        label   int64 (B,), 0 to K - 1; -1 without labels

    Args:
        source: the data set, of which only the images and the labels are used.
        views: `method.views`: by name the fields of `datamodules.views.View`.
        augment: the recipe's augmentation, with the fields of `datamodules.transforms.Augment`.
        mask_patch: function from the shorter side of an image to the side of a mask's patch by default.

    Raises:
        ValueError: if an augmentation or a mask is not possible.
    """

    collate = staticmethod(stack_views)

    train_transform: ViewTransform

    def __init__(
        self,
        source: ClassificationData,
        views: Mapping[str, Mapping],
        augment: Mapping[str, Any],
        mask_patch: Callable[[int], int],
    ):
        self.source = source
        self.has_bands = source.has_bands
        super().__init__(
            image_size=source.image_size,
            mean=source.mean,
            std=source.std,
            in_chans=source.in_chans,
            num_workers=source.num_workers,
            broken_limit=source.broken_limit,
            batch_size=source.batch_size,
            seed=source.seed,
        )
        common = Augment.from_config(augment)
        self.repeats, self.reduced_decoding = common.repeats, common.decode is not None
        self.train_transform = ViewTransform(
            [View.from_config(view) for view in views.values()],
            augment, self.image_size, flip=source.flip, mean=self.mean, in_chans=self.in_chans, bands=self.has_bands,
            mask_patch=mask_patch,
        )  # fmt: skip
        self.eval_transform = self._evaluate
        self._to_device = BatchTransform(self.mean, self.std, 0, Augment())
        self._bank: Loader | None = None

    def _evaluate(self, sample: dict) -> dict:
        return self.train_transform(sample) | {"image": self.source.eval_transform(sample)["image"]}

    def find_root(self, root: str | None) -> None:
        return None

    @property
    def class_names(self) -> Sequence[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.source.class_names

    @property
    def splits(self) -> Sequence[str]:
        return self.source.splits

    def images(self, split: str) -> LabelledImages:
        return self.source.images(split)

    def load(self, split: str) -> LabelledImages:
        return self.source.load(split)

    def _source(self, split: str) -> tuple[BatchFetcher, Callable[[dict], dict] | None]:
        images = self.images(split)
        if split == "train":
            images = images.encoded() if self.reduced_decoding else images
            return BatchFetcher(images, self.train_transform, self.collate), None
        return HeldOutFetcher(images, self.eval_transform, self.collate, seed=self.seed), None

    def bank_dataloader(self, limit: int) -> Loader:
        """Return a loader of at most `limit` training images at equal distances, without views."""
        if self._bank is None:
            images = self.images("train")
            positions = np.unique(np.linspace(0, len(images) - 1, min(limit, len(images))).round().astype(np.int64))
            bank = Subset(images, positions)
            fetch = BatchFetcher(bank, self.source.eval_transform)
            sampler = EvalSampler(len(bank), self.batch_size, **self._ranks)
            self._bank = Loader(fetch, sampler, **self._loader_arguments("train"))
        return self._bank

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        if "views" in batch:
            batch = batch | {"views": [self._to_device(view) for view in batch["views"]]}
        return self._to_device(batch) if "image" in batch else batch
