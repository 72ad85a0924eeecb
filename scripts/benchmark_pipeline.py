"""Our input pipeline against timm's with the same recipe, on the CPU: python scripts/benchmark_pipeline.py.

Both sides read the same JPEG files and end with a normalised, erased and mixed float batch and its soft targets; all
of that time is counted. One process without workers and one thread, so that the rates are those of one core.

The recipe is DeiT's: random resized crop, flip, RandAugment (timm's code on both sides), random erasing, MixUp or
CutMix. The images are 500 x 375 crops of scikit-learn's two photos, with noise of which a file has about 80 KB.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import Mixup, create_loader
from timm.data.auto_augment import RandAugment, posterize
from timm.data.dataset import ImageDataset

from datamodules.image_folder import ImageFolder
from retinue.benchmarks.timing import interleave, make_row, print_rows, write_csv
from retinue.utils.errors import user_errors

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"


def make_photos(root: Path, count: int, seed: int = 0) -> float:
    """Write `count` JPEGs to `root`/{train,val}/0 and return their mean size in bytes."""
    rng = np.random.default_rng(seed)
    photos = load_sample_images().images
    sizes = []
    for split in ("train", "val"):
        (root / split / "0").mkdir(parents=True)
        for i in range(count if split == "train" else 1):
            photo = photos[i % len(photos)]
            top, left = rng.integers(0, photo.shape[0] - 375 + 1), rng.integers(0, photo.shape[1] - 500 + 1)
            noisy = photo[top : top + 375, left : left + 500] + rng.normal(0, 9, (375, 500, 3))
            path = root / split / "0" / f"{i:04d}.jpg"
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
            sizes.append(path.stat().st_size)
    return float(np.mean(sizes))


def ours(root: Path, size: int, batch: int) -> Iterator[torch.Tensor]:
    """Our batches without end."""
    augment = {
        "scale": (0.08, 1.0),
        "interpolation": "bicubic",
        "hflip": 0.5,
        "auto_augment": AUTO_AUGMENT,
        "erasing": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
        "label_smoothing": 0.1,
    }
    data = ImageFolder(
        root=str(root), image_size=size, mean=MEAN, std=STD, augment=augment, batch_size=batch, num_workers=0
    )
    loader, epoch = data.train_dataloader(), 0
    while True:
        loader.set_epoch(epoch)
        yield from (data.on_after_batch_transfer(b, 0)["image"] for b in loader)
        epoch += 1


def timms(root: Path, size: int, batch: int) -> Iterator[torch.Tensor]:
    """timm's batches without end: its ImageDataset, create_loader (which calls create_transform) and Mixup."""
    dataset = ImageDataset(str(root / "train"))
    loader = create_loader(
        dataset,
        (3, size, size),
        batch,
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
        if op.name == "PosterizeIncreasing":  # by no bits at all, which newer Pillows refuse
            op.aug_fn = lambda image, bits, **_: posterize(image, bits) if bits else Image.new(image.mode, image.size)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=1)
    while True:
        yield from (mixup(image, label)[0] for image, label in loader)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="side of the crops (224)")
    parser.add_argument("--batch", type=int, default=64, help="images a batch (64)")
    parser.add_argument("--rounds", type=int, default=25, help="batches of each side that are timed (25)")
    parser.add_argument("--csv", type=Path, help="write the rows to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        file_size = make_photos(Path(folder), max(128, 2 * args.batch))
        sides = {"retinue": ours, "timm": timms}
        batches = {name: make(Path(folder), args.size, args.batch) for name, make in sides.items()}
        timings = interleave({name: partial(next, it) for name, it in batches.items()}, rounds=args.rounds)
    rows = [
        make_row(
            name,
            timing,
            shape=f"{args.batch} x 3 x {args.size} x {args.size} of 500 x 375 JPEGs, {file_size / 1000:.0f} KB",
            dtype="float32",
            device="cpu",
            against=None if name == "timm" else ("timm", timings["timm"]),
            images_per_second=args.batch / timing.median,
            decoders=", ".join(f"{package} {version(package)}" for package in ("simplejpeg", "pillow")),
        )
        for name, timing in timings.items()
    ]
    print_rows(rows, "From JPEG files to mixed batches, on one core")
    if args.csv:
        write_csv(args.csv, rows)


if __name__ == "__main__":
    with user_errors():
        main()
