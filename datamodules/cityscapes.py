"""Cityscapes (Cordts et al., arXiv:1604.01685) with fine annotations: 2,975 / 500 images of streets, 19 classes."""

from collections.abc import Sequence

from datamodules.images import list_images
from datamodules.segmentation import MaskedImages, SegmentationData, pair_files
from retinue.utils.masks import IGNORED

# Names of the evaluated classes by their value in *_labelIds.png, in the order of the labels.
# Source: github.com/mcordts/cityscapesScripts.
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
# Endings of the file names before their suffix.
IMAGE_END = "_leftImg8bit"
IDS_END, TRAIN_IDS_END = "_gtFine_labelIds", "_gtFine_labelTrainIds"


class Cityscapes(SegmentationData):
    """Cityscapes in the layout of its archives.

    The images are `root`/leftImg8bit/{train,val}/<city>/*_leftImg8bit.png and the masks
    `root`/gtFine/{train,val}/<city>/*_labelIds.png, or *_labelTrainIds.png if a split has no *_labelIds.png. Classes
    that are not evaluated are ignored. The test split is the validation split, because the labels of the test set are
    not public.
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
