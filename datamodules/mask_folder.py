"""Any folder of images and any folder of PNG masks."""

from collections.abc import Sequence
from typing import Any

from datamodules.base import SPLITS
from datamodules.mask_checks import check_masks
from datamodules.segmentation import MaskedImages, SegmentationData, pair_files
from retinue.utils.masks import IGNORED


class MaskFolder(SegmentationData):
    """Images in `root`/images/{train,val[,test]}/** and masks in `root`/masks/{train,val[,test]}/**.

    An image and its mask have the same path but for the suffix. A mask is a PNG with one channel or with a palette,
    whose values are the classes 0 to K - 1, or `values`; 255 is ignored unless it is the value of a class. Without a
    test folder, the test split is the validation split.

    Args:
        classes: names of the classes, by value, or the number of classes.
        values: mask value of each class, such as [0, 255]. None numbers them from 0.
        ignore: further values that are ignored.
        background_ignored: whether the value 0 is ignored and the classes are 1 to K.
        common: arguments of `DensePredictionData`.

    Raises:
        ValueError: if an argument is invalid.
    """

    def __init__(
        self,
        *,
        classes: int | Sequence[str] | None = None,
        values: Sequence[int] | None = None,
        ignore: Sequence[int] = (),
        background_ignored: bool = False,
        **common: Any,
    ):
        super().__init__(**common)
        if not isinstance(classes, int | list | tuple):
            given = "" if classes is None else f", not {classes!r}"
            raise ValueError(f"the masks' classes are needed: data.classes=[NAME, ...] or data.classes=COUNT{given}")
        if not (isinstance(ignore, list | tuple) and all(isinstance(value, int) for value in ignore)):
            raise ValueError(f"data.ignore must be a list of mask values, like [3], not {ignore!r}")
        names = [str(i) for i in range(classes)] if isinstance(classes, int) else [str(name) for name in classes]
        first = int(background_ignored)
        if not 1 <= len(names) <= IGNORED - first:
            raise ValueError(f"data.classes must be 1 to {IGNORED - first} classes, not {len(names)}")
        if len(set(names)) < len(names):
            raise ValueError(f"data.classes names {max(names, key=names.count)!r} twice")
        self.class_names = names
        if values is None:
            values = range(first, first + len(names))
        elif background_ignored:
            raise ValueError("data.values names the classes' mask values: data.ignore=[0], not data.background_ignored")
        elif not (
            isinstance(values, list | tuple)
            and all(isinstance(value, int) and 0 <= value <= 255 for value in values)
            and len(set(values)) == len(values) == len(names)
        ):
            raise ValueError(f"data.values must be {len(names)} different mask values from 0 to 255, not {values!r}")
        self.values = {value: label for label, value in enumerate(values)}
        self.background = self.values.get(0) if len(names) > 1 else None
        ignored_values = [0, *ignore] if background_ignored else ignore
        for value in ignored_values:
            if value in self.values:
                raise ValueError(f"data.ignore has {value}, the mask value of class {names[self.values[value]]!r}")
            if not 0 <= value <= 255:
                raise ValueError(f"data.ignore takes mask values from 0 to 255, not {value}")
            self.values[value] = IGNORED

    @property
    def splits(self) -> Sequence[str]:
        assert self.root is not None
        return SPLITS if (self.root / "masks" / "test").is_dir() else SPLITS[:2]

    def load(self, split: str) -> MaskedImages:
        assert self.root is not None
        folders = self.root / "images" / split, self.root / "masks" / split
        images = MaskedImages(*folders, pair_files(*folders), self.values)
        check_masks(images, self.class_names, split)
        return images
