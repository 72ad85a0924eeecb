"""Our input pipeline against timm's: from JPEG files to a mixed batch, on the CPU."""

import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import Mixup, create_loader
from timm.data.auto_augment import RandAugment, posterize
from timm.data.dataset import ImageDataset

from datamodules.image_folder import ImageFolder
from retinue.benchmarks.timing import Row, interleave, make_row

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"
PHOTO_HEIGHT, PHOTO_WIDTH = 375, 500


def make_photos(root: Path, count: int, seed: int = 0) -> float:
    """Write JPEGs of about 80 KB: noisy crops of scikit-learn's two photos.

    Args:
        root: folder, in which train/0 receives `count` files and val/0 one file.
        count: number of files for training.
        seed: seed of the crops and of the noise.

    Returns:
        The mean size of a file in bytes.
    """
    rng = np.random.default_rng(seed)
    photos = load_sample_images().images
    sizes = []
    for split in ("train", "val"):
        (root / split / "0").mkdir(parents=True)
        for i in range(count if split == "train" else 1):
            photo = photos[i % len(photos)]
            top = rng.integers(0, photo.shape[0] - PHOTO_HEIGHT + 1)
            left = rng.integers(0, photo.shape[1] - PHOTO_WIDTH + 1)
            crop = photo[top : top + PHOTO_HEIGHT, left : left + PHOTO_WIDTH]
            noisy = crop + rng.normal(0, 9, (PHOTO_HEIGHT, PHOTO_WIDTH, 3))
            path = root / split / "0" / f"{i:04d}.jpg"
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
            sizes.append(path.stat().st_size)
    return float(np.mean(sizes))


def retinue_data(root: Path, image_size: int, batch_size: int, workers: int, **augment: str | None) -> ImageFolder:
    """Return our data module with DeiT's recipe; `augment` changes its augmentation."""
    recipe = {
        "scale": (0.08, 1.0),
        "interpolation": "bicubic",
        "hflip": 0.5,
        "auto_augment": AUTO_AUGMENT,
        "erasing": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
        "label_smoothing": 0.1,
    }
    return ImageFolder(
        root=str(root),
        image_size=image_size,
        mean=MEAN,
        std=STD,
        augment=recipe | augment,
        batch_size=batch_size,
        num_workers=workers,
    )


def retinue_batches(root: Path, image_size: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Yield batches of our pipeline without end, (B, 3, image_size, image_size)."""
    data = retinue_data(root, image_size, batch_size, workers=0)
    loader, epoch = data.train_dataloader(), 0
    while True:
        loader.set_epoch(epoch)
        yield from (data.on_after_batch_transfer(batch, 0)["image"] for batch in loader)
        epoch += 1


def timm_batches(root: Path, image_size: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Yield batches of timm's pipeline without end: its ImageDataset, create_loader and Mixup.

    `create_loader` calls timm's `create_transform`. The batches are (B, 3, image_size, image_size).
    """
    dataset = ImageDataset(str(root / "train"))
    loader = create_loader(
        dataset,
        (3, image_size, image_size),
        batch_size,
        is_training=True,
        use_prefetcher=False,
        num_workers=0,
        persistent_workers=False,
        auto_augment=AUTO_AUGMENT,
        interpolation="bicubic",
        color_jitter=0.0,
        re_prob=0.25,
        re_mode="pixel",
        mean=MEAN,
        std=STD,
    )
    assert dataset.transform is not None
    randaugment = next(step for step in dataset.transform.transforms if isinstance(step, RandAugment))
    for op in randaugment.ops:
        if op.name == "PosterizeIncreasing":
            op.aug_fn = _posterize
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=1)
    while True:
        yield from (mixup(image, label)[0] for image, label in loader)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Posterize as timm does, also to 0 bits, which newer versions of Pillow refuse: the image becomes black."""
    return posterize(image, bits) if bits else Image.new(image.mode, image.size)


def benchmark(image_size: int, batch_size: int, rounds: int = 25) -> list[Row]:
    """Measure both pipelines in this process, without workers and in one thread, so that rates are those of one core.

    Args:
        image_size: side of the crops in pixels.
        batch_size: images of a batch.
        rounds: number of batches of each side that are timed.

    Returns:
        A row for each side; `ratio` is relative to timm.
    """
    torch.set_num_threads(1)
    makers = {"retinue": retinue_batches, "timm": timm_batches}
    with tempfile.TemporaryDirectory() as folder:
        file_size = make_photos(Path(folder), max(128, 2 * batch_size))
        batches = {name: make(Path(folder), image_size, batch_size) for name, make in makers.items()}
        timings = interleave({name: partial(next, iterator) for name, iterator in batches.items()}, rounds=rounds)
    photos = f"{PHOTO_WIDTH} x {PHOTO_HEIGHT} JPEGs, {file_size / 1000:.0f} KB"
    return [
        make_row(
            name,
            timing,
            shape=f"{batch_size} x 3 x {image_size} x {image_size} of {photos}",
            dtype="float32",
            device="cpu",
            against=None if name == "timm" else ("timm", timings["timm"]),
            images_per_second=batch_size / timing.median,
            decoders=", ".join(f"{package} {version(package)}" for package in ("simplejpeg", "pillow")),
        )
        for name, timing in timings.items()
    ]
