"""Print the mean and standard deviation of each band of a folder of many-band images, as options of train.py.

    python scripts/band_statistics.py root=/data/fields in_chans=15

The training split is read, at most `limit` of its images; values are in the units of the files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from pydantic import Field

from datamodules.bands import BandImages, band_statistics
from datamodules.image_folder import ImageFolder
from retinue.utils import command_line
from retinue.utils.errors import user_errors


class Options(command_line.Options):
    root: Path = Field(description="folder of the data, as data.root")
    in_chans: int = Field(ge=1, description="number of bands of each image")
    limit: int = Field(1000, ge=1, description="largest number of images to read, spread evenly over the split")


def main(arguments: Sequence[str] | None = None) -> None:
    options = Options.parse(arguments)
    ones = [1.0] * options.in_chans
    data = ImageFolder(root=str(options.root), in_chans=options.in_chans, bands=True, mean=ones, std=ones)
    mean, std = band_statistics(cast(BandImages, data.images("train")), options.limit)
    for name, values in (("mean", mean), ("std", std)):
        print(f"data.{name}=[{','.join(f'{value:.6g}' for value in values)}]")


if __name__ == "__main__":
    with user_errors():
        main()
