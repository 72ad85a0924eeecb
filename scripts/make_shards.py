"""Turn a folder of images into WebDataset tar shards.

    python scripts/make_shards.py source=/data/in1k out=/data/in1k-shards
    python scripts/make_shards.py source=/data/in1k out=/data/in1k-500 max_side=500
    python scripts/make_shards.py source=photos out=photos-shards layout=image_folder max_size=1e8

`data=webdataset data.root=<out>` reads the shards: the same images in the same order with the same names, labels and
class names as in the source, hence the same batches and results. The files' bytes are copied, not encoded again.

`max_side=500` resizes larger training images once, to a longer side of 500 pixels, so that every epoch decodes less.
Such shards train a slightly different net; `shards.json` beside them and the results of runs say so. Images for
evaluation are never resized.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from datamodules.shards import Layout, make_shards
from retinue.utils import command_line
from retinue.utils.errors import user_errors


class Options(command_line.Options):
    source: Path = Field(description="folder of images")
    out: Path = Field(description="folder to make")
    layout: Layout = Field("imagenet", description="how the source is arranged, as data=<layout> reads it")
    max_size: float = Field(1e9, gt=0, description="size in bytes after which a shard is closed")
    max_side: int | None = Field(
        None, ge=1, description="longer side in pixels to which larger training images are resized; null: none are"
    )
    threads: int = Field(
        default_factory=lambda: os.cpu_count() or 1, ge=1, description="images that are resized at the same time"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = Options.parse(arguments)
    counts = make_shards(
        options.source, options.out, options.layout, options.max_size, options.max_side, options.threads
    )
    print(f"{options.out}: " + ", ".join(f"{count} {split} shards" for split, count in counts.items()))


if __name__ == "__main__":
    with user_errors():
        main()
