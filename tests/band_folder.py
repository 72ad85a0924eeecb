"""A small folder of many-band images, for tests of reading and of training."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

BANDS = 5


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tiff(pages: np.ndarray) -> bytes:
    """Encode (pages, H, W) as a TIFF file."""
    file, (first, *rest) = io.BytesIO(), [Image.fromarray(page) for page in pages]
    first.save(file, "TIFF", save_all=True, append_images=rest)
    return file.getvalue()


def make_band_folder(root: Path) -> Path:
    """Write 40 images of 5 bands, arrays and TIFF files, whose two classes differ in the level of one band."""
    rng = np.random.default_rng(0)
    for label in ("dry", "wet"):
        (root / label).mkdir(parents=True)
        for i in range(20):
            image = rng.normal(1000, 100, (BANDS, 16, 16))
            image[3] += 3000 if label == "wet" else 0
            if i % 2:
                (root / label / f"{i:02d}.npy").write_bytes(npy(image.transpose(1, 2, 0)))
            else:
                (root / label / f"{i:02d}.tif").write_bytes(tiff(image.astype(np.uint16)))
    return root
