"""The embedded scenes: both kinds of truth agree, nothing leaks between splits, and they are written whole or not."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datamodules import scenes
from datamodules.base import SPLITS
from datamodules.decode import decode
from datamodules.scenes import Scenes, ScenesSegmentation, make_scene, semantic_mask, write_scenes
from scripts import make_scenes

COUNTS = {"train": 12, "val": 3, "test": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "out"
    make_scenes.main([f"out={out}", *(f"{split}={count}" for split, count in COUNTS.items())])
    return out


@pytest.mark.parametrize("split", SPLITS)
def test_both_kinds_of_truth_agree(folder, split):
    truth = json.loads((folder / f"annotations/instances_{split}.json").read_text())
    assert len(truth["images"]) == COUNTS[split]
    assert len({annotation["id"] for annotation in truth["annotations"]}) == len(truth["annotations"]) > COUNTS[split]
    for position, image in enumerate(truth["images"]):
        scene = make_scene(split, position)
        read = decode((folder / f"images/{split}/{image['file_name']}").read_bytes()).astype(float)
        assert np.abs(read - scene.image).mean() < 2  # the file is a JPEG
        stem = image["file_name"].removesuffix(".jpg")
        semantic = np.array(Image.open(folder / f"masks/{split}/{stem}.png"))
        assert semantic.shape == (image["height"], image["width"])
        covered = np.zeros(semantic.shape, int)
        for annotation in truth["annotations"]:
            if annotation["image_id"] != image["id"]:
                continue
            mask = rle.decode(annotation["segmentation"]).astype(bool)
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            assert annotation["bbox"] == [left, top, right - left, bottom - top]
            assert annotation["area"] == mask.sum()
            assert set(semantic[mask]) == {255 if annotation["iscrowd"] else annotation["category_id"]}
            covered += mask
        assert covered.max() == 1
        np.testing.assert_array_equal(covered == 0, semantic == 0)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_truth_itself_scores_one(folder, kind):
    truth = COCO(str(folder / "annotations/instances_train.json"))
    clear = [annotation | {"score": 0.9} for annotation in truth.dataset["annotations"] if not annotation["iscrowd"]]
    evaluation = COCOeval(truth, truth.loadRes(clear), kind)  # pyright: ignore[reportArgumentType]: it takes lists
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, 2]  # of digits of all sizes, 100 an image
    assert (precision == 1).all()


def test_unclear_digits_are_those_of_which_little_is_seen():
    unclear, clear = [], []
    for index in range(60):
        scene = make_scene("train", index)
        seen = np.bincount(scene.instances.ravel(), minlength=len(scene.labels) + 1)[1:]
        unclear += seen[scene.unclear].tolist()
        clear += seen[~scene.unclear].tolist()
        assert {255} >= set(semantic_mask(scene)[np.isin(scene.instances, np.flatnonzero(scene.unclear) + 1)])
    assert min(clear) >= scenes.LEAST_PIXELS
    assert 0 < len(unclear) < 0.05 * len(clear)


def test_splits_share_neither_digits_nor_photos():
    digits = [scenes._materials(split)[1] for split in SPLITS]
    assert len({digit.tobytes() for part in digits for digit in part}) == sum(map(len, digits))
    spans = sorted(scenes.COLUMNS.values())
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    for split, (left, right) in scenes.COLUMNS.items():
        assert {photo.shape for photo in scenes._materials(split)[0]} == {(427, right - left, 3)}


def test_a_scene_follows_from_seed_split_and_position():
    first, again = make_scene("train", 3), make_scene("train", 3)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    others = [make_scene("train", 4), make_scene("val", 3), make_scene("train", 3, seed=1)]
    assert not any(np.array_equal(first.image, other.image) for other in others)


def test_the_scenes_of_this_version_are_these():
    """Where this fails because scenes are meant to change, `VERSION` goes up: caches have the former ones."""
    truth = [semantic_mask(make_scene(split, index)) for split in SPLITS for index in range(4)]
    digest = hashlib.sha256(np.stack(truth).tobytes()).hexdigest()[:16]
    assert (scenes.VERSION, digest) == (2, "9a721d51167ca754")


def test_written_once_by_however_many(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(scenes, "COUNTS", COUNTS)
    scenes._materials("train")  # not by two threads at once
    with ThreadPoolExecutor(3) as pool:
        found = {future.result() for future in [pool.submit(scenes.find_scenes) for _ in range(3)]}
    assert found == {tmp_path / "retinue" / "scenes-2"}
    assert [entry.name for entry in (tmp_path / "retinue").iterdir()] == ["scenes-2"]
    before = {path: path.stat().st_mtime_ns for path in found.pop().rglob("*")}
    assert scenes.find_scenes().is_dir()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_nothing_is_left_of_scenes_that_fail(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(scenes, "COUNTS", COUNTS)
    monkeypatch.setattr(scenes, "coco_annotations", full)
    with pytest.raises(
        ValueError, match=r"^the scenes cannot be written to .*scenes-2 \(No space left on device\): set"
    ):
        scenes.find_scenes()
    assert not list((tmp_path / "retinue").iterdir())


def test_another_seed_makes_other_scenes(tmp_path, folder):
    write_scenes(tmp_path / "other", COUNTS, seed=1)
    name = "masks/val/00000.png"
    assert (tmp_path / "other" / name).read_bytes() != (folder / name).read_bytes()


@pytest.mark.parametrize(
    "arguments, message",
    [([], "is there already; name a new folder"), (["val=0"], "val must be greater than or equal to 1, not 0")],
)
def test_script_refuses(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_scenes.main([f"out={tmp_path}", *arguments])


def test_segmentation_reads_them(folder):
    data = ScenesSegmentation(root=str(folder), image_size=(256, 320), batch_size=2)
    assert data.num_classes == 11
    assert {split: len(data.images(split)) for split in SPLITS} == COUNTS
    np.testing.assert_array_equal(data.images("val")[2]["mask"], semantic_mask(make_scene("val", 2)))


def test_detection_reads_them(folder):
    data = Scenes(
        root=str(folder), image_size=(256, 320), batch_size=2, num_workers=0, augment={"hflip": 1.0}, flip=False
    )
    assert (data.class_names, data.category_ids, data.has_masks) == (list("0123456789"), list(range(1, 11)), True)
    batch = next(iter(data.train_dataloader()))
    for place, index in enumerate(batch["index"].tolist()):
        scene = make_scene("train", index)
        shown = np.isin(np.arange(len(scene.labels)) + 1, scene.instances)
        clear = shown & ~scene.unclear
        assert batch["labels"][place].tolist() == scene.labels[clear].tolist()
        assert len(batch["ignored"][place]) == (shown & scene.unclear).sum()
        expected = scene.instances == np.flatnonzero(clear)[:, None, None] + 1
        np.testing.assert_array_equal(batch["masks"][place], expected)
