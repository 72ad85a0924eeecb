"""Cut the annotated photos of two Python packages into tiles, in folders that `data=` reads.

Tree crowns on aerial photos are from DeepForest (Weinstein et al., doi:10.1111/2041-210X.13472; package deepforest,
MIT). Nuclei of the Data Science Bowl 2018 (Caicedo et al., doi:10.1038/s41592-019-0612-7, BBBC038, public domain) are
from StarDist (Schmidt et al., arXiv:1806.03535; package stardist, BSD 3-Clause).
"""

import csv
import io
import itertools
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from retinue.utils.arithmetic import ceil_div
from retinue.utils.files import write_text

# Photos of trees in each split; no two photos show the same place.
TREE_PHOTOS = {
    "train": ["2019_YELL_2_528000_4978000_image_crop2"],
    "val": ["2019_YELL_2_541000_4977000_image_crop"],
    "test": ["OSBS_029", "SOAP_061"],
}
# Largest side of a tile of trees, and side of a tile of nuclei, in pixels.
TREE_TILE, NUCLEI_TILE = 400, 128
# Smallest share of a box inside a tile for which the tile has the object.
MIN_SHARE = 0.5
SIDES = ("xmin", "ymin", "xmax", "ymax")


def cut(length: int, largest: int) -> list[tuple[int, int]]:
    """Return the (start, end) of the equal parts of a side, which are at most `largest` pixels long."""
    edges = np.linspace(0, length, ceil_div(length, largest) + 1).round().astype(int).tolist()
    return list(itertools.pairwise(edges))


def make_tree_crowns(folder: Path) -> None:
    """Write `images/*.png` and, last, {test,val,train}.csv, with one class, tree.

    A tile has the objects of which at least half is inside, clipped to the tile. All trees have one class, since only
    one photo distinguishes living from dead ones.

    Args:
        folder: folder that holds the photos and their XML files.
    """
    (folder / "images").mkdir(exist_ok=True)
    for split in ("test", "val", "train"):
        rows: list[tuple] = [("image", "x1", "y1", "x2", "y2", "class")]
        for photo in TREE_PHOTOS[split]:
            elements = ElementTree.parse(folder / f"{photo}.xml").getroot().iter("bndbox")
            boxes = np.array([[float(box.findtext(side, "")) for side in SIDES] for box in elements])
            with Image.open(folder / f"{photo}.png") as image:
                pixels = image.convert("RGB")
            for left, right in cut(pixels.width, TREE_TILE):
                for top, bottom in cut(pixels.height, TREE_TILE):
                    name = f"{photo}_{left}_{top}.png"
                    pixels.crop((left, top, right, bottom)).save(folder / "images" / name)
                    tiles = boxes_inside(boxes, left, top, right, bottom).tolist()
                    rows += [(name, *box, "tree") for box in tiles] if tiles else [(name, "", "", "", "", "")]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_text(folder / f"{split}.csv", text.getvalue())


def boxes_inside(boxes: np.ndarray, left: int, top: int, right: int, bottom: int) -> np.ndarray:
    """Return the boxes (N, 4), as (x1, y1, x2, y2), that are half inside a tile, clipped to it and relative to it."""
    clipped = boxes.clip([left, top, left, top], [right, bottom, right, bottom])
    inside = np.prod(clipped[:, 2:] - clipped[:, :2], axis=1)
    share = inside / np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return clipped[share >= MIN_SHARE] - [left, top, left, top]


def make_nuclei(folder: Path) -> None:
    """Write images/{val,train}/*.png and masks/{val,train}/*.png: background 0 and nucleus 1.

    The right quarter of the picture is for validation.

    Args:
        folder: folder that holds img2d.tif and mask2d.tif, a picture with the number of the nucleus at each pixel.
    """
    with Image.open(folder / "img2d.tif") as image, Image.open(folder / "mask2d.tif") as mask:
        # The values have 16 bits but are at most 235.
        pixels, labels = np.array(image).astype(np.uint8), (np.array(mask) > 0).astype(np.uint8)
    height, width = labels.shape
    columns = cut(width, NUCLEI_TILE)
    for split, parts in (("val", columns[-1:]), ("train", columns[:-1])):
        for left, right in parts:
            for top, bottom in cut(height, NUCLEI_TILE):
                for kind, array in (("images", pixels), ("masks", labels)):
                    path = folder / kind / split / f"{left}_{top}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(array[top:bottom, left:right]).save(path)
