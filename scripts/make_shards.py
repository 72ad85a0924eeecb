"""Turn a folder of images into WebDataset tar shards.

    python scripts/make_shards.py source=/data/in1k out=/data/in1k-shards
    python scripts/make_shards.py source=photos out=photos-shards layout=image_folder max_size=1e8

`data=webdataset data.root=<out>` reads the shards: the same images in the same order with the same names, labels and
class names as in the source, hence the same batches and results. The files' bytes are copied, not encoded again.
"""

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


def main(arguments: Sequence[str] | None = None) -> None:
    options = Options.parse(arguments)
    counts = make_shards(options.source, options.out, options.layout, options.max_size)
    print(f"{options.out}: " + ", ".join(f"{count} {split} shards" for split, count in counts.items()))


if __name__ == "__main__":
    with user_errors():
        main()
