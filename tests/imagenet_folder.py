"""A small folder of JPEGs shaped like ImageNet, with what ImageNet has: odd sizes, grey, CMYK, PNG by another name."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

WNIDS = ("n01440764", "n01443537", "n01484850", "n01491361", "n01494475", "n01496331", "n01498041", "n01514668")


def make_imagenet_folder(
    root: Path, classes: int = 3, per_class: int = 12, seed: int = 0, broken: bool = True, flat_val: bool = False
) -> Path:
    """Write `root`/{train,val}/<wnid>/*.JPEG: `per_class` training and half as many validation images a class.

    A class has its colour and its direction of stripes, so a net can learn it. Of the first class one image is grey,
    one CMYK and one a PNG; with `broken` its last training image is truncated. With `flat_val` the validation images
    lie flat beside `val.txt`.
    """
    rng = np.random.default_rng(seed)
    root = Path(root)
    lines = []
    for split, count in (("train", per_class), ("val", per_class // 2)):
        for label, wnid in enumerate(WNIDS[:classes]):
            folder = root / split / ("" if flat_val and split == "val" else wnid)
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                data = _encode(_picture(rng, label, classes), i if label == 0 else 3)
                if broken and split == "train" and label == 0 and i == count - 1:
                    data = data[: len(data) // 2]
                name = f"{wnid}_{i}.JPEG" if split == "train" else f"ILSVRC2012_val_{label * count + i + 1:08d}.JPEG"
                (folder / name).write_bytes(data)
                lines += [f"{name} {label}"] if split == "val" else []
    if flat_val:
        (root / "val.txt").write_text("\n".join(lines) + "\n")
    return root


def _picture(rng: np.random.Generator, label: int, classes: int) -> np.ndarray:
    height, width = rng.integers(40, 120, size=2)
    y, x = np.mgrid[:height, :width]
    angle = np.pi * label / classes
    stripes = np.sin((x * np.cos(angle) + y * np.sin(angle)) * rng.uniform(0.5, 0.8) + rng.uniform(0, 6))
    colour = 0.5 + 0.4 * np.cos(2 * np.pi * (label / classes + np.arange(3) / 3))
    image = 255 * colour * (0.6 + 0.4 * stripes[..., None]) + rng.normal(0, 12, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8)


def _encode(image: np.ndarray, kind: int) -> bytes:
    picture, file = Image.fromarray(image), io.BytesIO()
    picture = picture.convert({0: "L", 1: "CMYK"}.get(kind, "RGB"))
    picture.save(file, "PNG" if kind == 2 else "JPEG")
    return file.getvalue()
