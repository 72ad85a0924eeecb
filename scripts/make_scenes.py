"""Write scenes (digits on photos) to a new folder, as data of detection and segmentation.

    python scripts/make_scenes.py out=scenes
    python scripts/make_scenes.py out=scenes train=5000 val=100 test=200 seed=1

`data=scenes data.root=<out>` (boxes and masks in COCO's layout) and `data=scenes_segmentation data.root=<out>` (PNG
masks) read the folder. Without a root both write 600 / 100 / 200 images with seed 0 to the user's cache.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from datamodules.scenes import COUNTS, write_scenes
from retinue.utils import command_line
from retinue.utils.errors import user_errors


class Options(command_line.Options):
    out: Path = Field(description="folder to make")
    train: int = Field(COUNTS["train"], ge=1, description="number of images to train on")
    val: int = Field(COUNTS["val"], ge=1, description="number of images to validate on")
    test: int = Field(COUNTS["test"], ge=1, description="number of images to test on")
    seed: int = Field(0, ge=0, description="seed of the scenes")


def main(arguments: Sequence[str] | None = None) -> None:
    options = Options.parse(arguments)
    if options.out.exists():
        raise ValueError(f"{options.out} is there already; name a new folder")
    counts = {"train": options.train, "val": options.val, "test": options.test}
    write_scenes(options.out, counts, options.seed)
    print(", ".join(f"{count} {split}" for split, count in counts.items()), f"scenes in {options.out}")


if __name__ == "__main__":
    with user_errors():
        main()
