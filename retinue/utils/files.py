"""Write files whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; it takes the place of `path` when the block ends well.

    Folders are made as needed. When the block raises, `path` is left as it was and the temporary file is removed.

    Args:
        path: the file to write.
        durable: wait until the file is on the disk before it takes its place, so that neither a power failure nor a
            crash of the machine can leave an empty file under its name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: matplotlib, among others, chooses the format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # A failed write does not name its file, and the temporary name would tell the user nothing.
        if error.errno is not None and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_temporaries(folder: str | Path, suffix: str) -> None:
    """Remove the temporary files ending in `suffix` that killed processes left in a folder where nobody else writes."""
    for path in Path(folder).glob(f".*.*{suffix}"):
        path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def link_or_copy(source: str | Path, path: str | Path) -> None:
    """Make `path` another name of the file `source`, or a copy of it on a file system without hard links."""
    with replacing(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
