"""Write scenes, digits on photos, to a new folder: python scripts/make_scenes.py OUT [--train N] [--seed S]

`data=scenes data.root=OUT` (boxes and masks, COCO's layout) and `data=scenes_segmentation data.root=OUT` (PNG masks)
read it. Without a root both write the usual 600 / 100 / 200 images to the user's cache, as seed 0 makes them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from datamodules.scenes import COUNTS, write_scenes
from retinue.utils.errors import user_errors


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for split, count in COUNTS.items():
        parser.add_argument(f"--{split}", type=int, default=count, metavar="N", help=f"images, by default {count}")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    args = parser.parse_args(argv)
    counts = {split: getattr(args, split) for split in COUNTS}
    if min(counts.values()) < 1 or args.seed < 0:
        raise ValueError("each split needs at least one image, and the seed is 0 or more")
    if args.out.exists():
        raise ValueError(f"{args.out} is there already; name a new folder")
    write_scenes(args.out, counts, args.seed)
    print(", ".join(f"{count} {split}" for split, count in counts.items()), f"scenes in {args.out}")


if __name__ == "__main__":
    with user_errors():
        main()
