"""VOC's masks: lists of images, palettes, the folder of SBD's masks, agreement with mmsegmentation, and errors."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules.voc import MASK_CLASSES, VOCSegmentation
from models.openmmlab import mmcv_ext

RNG = np.random.default_rng(0)
NAMES = {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"], "aug": ["2008_000008"]}


@pytest.fixture
def root(tmp_path):
    """Write VOC2012 with masks of palette colours; the image in the list aug has its mask in SegmentationClassAug."""
    for folder in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass", "SegmentationClassAug"):
        (tmp_path / folder).mkdir(parents=True)
    for split, names in NAMES.items():
        (tmp_path / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            size = (25, 31)
            pixels = RNG.integers(0, 256, (*size, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"JPEGImages/{name}.jpg")
            mask = Image.fromarray(RNG.choice(np.array([*range(21), 255], np.uint8), size))
            if split != "aug":
                mask.putpalette(RNG.integers(0, 256, 768, np.uint8).tobytes())
            mask.save(tmp_path / f"SegmentationClass{'Aug' if split == 'aug' else ''}/{name}.png")
    return tmp_path


def make_data(root, **kwargs):
    return VOCSegmentation(**{"root": str(root), "image_size": [25, 31], "num_workers": 0} | kwargs)


def test_pixels_are_those_of_mmsegmentation(root):
    mmcv_ext.install()
    from mmseg.datasets import PascalVOCDataset
    from mmseg.datasets.transforms import LoadAnnotations

    data = make_data(root)
    prefix = {"img_path": "JPEGImages", "seg_map_path": "SegmentationClass"}
    load = LoadAnnotations(reduce_zero_label=False, imdecode_backend="pillow")
    for split in ("train", "val"):
        theirs = PascalVOCDataset(f"ImageSets/Segmentation/{split}.txt", data_root=str(root), data_prefix=prefix)
        ours = data.images(split)
        assert len(ours) == len(theirs) == len(NAMES[split])
        assert data.class_names == theirs.metainfo["classes"]
        for i in range(len(ours)):
            entry = theirs.get_data_info(i)
            assert entry["img_path"] == str(root / ours.name(i))
            expected: Any = load(entry)
            np.testing.assert_array_equal(ours[i]["mask"], expected["gt_seg_map"])
    assert data.names("test") == data.names("val")


def test_masks_in_two_folders(root):
    folders = ["SegmentationClass", "SegmentationClassAug"]
    data = make_data(root, train=["train", "aug"], masks=folders, test=["val"])
    assert [name.partition("/")[2] for name in data.names("train")] == [
        f"{name}.jpg" for name in NAMES["train"] + NAMES["aug"]
    ]
    mask = np.array(Image.open(root / "SegmentationClassAug/2008_000008.png"))
    np.testing.assert_array_equal(data.images("train")[2]["mask"], mask)
    assert list(data.splits) == ["train", "val", "test"]


def test_image_sets_of_several_years_and_own_classes(root, tmp_path):
    years = [f"{root.name}/train", f"{root.name}/val"]
    names = [str(i) for i in range(30)]
    data = make_data(tmp_path.parent, train=years, val=years[1:], classes=names)
    assert len(data.images("train")) == 3
    assert data.num_classes == 30 and len(MASK_CLASSES) == 21
    data = make_data(root, classes=names[:20])
    with pytest.raises(ValueError, match=r"png has the value 20: none of the 20 classes, and not ignored"):
        data.images("train")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": "train"}, "data.train must be a list of image sets, like [train], not 'train'"),
        ({"train": ["trian"]}, "no image set is called 'trian' in {root}/ImageSets/Segmentation. Did you mean"),
        ({"train": ["aug"]}, "2008_000008 of {root}/ImageSets/Segmentation/aug.txt has no mask in {root}/Segmentation"),
        ({"train": ["VOC2011/train"]}, "expected the folders of Pascal VOC in {root}/VOC2011"),
        ({"masks": "SegmentationClass"}, "data.masks must be a list of folders, like [SegmentationClass]"),
        ({"masks": ["Masks"]}, "{root}/Masks is missing: expected the folders of Pascal VOC in {root}"),
        ({"classes": ["a", "a"]}, "data.classes names 'a' twice"),
    ],
)  # fmt: skip
def test_errors_are_one_line(root, arguments, message):
    with pytest.raises(ValueError) as error:
        make_data(root, **arguments).images("train")
    assert message.format(root=root) in str(error.value)
    assert "\n" not in str(error.value)
