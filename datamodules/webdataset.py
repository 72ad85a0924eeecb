"""WebDataset tar shards, read by position."""

import json
import os
import tarfile
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from datamodules.base import SPLITS, ClassificationData
from datamodules.images import EXTENSIONS, EncodedImages
from retinue.utils.files import replacing

COLUMNS = ("shard", "offset", "size", "label", "name")


@lru_cache(maxsize=64)
def _open(path: str) -> BinaryIO:
    return open(path, "rb")


class ShardImages(EncodedImages):
    """Images inside tar files.

    Args:
        shards: the tar files.
        table: of each image the shard's number, offset and size in it, label and name; see `index_shards`.
    """

    def __init__(self, shards: Sequence[Path], table: dict[str, np.ndarray]):
        self.shards = [str(shard) for shard in shards]
        self.labels = table["label"]
        self.table = table

    def read(self, index: int) -> bytes:
        shard, offset, size = (int(self.table[column][index]) for column in ("shard", "offset", "size"))
        return os.pread(_open(self.shards[shard]).fileno(), size, offset)

    def name(self, index: int) -> str:
        return os.fsdecode(self.table["name"][index].item())


def index_shard(path: Path) -> list[tuple[int, int, int, str]]:
    """(offset, size, label, name) of each image of a shard, in its order.

    A sample is what shares a key, the path up to the first dot of the file's name: the image, `.cls` (its label) and
    maybe `.json`, whose `name` is then the image's name.

    Raises:
        ValueError: it is not a whole tar file, or a sample lacks its image or label.
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
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole tar shard: {error}") from error
    found = []
    for key, sample in samples.items():
        if "image" not in sample or not isinstance(sample.get("cls"), int):
            raise ValueError(f"{path}: sample {key} has no {'whole number in .cls' if 'image' in sample else 'image'}")
        found.append((*sample["image"], sample["cls"], sample.get("json", {}).get("name", key)))
    return found


def index_shards(shards: Sequence[Path], cache: Path) -> dict[str, np.ndarray]:
    """The table of `ShardImages`, kept in `cache` and read from there while the shards are the same files."""
    stats = [shard.stat() for shard in shards]
    stamp = json.dumps([[shard.name, s.st_size, s.st_mtime_ns] for shard, s in zip(shards, stats, strict=True)])
    if cache.is_file():
        with np.load(cache, allow_pickle=False) as saved:
            if str(saved["stamp"]) == stamp:
                return {column: saved[column] for column in COLUMNS}
    rows = [(number, *row) for number, shard in enumerate(shards) for row in index_shard(shard)]
    if not rows:
        raise ValueError(f"no images in the {len(shards)} shards beside {shards[0]}")
    *numbers, names = zip(*rows, strict=True)
    table = {column: np.array(values, np.int64) for column, values in zip(COLUMNS, numbers, strict=False)}
    table["name"] = np.array([os.fsencode(name) for name in names])
    try:
        with replacing(cache) as temporary:
            np.savez(temporary, allow_pickle=False, stamp=np.array(stamp), **table)
    except OSError:
        pass  # a folder that cannot be written to is indexed anew each time
    return table


class WebDataset(ClassificationData):
    """`root`/{train,val[,test]}-*.tar with samples of key.jpg (or .png, ...), key.cls and maybe key.json.

    The shards' headers are read once for the places of the images, which are then read by position and not as a
    stream: order, shuffling and resumption are those of a folder with the same images, to the bit, where a stream is
    shuffled in a buffer and dealt out by workers. Class names come from `root`/classes.txt, one a line; without it
    classes are called by their numbers. Without test shards the test split is the validation split.
    `scripts/make_shards.py` writes such a folder.
    """

    @cached_property
    def class_names(self) -> Sequence[str]:
        assert self.root is not None
        path = self.root / "classes.txt"
        if path.is_file():
            return path.read_text(encoding="utf-8").splitlines()
        first = self._read(self.splits[0] if self.splits else "train")
        return [str(label) for label in range(int(first.labels.max()) + 1)]

    @property
    def splits(self) -> Sequence[str]:
        return [split for split in SPLITS if self._shards(split)]

    def load(self, split: str) -> ShardImages:
        images = self._read(split)
        least, most = int(images.labels.min()), int(images.labels.max())
        if least < 0 or most >= self.num_classes:
            wrong = least if least < 0 else most
            raise ValueError(f"{self.root} has the label {wrong} in {split}, but {self.num_classes} classes")
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
