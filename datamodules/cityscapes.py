"""Cityscapes (Cordts et al., arXiv:1604.01685), fine annotations: 2,975 / 500 images of streets, 19 classes."""

from collections.abc import Sequence

from datamodules.images import list_images
from datamodules.segmentation import MaskedImages, SegmentationData, pair_files
from retinue.utils.masks import IGNORED

# The classes that are evaluated, in label order, by the ids of *_labelIds.png (github.com/mcordts/cityscapesScripts).
CLASSES = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
IMAGE_END = "_leftImg8bit"
IDS_END, TRAIN_IDS_END = "_gtFine_labelIds", "_gtFine_labelTrainIds"


class Cityscapes(SegmentationData):
    """`root` with leftImg8bit/{train,val}/<city>/*_leftImg8bit.png and gtFine/{train,val}/<city>/*_labelIds.png, as
    downloaded; or *_labelTrainIds.png where a split has only those.

    Classes that are not evaluated are ignored. The test split is the validation split: the test set's labels are not
    public.
    """

    class_names = tuple(CLASSES.values())

    @property
    def splits(self) -> Sequence[str]:
        return ("train", "val")

    def load(self, split: str) -> MaskedImages:
        assert self.root is not None
        images, masks = self.root / "leftImg8bit" / split, self.root / "gtFine" / split
        if any(name.endswith(IDS_END + ".png") for name in list_images(masks)):
            values = dict.fromkeys(range(34), IGNORED) | {value: label for label, value in enumerate(CLASSES)}
            return MaskedImages(images, masks, pair_files(images, masks, IMAGE_END, IDS_END), values)
        values = {label: label for label in range(len(CLASSES))}
        return MaskedImages(images, masks, pair_files(images, masks, IMAGE_END, TRAIN_IDS_END), values)
