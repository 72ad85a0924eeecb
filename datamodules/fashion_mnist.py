"""Fashion-MNIST (Xiao et al., arXiv:1708.07747), read from its IDX files."""

import gzip
import os
import zlib
from pathlib import Path

import numpy as np

from datamodules.base import ClassificationData
from datamodules.images import ArrayImages, index_in_class

# Folder in which Debian's package dataset-fashion-mnist installs the files.
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def read_idx(folder: Path, name: str) -> np.ndarray:
    """Read the array in `folder`/`name` or `folder`/`name`.gz.

    Raises:
        ValueError: if neither file exists, or the file is not a complete IDX file of unsigned bytes.
    """
    paths = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
    if not paths:
        raise ValueError(
            f"no {name} or {name}.gz in {folder}; `python scripts/fetch_data.py name=fashion_mnist` fetches it"
        )
    try:
        data = paths[0].read_bytes()
        data = gzip.decompress(data) if paths[0].suffix == ".gz" else data
        if data[:3] != b"\0\0\x08":
            raise ValueError("it does not begin like an IDX file of unsigned bytes")
        dims = data[3]
        shape = np.frombuffer(data, ">u4", dims, 4).tolist()
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape).copy()
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise ValueError(f"{paths[0]} cannot be read: {error}") from error


class FashionMNIST(ClassificationData):
    """70,000 images of clothing, 28 x 28 px, in 10 classes.

    The first of every ten training images of a class is for validation: 54,000 / 6,000 / 10,000 images. `root` is the
    folder of the IDX files, gzipped or not. None means the folder to which `scripts/fetch_data.py` or Debian's package
    writes them.
    """

    class_names = (
        *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    )

    def find_root(self, root: str | None) -> Path | None:
        defaults = (Path(os.environ.get("RETINUE_DATA", "data")) / "fashion_mnist", DEBIAN_FOLDER)
        existing = [str(folder) for folder in defaults if folder.is_dir()]
        return super().find_root(existing[0] if root is None and existing else root)

    def load(self, split: str) -> ArrayImages:
        assert self.root is not None
        stem = "t10k" if split == "test" else "train"
        images = read_idx(self.root, f"{stem}-images-idx3-ubyte")
        labels = read_idx(self.root, f"{stem}-labels-idx1-ubyte")
        if len(images) != len(labels):
            raise ValueError(f"{self.root} has {len(images)} {stem} images but {len(labels)} labels")
        if split != "test":
            in_split = (index_in_class(labels) % 10 == 0) == (split == "val")
            images, labels = images[in_split], labels[in_split]
        return ArrayImages(images, labels, f"fashion_mnist/{split}")
