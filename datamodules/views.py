"""Views of an image for self-supervised pretraining: crops by their own augmentation, with masks if a method asks.

What is drawn follows from the generators that the loader seeds by (seed, epoch, image), so a resumed run and any
number of processes see the same crops and the same masks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from datamodules.bands import BandTrainTransform
from datamodules.colours import Colours
from datamodules.loader import stack
from datamodules.transforms import Augment, TrainTransform

# The sides of a view that is a share of the image are multiples of this number of pixels.
MULTIPLE = 8


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Mask that is drawn for a view: a random share of its patches.

    Attributes:
        ratio: share of the patches that are masked; their number is rounded up.
        patch: side of a patch in pixels. None means what the method takes for images of this size.
    """

    ratio: float
    patch: int | None = None

    def grid(self, size: tuple[int, int], default: Callable[[int], int]) -> tuple[int, int]:
        """Return the number of rows and columns of patches in an image of `size` (height, width).

        Args:
            size: (height, width) of the image in pixels.
            default: function from the shorter side of an image to the side of a patch.

        Raises:
            ValueError: if the ratio is out of its range, or the patches do not divide the image.
        """
        if not 0 < self.ratio < 1:
            raise ValueError(f"a mask's ratio must be above 0 and below 1, not {self.ratio!r}")
        side = max(1, default(min(size))) if self.patch is None else self.patch
        if size[0] % side or size[1] % side:
            raise ValueError(f"a mask's patch of {side} pixels does not divide images of {size[0]} x {size[1]} pixels")
        return size[0] // side, size[1] // side


@dataclass(frozen=True, kw_only=True)
class View:
    """One kind of view that a method takes of each image: an entry of `method.views`.

    Attributes:
        number: number of views of this kind.
        size: side in pixels, or (height, width). None means the data's image size.
        share: side as a share of the data's image size, to whole multiples of 8 pixels. None takes `size`.
        mask: what is masked. None masks nothing.
        colours: changes of the colours after the recipe's augmentation. None changes nothing.
        augment: fields of the recipe's augmentation that this kind of view changes.
    """

    number: int = 1
    size: int | tuple[int, int] | None = None
    share: float | None = None
    mask: Mask | None = None
    colours: Colours | None = None
    augment: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "View":
        """Read an entry of `method.views`, whose values the schema has checked."""
        values = dict(config)
        if values.get("mask") is not None:
            values["mask"] = Mask(**values["mask"])
        if values.get("colours") is not None:
            colours = dict(values["colours"])
            if colours.get("jitter") is not None:
                colours["jitter"] = tuple(colours["jitter"])
            values["colours"] = Colours(**colours)
        if isinstance(values.get("size"), Sequence):
            values["size"] = tuple(values["size"])
        return cls(**{**values, "augment": values.get("augment") or {}})

    def side(self, image_size: int | tuple[int, int]) -> int | tuple[int, int]:
        """Return the side, or (height, width), of these views for data of that image size."""
        if self.share is None:
            return image_size if self.size is None else self.size
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        height, width = (max(1, round(self.share * side / MULTIPLE)) * MULTIPLE for side in sides)
        return height, width


class Shape(NamedTuple):
    """Shape of a view.

    Attributes:
        size: (height, width) in pixels.
        grid: rows and columns of the mask; (0, 0) without a mask.
        masked: number of masked patches in each image.
    """

    size: tuple[int, int]
    grid: tuple[int, int]
    masked: int


class ViewTransform:
    """Draw the views of a sample.

    The sample's `image`, uint8 (H, W, 3), is replaced by `views`, a list of dicts: in each, `image` is uint8 (h, w, C)
    and, for a view with a mask, `mask` is bool (rows, columns), True where a patch is masked.

    Args:
        views: kinds of views, in their order.
        augment: the recipe's augmentation.
        image_size: side, or (height, width), of the views that name no size.
        flip: whether images may be mirrored. If not, hflip and vflip are not applied.
        mean: mean of each channel, which fills pixels that a shift uncovers.
        in_chans: number of channels.
        bands: whether images are bands in the files' units.
        mask_patch: function from the shorter side of an image to the side of a mask's patch by default.

    Attributes:
        shapes: shape of each view, in the order of the views.

    Raises:
        ValueError: if an augmentation or a mask is not possible.
    """

    def __init__(
        self,
        views: Sequence[View],
        augment: Mapping[str, Any],
        image_size: int | tuple[int, int],
        *,
        flip: bool,
        mean: tuple[float, ...],
        in_chans: int,
        bands: bool,
        mask_patch: Callable[[int], int],
    ):
        transform = BandTrainTransform if bands else TrainTransform
        self.transforms: list[TrainTransform] = []
        self.colours: list[Colours | None] = []
        self.shapes: list[Shape] = []
        for view in views:
            if view.colours is not None and bands:
                raise ValueError("a view's colours are for images of 1 or 3 channels, not for bands")
            config = {**augment, **view.augment} | ({} if flip else {"hflip": 0.0, "vflip": 0.0})
            crop = transform(Augment.from_config(config), view.side(image_size), mean=mean, in_chans=in_chans)
            grid = (0, 0) if view.mask is None else view.mask.grid(crop.size, mask_patch)
            masked = 0 if view.mask is None else math.ceil(view.mask.ratio * grid[0] * grid[1])
            self.transforms += [crop] * view.number
            self.colours += [view.colours] * view.number
            self.shapes += [Shape(crop.size, grid, masked)] * view.number

    def __call__(self, sample: dict) -> dict:
        views = []
        for transform, colours, shape in zip(self.transforms, self.colours, self.shapes, strict=True):
            view = transform({"image": sample["image"]})
            if colours is not None:
                view["image"] = colours(view["image"])
            views.append(view | {"mask": draw_mask(shape.grid, shape.masked)} if shape.masked else view)
        return {key: value for key, value in sample.items() if key != "image"} | {"views": views}


def draw_mask(grid: tuple[int, int], masked: int) -> np.ndarray:
    """Return a mask, bool `grid`, that is True at `masked` random places."""
    mask = np.zeros(grid, bool)
    mask.flat[np.random.permutation(mask.size)[:masked]] = True
    return mask


def stack_views(samples: Sequence[dict]) -> dict:
    """Join samples with `views` to one batch, whose `views` are batches too (`datamodules.loader.stack`)."""
    views = [stack(views) for views in zip(*(sample["views"] for sample in samples), strict=True)]
    return stack([{key: sample[key] for key in sample if key != "views"} for sample in samples]) | {"views": views}
