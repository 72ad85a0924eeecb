"""Turn a folder of images into WebDataset tar shards: python scripts/make_shards.py SOURCE OUT [--layout imagenet]

OUT gets {train,val}-000000.tar, ... and classes.txt, which `data=webdataset data.root=OUT` reads: the same images in
the same order with the same names, labels and class names as SOURCE has, hence the same batches and results. The
files' bytes are copied, not encoded again.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from webdataset.writer import ShardWriter

from datamodules.base import ClassificationData
from datamodules.image_folder import ImageFolder
from datamodules.imagenet import ImageNet
from datamodules.images import FileImages
from retinue.utils.errors import user_errors

LAYOUTS: dict[str, type[ClassificationData]] = {"image_folder": ImageFolder, "imagenet": ImageNet}


def write_split(images: FileImages, folder: Path, split: str, max_size: float) -> int:
    """Write the shards of one split; how many there are."""
    with ShardWriter(str(folder / f"{split}-%06d.tar"), maxcount=1_000_000_000, maxsize=max_size, verbose=0) as writer:
        for i in range(len(images)):
            name = images.name(i)
            sample = {"__key__": f"{i:08d}", "cls": str(images.labels[i]), "json": {"name": name}}
            writer.write(sample | {Path(name).suffix[1:].lower(): images.read(i)})
        return writer.shard


def make_shards(source: Path, out: Path, layout: str = "image_folder", max_size: float = 1e9) -> dict[str, int]:
    """Write the splits that `source` has to `out`, whole or not at all; the number of shards of each.

    Args:
        max_size: bytes after which a shard is closed.

    Raises:
        ValueError: `out` is there, or `source` is not as its layout says.
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layout", choices=sorted(LAYOUTS), default="imagenet", help="of SOURCE (imagenet)")
    parser.add_argument("--max-size", type=float, default=1e9, help="bytes after which a shard is closed (1e9)")
    args = parser.parse_args(argv)
    counts = make_shards(args.source, args.out, args.layout, args.max_size)
    print(f"{args.out}: " + ", ".join(f"{count} {split} shards" for split, count in counts.items()))


if __name__ == "__main__":
    with user_errors():
        main()
