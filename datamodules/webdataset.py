"""Tar shards in WebDataset's format, read by position."""

import json
import logging
import os
import stat
import tarfile
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from datamodules.base import SPLITS, ClassificationData
from datamodules.decode import BrokenImage
from datamodules.images import EXTENSIONS, EncodedImages
from retinue.utils.files import replacing

logger = logging.getLogger(__name__)

# Columns of the table that `index_shards` returns.
COLUMNS = ("shard", "offset", "size", "label", "name")
# File beside the shards that says how `scripts/make_shards.py` changed the images.
FACTS = "shards.json"
# A tar file ends with at least two blocks of zeros, 512 bytes each.
END_OF_ARCHIVE = bytes(1024)
# Largest label that a shard may have; labels are class numbers.
MAX_LABEL = 2**31 - 1


@lru_cache(maxsize=64)
def _open(path: str) -> BinaryIO:
    return open(path, "rb")


class ShardImages(EncodedImages):
    """Set of images inside tar files.

    Args:
        shards: the tar files.
        table: for each image the number of its shard, its offset and size in the shard in bytes, its label and its
            name; see `index_shards`.
    """

    def __init__(self, shards: Sequence[Path], table: dict[str, np.ndarray]):
        self.shards = [str(shard) for shard in shards]
        self.labels = table["label"]
        self.table = table

    def read(self, index: int) -> bytes:
        shard, offset, size = (int(self.table[column][index]) for column in ("shard", "offset", "size"))
        content = os.pread(_open(self.shards[shard]).fileno(), size, offset)
        if len(content) < size:
            raise BrokenImage(f"{self.shards[shard]} has become shorter: it ends within the image")
        return content

    def name(self, index: int) -> str:
        return os.fsdecode(self.table["name"][index].item())


