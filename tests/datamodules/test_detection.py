"""Data in COCO's format as batches: objects, every form of mask, crowds, and errors in the files."""

import json
import logging
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pytorch_lightning.utilities import move_data_to_device

from datamodules.coco import Coco
from datamodules.coco_format import index_coco
from retinue.utils.paths import CONF

PATHS = {
    "train_annotations": "annotations/instances_train2017.json",
    "train_images": "train2017",
    "val_annotations": "annotations/instances_val2017.json",
    "val_images": "val2017",
}
HEIGHT, WIDTH = 60, 90
AUGMENT = {"sizes": [[48, 96], [64, 96]], "detr_crop": True, "hflip": 0.5, "photometric": True}
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 90, "name": "kite"}]


def rectangle(x, y, w, h):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    return mask


def polygon(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def compressed(mask):
    code = rle.encode(mask)
    counts: Any = code["counts"]  # bytes
    return {"size": code["size"], "counts": counts.decode()}


def uncompressed(mask):
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": counts if flat[0] == 0 else [0, *counts]}


def annotation(id, image_id, category_id, box, segmentation, **more):
    return {
        "id": id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [float(side) for side in box],
        "area": float(box[2] * box[3]),
        "iscrowd": 0,
        "segmentation": segmentation,
    } | more


def content():
    """Return five images.

    12 has an object with each form of mask, 5 has a crowd and invalid boxes, 9 is empty, 30 and 31 have one object
    each.
    """
    box = (10, 20, 30, 25)
    crowd = annotation(41, 5, 3, (40, 5, 20, 20), uncompressed(rectangle(40, 5, 20, 20)), iscrowd=1)
    annotations = [
        annotation(10, 12, 90, box, polygon(*box)),
        annotation(11, 12, 3, (50, 0, 40, 12), compressed(rectangle(50, 0, 40, 12))),
        crowd,
        annotation(12, 12, 7, (0, 40, 9, 20), uncompressed(rectangle(0, 40, 9, 20))),
        annotation(42, 5, 3, (5, 5, 12, 14), polygon(5, 5, 12, 14)),
        annotation(43, 5, 3, (80, 50, 20, 30), polygon(80, 50, 20, 30)),  # half outside
        annotation(44, 5, 3, (200, 50, 20, 30), polygon(200, 50, 20, 30)),  # outside
        annotation(45, 5, 3, (20, 30, 0.5, 10), polygon(20, 30, 0.5, 10)),  # thin
        annotation(51, 30, 7, (3, 4, 50, 40), polygon(3, 4, 50, 40)),
        annotation(52, 31, 7, (30, 4, 50, 40), polygon(30, 4, 50, 40)),
    ]
    images = [{"id": id, "file_name": f"{id:06d}.png", "height": HEIGHT, "width": WIDTH} for id in (12, 5, 9, 30, 31)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": list(map(dict, CATEGORIES))}


def write(root, train, val=None, images=True):
    (root / "annotations").mkdir(exist_ok=True)
    for split, truth in (("train2017", train), ("val2017", val or content())):
        (root / split).mkdir(exist_ok=True)
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(truth))
        for image in content()["images"] if images else []:
            pixels = np.random.default_rng(image["id"]).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
            Image.fromarray(pixels).save(root / split / image["file_name"])
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write(tmp_path_factory.mktemp("coco"), content())


def make_data(root, **kwargs):
    usual: dict[str, Any] = {"root": str(root), "image_size": [60, 90], "batch_size": 2, "num_workers": 0}
    usual |= {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    return Coco(**usual | PATHS | kwargs)


def equal(a, b):
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(*pair) for pair in zip(a, b, strict=True))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_a_training_sample_has_every_form_of_mask(root):
    images = make_data(root).images("train")
    assert images.ids.tolist() == [12, 5, 30, 31]
    sample = images[0]
    assert sample["image"].shape == (HEIGHT, WIDTH, 3)
    assert sample["boxes"].tolist() == [[10, 20, 40, 45], [50, 0, 90, 12], [0, 40, 9, 60]]
    assert sample["labels"].tolist() == [2, 0, 1]
    assert sample["ignored"].shape == (0, 4)
    expected = [rectangle(10, 20, 30, 25), rectangle(50, 0, 40, 12), rectangle(0, 40, 9, 20)]
    assert np.array_equal(sample["masks"], expected)


def test_crowds_are_ignored_and_boxes_without_area_dropped(root, caplog):
    with caplog.at_level(logging.WARNING):
        sample = make_data(root).images("train")[1]
    assert "2 of 10 boxes have less than 1 px inside their image" in caplog.text
    assert sample["ignored"].tolist() == [[40, 5, 60, 25]]
    assert sample["boxes"].tolist() == [[5, 5, 17, 19], [80, 50, 90, 60]]
    assert sample["labels"].tolist() == [0, 0]
    assert sample["masks"].sum((1, 2)).tolist() == [12 * 14, 10 * 10]


def test_images_without_objects_are_trained_on_with_keep_empty(root):
    images = make_data(root, keep_empty=True).images("train")
    assert images.ids.tolist() == [12, 5, 9, 30, 31]
    assert images[2]["boxes"].shape == (0, 4)
    data = make_data(root, keep_empty=True, batch_size=5, augment=AUGMENT)
    batch = next(iter(data.train_dataloader()))
    empty = batch["index"].tolist().index(2)
    assert len(batch["boxes"][empty]) == len(batch["masks"][empty]) == 0


def test_the_ground_truth_equals_the_file(root):
    data = make_data(root)
    images, truth = data.images("val"), data.images("val").truth
    expected = content()
    assert [data.images(split).ids.tolist() for split in ("val", "test")] == [[12, 5, 9, 30, 31]] * 2
    assert truth["images"] == expected["images"]
    by_id = {row["id"]: row for row in truth["annotations"]}
    assert by_id == {row["id"]: row for row in expected["annotations"]}
    assert truth["categories"] == sorted(CATEGORIES, key=lambda category: category["id"])
    assert list(data.class_names) == ["dog", "cat", "kite"]
    assert data.category_ids == [3, 7, 90]
    assert data.has_masks
    assert images.name(1) == "000005.png"

    coco = COCO(root / PATHS["val_annotations"])
    rows = [row for row in by_id.values() if row["image_id"] == 12]
    masks = images.index.masks(0, np.arange(3))
    assert all(np.array_equal(mask, coco.annToMask(row)) for mask, row in zip(masks, rows, strict=True))


def test_training_batch(root):
    data = make_data(root, batch_size=4, augment=AUGMENT)
    loaded = next(iter(data.train_dataloader()))
    batch = data.on_after_batch_transfer(dict(loaded), 0)
    image, sizes = batch["image"], batch["sizes"]
    assert image.dtype == torch.float32
    assert image.shape[0] == 4
    assert image.shape[2] % 32 == image.shape[3] % 32 == 0
    assert isinstance(batch["seed"], int)
    assert sorted(batch["index"].tolist()) == [0, 1, 2, 3]
    for i, (height, width) in enumerate(sizes.tolist()):
        assert batch["boxes"][i].dtype == batch["ignored"][i].dtype == torch.float32
        assert batch["labels"][i].dtype == torch.int64
        assert batch["masks"][i].dtype == torch.uint8
        assert batch["masks"][i].shape == (len(batch["boxes"][i]), height, width)
        assert image[i, :, height:].abs().sum() == image[i, :, :, width:].abs().sum() == 0
        raw = loaded["image"][i, :, :height, :width].float() / 255
        mean, std = torch.tensor(data.mean)[:, None, None], torch.tensor(data.std)[:, None, None]
        torch.testing.assert_close(image[i, :, :height, :width], (raw - mean) / std)


def test_batches_do_not_depend_on_workers(root):
    epochs = []
    for workers in (0, 2):
        loader = make_data(root, augment=AUGMENT, num_workers=workers).train_dataloader()
        epochs.append([])
        for epoch in range(2):
            loader.set_epoch(epoch)
            epochs[-1] += list(loader)
    assert len(epochs[0]) == 4
    assert all(a.keys() == b.keys() for a, b in zip(*epochs, strict=True))
    assert all(equal(a[key], b[key]) for a, b in zip(*epochs, strict=True) for key in a)
    plan = next(iter(loader.sampler))
    # A spawned worker unpickles the data set.
    fetched = pickle.loads(pickle.dumps(loader.dataset))[plan]
    assert equal(fetched["masks"], loader.dataset[plan]["masks"])


def test_batches_hold_portrait_or_landscape_images_only(tmp_path):
    truth = content()
    truth["annotations"] = [annotation(i, i, 7, (3, 4, 20, 30), polygon(3, 4, 20, 30)) for i in range(12)]
    sizes = [(WIDTH, HEIGHT) if i % 3 == 0 else (HEIGHT, WIDTH) for i in range(12)]
    truth["images"] = [{"id": i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in enumerate(sizes)]
    write(tmp_path, truth)
    for i, size in enumerate(sizes):
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(tmp_path / f"train2017/{i}.png")
    loader = make_data(tmp_path, image_size=[60, 120]).train_dataloader()
    assert sorted(tuple(batch["image"].shape[2:]) for batch in loader) == [(64, 96)] * 4 + [(96, 64)] * 2


def test_repeat_factors_follow_the_rarest_class_of_an_image(root):
    data = make_data(root, sampler="repeat_factor", repeat_threshold=1.0)
    loader = data.train_dataloader()
    assert [data.images("train").index.ids[i] for i in range(4)] == [12, 5, 30, 31]
    # A kite is in one of four images, a dog in two, and a cat in three.
    assert loader.sampler.factors is not None
    np.testing.assert_allclose(loader.sampler.factors, [2, 2**0.5, (4 / 3) ** 0.5, (4 / 3) ** 0.5])
    assert make_data(root).train_dataloader().sampler.factors is None
    with pytest.raises(ValueError, match=r"data\.sampler must be repeat_factor or null, not 'balanced'"):
        make_data(root, sampler="balanced")


def test_evaluation_batches(root):
    data = make_data(root, image_size=[90, 200], batch_size=3)
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == [0, 1, 2, 3, 4]
    assert batches[0]["sizes"].tolist() == [[90, 135]] * 3
    assert batches[0]["original_sizes"].tolist() == [[HEIGHT, WIDTH]] * 3
    assert batches[0]["image"].shape == (3, 3, 96, 160)
    assert batches[0].keys() == {"image", "sizes", "original_sizes", "index"}


def test_lists_are_moved_to_a_device(root):
    batch = next(iter(make_data(root).train_dataloader()))
    moved = move_data_to_device(batch, torch.device("meta"))
    assert all(tensor.is_meta for key in ("boxes", "labels", "masks", "ignored") for tensor in moved[key])


def test_no_mirroring_if_mirrored_objects_have_other_classes(root):
    assert make_data(root, augment=AUGMENT, flip=False).train_transform.augment.hflip == 0
    assert make_data(root, augment=AUGMENT).train_transform.augment.hflip == 0.5


def test_data_without_masks(tmp_path, caplog):
    truth = content()
    for row in truth["annotations"]:
        del row["segmentation"], row["area"], row["iscrowd"]
    write(tmp_path, truth, truth)
    data = make_data(tmp_path)
    assert not data.has_masks
    assert "masks" not in next(iter(data.train_dataloader()))
    assert data.images("val").truth["annotations"][0]["area"] == 30 * 25
    mixed = [truth["annotations"][0], *content()["annotations"][1:]]
    (tmp_path / "mixed.json").write_text(json.dumps(content() | {"annotations": mixed}))
    with caplog.at_level(logging.WARNING):
        assert not make_data(tmp_path, val_annotations="mixed.json").has_masks
    assert "masks are not used, because 1 of 10 annotations have none" in caplog.text


def edit(part, at, **values):
    def change(truth):
        truth[part][at] |= values

    return change


def drop(part, at, key):
    return lambda truth: truth[part][at].pop(key)


def outside(truth):
    for row in truth["annotations"]:
        row["bbox"][0] = 500


def all_crowds(truth):
    for row in truth["annotations"]:
        row["iscrowd"] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda truth: truth.pop("annotations"), "is not a COCO file with boxes: expected lists called images"),
        (lambda truth: truth.update(images=[]), "images is empty"),
        (lambda truth: truth.update(annotations=[]), "annotations is empty"),
        (edit("annotations", 3, category_id=8), "annotations[3] (id 12) has 'category_id' 8, which is not a category"),
        (edit("annotations", 3, image_id=99), "annotations[3] (id 12) has 'image_id' 99, which is not an image"),
        (edit("annotations", 1, bbox=[1, 2, 3]), "annotations[1] (id 11) has the bbox [1, 2, 3]: expected [x, y, w"),
        (edit("annotations", 1, bbox=[1, 2, 3, float("nan")]), "(id 11) has the bbox [1, 2, 3, nan]"),
        (edit("annotations", 1, area="big"), "annotations: 'area' must be a number, not 'big'"),
        (edit("annotations", 1, id=12), "annotations: 'id' 12 occurs 2 times"),
        (edit("images", 1, id=12), "images: 'id' 12 occurs 2 times"),
        (edit("images", 1, id="5"), "images: 'id' must be a whole number, not '5'"),
        (edit("images", 4, file_name="other.png"), "1 of 5 images of"),
        (edit("images", 4, height=0), "image 31 has no height or no width"),
        (drop("images", 2, "file_name"), "images[2] has no 'file_name'"),
        (drop("annotations", 2, "bbox"), "annotations[2] has no 'bbox'"),
        (edit("categories", 0, name="lion"), "category 7, 'cat', of"),
        (drop("annotations", 2, "segmentation"), "has masks, but annotations of"),
        (outside, "none of the 10 boxes [x, y, width, height] lies inside its image"),
        (all_crowds, "has no box to train on"),
    ],
)
def test_errors_in_a_file_are_one_line(root, tmp_path, change, message):
    truth = content()
    change(truth)
    write(tmp_path, truth, images=False)
    data = make_data(tmp_path, train_images=str(root / "train2017"), val_images=str(root / "val2017"))
    with pytest.raises(ValueError) as error:
        data.images("train")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_broken_files(root, tmp_path):
    write(tmp_path, content(), images=False)
    (tmp_path / "broken.json").write_text("{'images': ")
    for arguments, message in (
        ({"val_annotations": "broken.json"}, "broken.json is not a JSON file: "),
        ({"val_annotations": "nowhere.json"}, "data.val_annotations: there is no file"),
        ({"val_annotations": None}, "data.val_annotations is needed"),
        ({"val_images": "nowhere"}, "data.val_images: there is no folder"),
        ({}, f"5 of 5 images of {tmp_path / PATHS['val_annotations']} are missing, like"),
    ):
        with pytest.raises(ValueError) as error:
            make_data(tmp_path, **arguments).images("val")
        assert message in str(error.value)
    for size in (512, [1333, 800], [0, 5], [1, 2, 3]):
        with pytest.raises(ValueError, match=r"data.image_size must be \[short, long\]"):
            make_data(root, image_size=size)


