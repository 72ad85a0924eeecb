"""Turn a folder of images into WebDataset tar shards; `datamodules.webdataset` reads them."""

import io
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from webdataset.writer import ShardWriter

from datamodules.base import ClassificationData
from datamodules.decode import BrokenImage, decode
from datamodules.image_folder import ImageFolder
from datamodules.imagenet import ImageNet
from datamodules.images import FileImages
from datamodules.webdataset import FACTS

Layout = Literal["image_folder", "imagenet"]
LAYOUTS: dict[Layout, type[ClassificationData]] = {"image_folder": ImageFolder, "imagenet": ImageNet}
# Shards are closed by their size alone, so the limit on samples is out of reach.
MAX_SAMPLES = 1_000_000_000
# Number of images that are read before they are written.
READ_AHEAD = 256
# JPEG quality of images that are resized.
QUALITY = 95


def make_shards(
    source: Path,
    out: Path,
    layout: Layout = "image_folder",
    max_size: float = 1e9,
    max_side: int | None = None,
    threads: int = 1,
) -> dict[str, int]:
    """Write the splits that a folder has as shards, all of them or none.

    `out` gets {train,val}-000000.tar, ... and classes.txt: the same images in the same order with the same names,
    labels and class names as in `source`. The files' bytes are copied, not encoded again, except training images that
    are larger than `max_side`. `FACTS` in `out` then says so, and each resized image has its former size.

    Args:
        source: Folder of images.
        out: Folder to make.
        layout: How `source` is arranged: as `datamodules.image_folder` or as `datamodules.imagenet` says.
        max_size: Size in bytes after which a shard is closed.
        max_side: Longer side in pixels to which larger training images are resized; images for evaluation never are.
            None resizes nothing.
        threads: Number of images that are resized at the same time.

    Returns:
        The number of shards of each split.

    Raises:
        ValueError: `out` exists, or `source` is not arranged as its layout says.
    """
    if out.exists():
        raise ValueError(f"{out} is there already; name a new folder")
    data = LAYOUTS[layout](root=str(source))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        unfinished = Path(folder) / out.name
        unfinished.mkdir()
        (unfinished / "classes.txt").write_text("".join(f"{name}\n" for name in data.class_names), encoding="utf-8")
        if max_side is not None:
            (unfinished / FACTS).write_text(json.dumps({"max_side": max_side, "quality": QUALITY}), encoding="utf-8")
        counts = {}
        for split in data.splits:
            images = data.images(split)
            assert isinstance(images, FileImages)
            side = max_side if split == "train" else None
            counts[split] = write_split(images, unfinished, split, max_size, side, threads)
        os.replace(unfinished, out)
    return counts


def write_split(
    images: FileImages, folder: Path, split: str, max_size: float, max_side: int | None = None, threads: int = 1
) -> int:
    """Write the shards of one split to a folder, and return their number."""
    pattern = str(folder / f"{split}-%06d.tar")
    with (
        ShardWriter(pattern, maxcount=MAX_SAMPLES, maxsize=max_size, verbose=0) as writer,
        ThreadPoolExecutor(threads) as pool,
    ):
        for start in range(0, len(images), READ_AHEAD):
            positions = range(start, min(start + READ_AHEAD, len(images)))
            for sample in pool.map(partial(_sample, images, max_side), positions):
                writer.write(sample)
        return writer.shard


def _sample(images: FileImages, max_side: int | None, index: int) -> dict:
    """Return the files of a sample by their suffixes."""
    name = images.name(index)
    try:
        content = images.read(index)
    except BrokenImage as error:
        raise ValueError(f"{images.root}/{name} cannot be packed: {error}") from error
    about: dict[str, Any] = {"name": name}
    suffix = Path(name).suffix[1:].lower()
    if max_side is not None and (resized := shrink(content, max_side)) is not None:
        content, about["resized_from"] = resized
        suffix = "jpg"
    return {"__key__": f"{index:08d}", "cls": str(images.labels[index]), "json": about, suffix: content}


def shrink(content: bytes, max_side: int) -> tuple[bytes, tuple[int, int]] | None:
    """Resize an image whose longer side is above `max_side` pixels.

    Returns:
        The content of a JPEG file, and the former (height, width); None for a smaller or a broken image.
    """
    try:
        image = decode(content)
    except BrokenImage:
        return None
    height, width = image.shape[:2]
    factor = max_side / max(height, width)
    if factor >= 1:
        return None
    size = max(1, round(width * factor)), max(1, round(height * factor))
    file = io.BytesIO()
    resized = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    resized.save(file, "JPEG", quality=QUALITY, subsampling=0)
    return file.getvalue(), (height, width)