def index_shard(path: Path) -> list[tuple[int, int, int, str]]:
    """Return (offset, size, label, name) of each image in a shard, in the order of the shard.

    The files of a sample share a key, which is the path up to the first dot of the file name. They are the image,
    `.cls` (its label) and optionally `.json`, whose `name` is the name of the image. Without it the name is the key.

    Raises:
        ValueError: if the file is not a complete tar file, or a sample lacks its image or label.
    """
    samples: dict[str, dict] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
                if f".{suffix.lower()}" in EXTENSIONS:
                    sample["image"] = (member.offset_data, member.size)
                elif suffix in ("cls", "json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    sample[suffix] = json.loads(content.read())
            end = tar.offset
        # tarfile takes a cut header for the end of the archive, so look for the real end.
        with open(path, "rb") as file:
            file.seek(end)
            if file.read(len(END_OF_ARCHIVE)) != END_OF_ARCHIVE:
                raise ValueError(f"its end is missing after {end:,} bytes; it may have been copied only in part")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole tar shard: {error}") from error
    rows = []
    for key, sample in samples.items():
        label, metadata = sample.get("cls"), sample.get("json")
        if "image" not in sample or type(label) is not int or not 0 <= label <= MAX_LABEL:
            missing = "whole number, 0 or more, in .cls" if "image" in sample else "image"
            raise ValueError(f"{path}: sample {key} has no {missing}")
        name = metadata.get("name", key) if isinstance(metadata, dict) else key
        rows.append((*sample["image"], label, str(name)))
    return rows


def index_shards(shards: Sequence[Path], cache: Path) -> dict[str, np.ndarray]:
    """Return the table of `ShardImages`, and keep it in a file.

    Args:
        shards: the tar files.
        cache: file that keeps the table. It is used as long as the names, sizes and modification times of the shards
            stay the same. If the file cannot be written, the shards are indexed each time.

    Returns:
        Arrays (N,) for the keys `COLUMNS`: int64, and bytes for the name.

    Raises:
        ValueError: if a shard is malformed or there are no images.
    """
    stats = [shard.stat() for shard in shards]
    for shard, status in zip(shards, stats, strict=True):
        # Opening a FIFO would wait for ever.
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{shard} is not a whole tar shard: it is no regular file")
    stamp = json.dumps([[shard.name, s.st_size, s.st_mtime_ns] for shard, s in zip(shards, stats, strict=True)])
    if (saved := _read_index(cache, stamp)) is not None:
        return saved
    rows = [(number, *row) for number, shard in enumerate(shards) for row in index_shard(shard)]
    if not rows:
        raise ValueError(f"no images in the {len(shards)} shards next to {shards[0]}")
    *numbers, names = zip(*rows, strict=True)
    table = {column: np.array(values, np.int64) for column, values in zip(COLUMNS, numbers, strict=False)}
    table["name"] = np.array([os.fsencode(name) for name in names])
    try:
        with replacing(cache) as temporary:
            np.savez(temporary, allow_pickle=False, stamp=np.array(stamp), **table)
    except OSError:
        # The folder may be read-only; then the shards are indexed each time.
        pass
    return table


def _read_index(cache: Path, stamp: str) -> dict[str, np.ndarray] | None:
    """Return the table in the file `cache`, or None if the file is missing, damaged or has another stamp."""
    if not cache.is_file():
        return None
    try:
        with np.load(cache, allow_pickle=False) as saved:
            if str(saved["stamp"]) != stamp:
                return None
            table = {column: saved[column] for column in COLUMNS}
    except Exception as error:
        # NumPy, zipfile and zlib raise errors of many types for a damaged file.
        logger.warning("%s is damaged and is made again: %s", cache, error)
        return None
    return table if len({len(column) for column in table.values()}) == 1 else None


class WebDataset(ClassificationData):
    """Tar shards `root`/{train,val[,test]}-*.tar with the samples' files key.jpg (or .png, ...), key.cls and key.json.

    The shards' headers are read once to locate the images. Images are then read by position, so order, shuffling and
    resumption are exactly those of a folder with the same images. (A usual stream of shards is shuffled in a buffer and
    distributed among workers, so its order depends on both.) The .json file of a sample is optional. The names of the
    classes are the lines of `root`/classes.txt; without that file they are numbers. Without test shards, the test split
    is the validation split. `scripts/make_shards.py` writes such a folder.
    """

    @cached_property
    def class_names(self) -> Sequence[str]:
        assert self.root is not None
        path = self.root / "classes.txt"
        if path.is_file():
            return path.read_text(encoding="utf-8-sig").splitlines()
        images = self._read(self.splits[0] if self.splits else "train")
        highest = int(images.labels.max())
        if highest >= len(images):
            raise ValueError(
                f"{self.root} has the label {highest}, which would make {highest + 1} classes of {len(images)} images; "
                "if there are as many classes, name them in classes.txt, one a line"
            )
        return [str(label) for label in range(highest + 1)]

    @cached_property
    def note(self) -> dict[str, str]:
        assert self.root is not None
        path = self.root / FACTS
        if not path.is_file():
            return {}
        try:
            side = int(json.loads(path.read_text(encoding="utf-8"))["max_side"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged, it should say max_side: {error}") from error
        return {"training_images": f"resized to at most {side} px when they were packed"}

    @property
    def splits(self) -> Sequence[str]:
        return [split for split in SPLITS if self._shards(split)]

    def load(self, split: str) -> ShardImages:
        images = self._read(split)
        low, high = int(images.labels.min()), int(images.labels.max())
        if low < 0 or high >= self.num_classes:
            invalid = low if low < 0 else high
            raise ValueError(f"{self.root} has the label {invalid} in {split}, but {self.num_classes} classes")
        return images

    def _shards(self, split: str) -> list[Path]:
        assert self.root is not None
        return sorted(self.root.glob(f"{split}-*.tar"))

    def _read(self, split: str) -> ShardImages:
        assert self.root is not None
        shards = self._shards(split)
        if not shards:
            raise ValueError(f"no shards {split}-*.tar in {self.root}")
        return ShardImages(shards, index_shards(shards, self.root / f".index-{split}.npz"))
