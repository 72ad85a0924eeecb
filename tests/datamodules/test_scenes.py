"""The embedded scenes: both kinds of ground truth agree, splits share nothing, and writing is all or nothing."""

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
def test_both_kinds_of_ground_truth_agree(folder, split):
    truth = json.loads((folder / f"annotations/instances_{split}.json").read_text())
    assert len(truth["images"]) == COUNTS[split]
    assert len({annotation["id"] for annotation in truth["annotations"]}) == len(truth["annotations"]) > COUNTS[split]
    for position, image in enumerate(truth["images"]):
        scene = make_scene(split, position)
        read = decode((folder / f"images/{split}/{image['file_name']}").read_bytes()).astype(float)
        # The file is a JPEG, which is not exact.
        assert np.abs(read - scene.image).mean() < 2
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
def test_the_ground_truth_itself_scores_one(folder, kind):
    truth = COCO(str(folder / "annotations/instances_train.json"))
    clear = [annotation | {"score": 0.9} for annotation in truth.dataset["annotations"] if not annotation["iscrowd"]]
    evaluation = COCOeval(truth, truth.loadRes(clear), kind)  # pyright: ignore[reportArgumentType]: it takes lists
    evaluation.evaluate()
    evaluation.accumulate()
    # Precision for digits of all sizes and 100 detections per image.
    precision = evaluation.eval["precision"][..., 0, 2]
    assert (precision == 1).all()


def test_unclear_digits_have_a_small_visible_part():
    unclear, clear = [], []
    for index in range(60):
        scene = make_scene("train", index)
        visible_pixels = np.bincount(scene.instances.ravel(), minlength=len(scene.labels) + 1)[1:]
        unclear += visible_pixels[scene.unclear].tolist()
        clear += visible_pixels[~scene.unclear].tolist()
        assert {255} >= set(semantic_mask(scene)[np.isin(scene.instances, np.flatnonzero(scene.unclear) + 1)])
    assert min(clear) >= scenes.MIN_VISIBLE_PIXELS
    assert 0 < len(unclear) < 0.05 * len(clear)


def test_splits_share_neither_digits_nor_photos():
    digits = [scenes._source_images(split)[1] for split in SPLITS]
    assert len({digit.tobytes() for part in digits for digit in part}) == sum(map(len, digits))
    spans = sorted(scenes.PHOTO_COLUMNS.values())
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    for split, (left, right) in scenes.PHOTO_COLUMNS.items():
        assert {photo.shape for photo in scenes._source_images(split)[0]} == {(427, right - left, 3)}


def test_a_scene_depends_on_seed_split_and_position_alone():
    first, again = make_scene("train", 3), make_scene("train", 3)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    others = [make_scene("train", 4), make_scene("val", 3), make_scene("train", 3, seed=1)]
    assert not any(np.array_equal(first.image, other.image) for other in others)


def test_scenes_change_only_with_the_version():
    """To change the scenes, increase `VERSION` too, because users' caches hold the scenes of the old version."""
    truth = [semantic_mask(make_scene(split, index)) for split in SPLITS for index in range(4)]
    digest = hashlib.sha256(np.stack(truth).tobytes()).hexdigest()[:16]
    assert (scenes.VERSION, digest) == (2, "9a721d51167ca754")


def test_scenes_are_written_once_by_several_threads(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(scenes, "COUNTS", COUNTS)
    # The cache of the source images is filled first, so that the threads do not compute them several times.
    scenes._source_images("train")
    with ThreadPoolExecutor(3) as pool:
        folders = {future.result() for future in [pool.submit(scenes.find_scenes) for _ in range(3)]}
    assert folders == {tmp_path / "retinue" / "scenes-2"}
    assert [entry.name for entry in (tmp_path / "retinue").iterdir()] == ["scenes-2"]
    before = {path: path.stat().st_mtime_ns for path in folders.pop().rglob("*")}
    assert scenes.find_scenes().is_dir()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_nothing_remains_of_scenes_that_cannot_be_written(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(scenes, "COUNTS", COUNTS)
    monkeypatch.setattr(scenes, "coco_annotations", fail)
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


def test_segmentation_reads_the_scenes(folder):
    data = ScenesSegmentation(root=str(folder), image_size=(256, 320), batch_size=2)
    assert data.num_classes == 11
    assert {split: len(data.images(split)) for split in SPLITS} == COUNTS
    np.testing.assert_array_equal(data.images("val")[2]["mask"], semantic_mask(make_scene("val", 2)))


def test_detection_reads_the_scenes(folder):
    data = Scenes(
        root=str(folder), image_size=(256, 320), batch_size=2, num_workers=0, augment={"hflip": 1.0}, flip=False
    )
    assert (data.class_names, data.category_ids, data.has_masks) == (list("0123456789"), list(range(1, 11)), True)
    batch = next(iter(data.train_dataloader()))
    for place, index in enumerate(batch["index"].tolist()):
        scene = make_scene("train", index)
        visible = np.isin(np.arange(len(scene.labels)) + 1, scene.instances)
        clear = visible & ~scene.unclear
        assert batch["labels"][place].tolist() == scene.labels[clear].tolist()
        assert len(batch["ignored"][place]) == (visible & scene.unclear).sum()
        expected = scene.instances == np.flatnonzero(clear)[:, None, None] + 1
        np.testing.assert_array_equal(batch["masks"][place], expected)