def test_a_mask_or_image_of_another_size_is_reported_when_read(root, tmp_path):
    truth = content()
    truth["annotations"][1]["segmentation"]["size"] = [WIDTH, HEIGHT]
    truth["images"][1]["width"] = WIDTH + 1
    write(tmp_path, truth, truth)
    images = make_data(tmp_path).images("train")
    garbage = content()
    garbage["annotations"][1]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": "garbage"}
    with pytest.raises(ValueError, match=r"set: annotation 11 has a mask that cannot be read: Invalid RLE"):
        index = index_coco(garbage, "set")
        index.masks(0, np.flatnonzero(index.image_index == 0))
    with pytest.raises(ValueError, match=r"annotation 11 has a mask that cannot be read: its size is \[90, 60\]"):
        images[0]
    with pytest.raises(ValueError, match=r"000005\.png is 90 x 60 px, but 91 x 60 in"):
        images[1]


def test_a_broken_image_is_replaced(root, tmp_path):
    write(tmp_path, content())
    (tmp_path / "train2017/000012.png").write_bytes(b"no image")
    (tmp_path / "val2017/000012.png").write_bytes(b"no image")
    data = make_data(tmp_path, batch_size=4, broken_limit=0.5)
    assert data.train_dataloader().broken_limit == 0.5
    assert 0 not in next(iter(data.train_dataloader()))["index"]
    assert next(iter(data.val_dataloader()))["index"].tolist() == [-1, 1, 2, 3]


@pytest.mark.parametrize("name", ["coco", "coco_json", "voc", "pidray"])
def test_the_config_files_fit_their_classes(root, name):
    config: Any = OmegaConf.to_container(OmegaConf.load(CONF / "data" / f"{name}.yaml").data)
    config |= config.pop("own")
    assert (config.pop("name"), config.pop("task"), config.pop("kind")) == (name, "detection", "coco")
    data = instantiate(config, root=str(root), _convert_="all")
    assert data.splits == ("train", "val")
    if name == "coco":
        assert (len(data.images("train")), len(data.images("val"))) == (4, 5)
