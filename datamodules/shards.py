"""Turn a folder of images into WebDataset tar shards; `datamodules.webdataset` reads them."""

import os
import tempfile
from pathlib import Path
from typing import Literal

from webdataset.writer import ShardWriter

from datamodules.base import ClassificationData
from datamodules.decode import BrokenImage
from datamodules.image_folder import ImageFolder
from datamodules.imagenet import ImageNet
from datamodules.images import FileImages

Layout = Literal["image_folder", "imagenet"]
LAYOUTS: dict[Layout, type[ClassificationData]] = {"image_folder": ImageFolder, "imagenet": ImageNet}
# Shards are closed by their size alone, so the limit on samples is out of reach.
MAX_SAMPLES = 1_000_000_000


def make_shards(source: Path, out: Path, layout: Layout = "image_folder", max_size: float = 1e9) -> dict[str, int]:
    """Write the splits that a folder has as shards, all of them or none.

    `out` gets {train,val}-000000.tar, ... and classes.txt: the same images in the same order with the same names,
    labels and class names as in `source`. The files' bytes are copied, not encoded again.

    Args:
        source: Folder of images.
        out: Folder to make.
        layout: How `source` is arranged: as `datamodules.image_folder` or as `datamodules.imagenet` says.
        max_size: Size in bytes after which a shard is closed.

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
        counts = {}
        for split in data.splits:
            images = data.images(split)
            assert isinstance(images, FileImages)
            counts[split] = write_split(images, unfinished, split, max_size)
        os.replace(unfinished, out)
    return counts


def write_split(images: FileImages, folder: Path, split: str, max_size: float) -> int:
    """Write the shards of one split to a folder, and return their number."""
    pattern = str(folder / f"{split}-%06d.tar")
    with ShardWriter(pattern, maxcount=MAX_SAMPLES, maxsize=max_size, verbose=0) as writer:
        for i in range(len(images)):
            name = images.name(i)
            sample = {"__key__": f"{i:08d}", "cls": str(images.labels[i]), "json": {"name": name}}
            try:
                content = images.read(i)
            except BrokenImage as error:
                raise ValueError(f"{images.root}/{name} cannot be packed: {error}") from error
            writer.write(sample | {Path(name).suffix[1:].lower(): content})
        return writer.shard
