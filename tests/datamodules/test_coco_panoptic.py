"""Panoptic data in COCO's format: segments become the objects of a detection data set, and errors are one line."""

import json

import numpy as np
import pytest
from PIL import Image

from datamodules.coco_panoptic import CocoPanoptic
from tests.panoptic_folder import NAMES, write_panoptic

PATHS = {
    f"{split}_{kind}": path
    for split in ("train", "val")
    for kind, path in (("annotations", f"annotations/panoptic_{split}2017.json"), ("images", f"{split}2017"))
}


@pytest.fixture
def folder(tmp_path):
    write_panoptic(tmp_path, {"train": 4, "val": 2})
    return tmp_path


def data(folder, **args):
    return CocoPanoptic(root=str(folder), image_size=(60, 90), batch_size=2, num_workers=0, **PATHS, **args)


def test_the_things_come_first_and_samples_have_all_segments_but_crowds(folder):
    module = data(folder)
    assert module.class_names == NAMES and module.category_ids == [5, 9, 2, 11] and module.num_things == 2
    content = json.loads((folder / "annotations/panoptic_train2017.json").read_text())
    annotations, images = {row["image_id"]: row for row in content["annotations"]}, module.images("train")
    crowds = 0
    for i in range(len(images)):
        sample, annotation = images[i], annotations[int(images.ids[i])]
        colours = np.asarray(Image.open(folder / "annotations/panoptic_train2017" / annotation["file_name"])).astype(
            int
        )
        ids = colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2]
        objects = [segment for segment in annotation["segments_info"] if not segment["iscrowd"]]
        crowds += len(annotation["segments_info"]) - len(objects)
        assert sample["labels"].tolist() == [module.category_ids.index(s["category_id"]) for s in objects]
        for segment, mask, (x1, y1, x2, y2) in zip(objects, sample["masks"], sample["boxes"], strict=True):
            np.testing.assert_array_equal(mask, ids == segment["id"])
            assert [x1, y1, x2 - x1, y2 - y1] == segment["bbox"]
        assert len(sample["ignored"]) == len(annotation["segments_info"]) - len(objects)
        np.testing.assert_array_equal(images.index.segment_map(i), ids)
    assert crowds > 0
    batch = next(iter(module.train_dataloader()))
    assert [len(labels) for labels in batch["labels"]] == [len(masks) for masks in batch["masks"]]


def test_a_selection_keeps_the_segments_of_its_images(folder):
    index = data(folder).images("train").index
    chosen = index.select(np.array([False, True, False, True]))
    for new, old in enumerate((1, 3)):
        np.testing.assert_array_equal(chosen.segment_map(new), index.segment_map(old))
        rows, old_rows = (range(*part.starts[i : i + 2]) for part, i in ((chosen, new), (index, old)))
        np.testing.assert_array_equal(chosen.masks(new, [*rows]), index.masks(old, [*old_rows]))


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content["categories"][0].pop("isthing"), "not a panoptic COCO file.*there is no 'isthing'"),
        (lambda content: content["annotations"][0].pop("segments_info"), "there is no 'segments_info'"),
        (lambda content: content["annotations"].pop(), "image 100 has no annotation"),
        (lambda content: content["annotations"][0]["segments_info"][0].pop("bbox"), "has no 'bbox'"),
        (
            lambda content: content["annotations"][0].update(file_name="no.png"),
            "1 of 4 images of .* missing, like .*no",
        ),
        (lambda content: content["categories"][0].update(isthing=1), "other categories, or other things, than"),
    ],
)
def test_wrong_files_are_one_line(folder, edit, message):
    change(folder / "annotations/panoptic_train2017.json", edit)
    with pytest.raises(ValueError, match=message):
        data(folder).images("train")


def test_a_map_of_another_size_is_an_error(folder):
    path = folder / "annotations/panoptic_train2017/001.png"
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(path)
    images = data(folder).images("train")
    with pytest.raises(ValueError, match=r"001\.png must be an RGB image of 84 x 60 px: it is \(60, 80, 3\)"):
        images[1]
