"""Parquet files of images, and folders that Hugging Face's `datasets` saved, read by pyarrow.

Both hold a column of encoded images, either bytes or `datasets`' struct of bytes and a path, and a column of labels.
Only these two columns and the names of the classes are read, and nothing in the files is executed.
"""

import json
import os
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.base import SPLITS, ClassificationData
from datamodules.decode import BrokenImage
from datamodules.holdout import part_of_split
from datamodules.images import EncodedImages, index_in_class
from retinue.utils.files import replacing
from retinue.utils.suggestions import nearest

# Names of each split in the names of files and folders.
NAMES = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
# Places of a split's files in the root, the first of which that has files is taken.
PLACES = ("{}.parquet", "{}-*.parquet", "data/{}-*.parquet", "{}/*.parquet", "{}/*.arrow")
# Number of images that are copied at a time.
BATCH = 256


def import_arrow() -> Any:
    """Return the package pyarrow.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ValueError("data=parquet needs pyarrow: pip install 'retinue[parquet]'") from None
    return pyarrow


@cache
def open_table(path: str) -> Any:
    """Return the table in an Arrow file, whose pages the system reads when they are needed."""
    arrow = import_arrow()
    source, options = arrow.memory_map(path), arrow.ipc.IpcReadOptions(use_threads=False)
    try:
        return arrow.ipc.open_file(source, options=options).read_all()
    except arrow.ArrowInvalid:
        # `datasets` writes the stream format, which has no table of contents.
        source.seek(0)
        return arrow.ipc.open_stream(source, options=options).read_all()


class ArrowImages(EncodedImages):
    """Set of images in Arrow files.

    Args:
        files: the files, in the order of the images.
        column: column of the images.
        rows: row of each image among those of all files, (N,).
        labels: label of each image, (N,).
    """

    def __init__(self, files: Sequence[Path], column: str, rows: np.ndarray, labels: np.ndarray):
        self.files, self.column, self.rows, self.labels = [str(file) for file in files], column, rows, labels
        # First row of each file, and the number of all rows.
        self.starts = np.cumsum([0, *(open_table(file).num_rows for file in self.files)])

    def read(self, index: int) -> bytes:
        file, row = self._place(index)
        try:
            content = open_table(self.files[file]).column(self.column)[row].as_py()
        except import_arrow().ArrowException as error:
            raise BrokenImage(str(error)) from error
        content = content.get("bytes") if isinstance(content, dict) else content
        if not isinstance(content, bytes):
            raise BrokenImage("the file holds no bytes of the image")
        return content

    def name(self, index: int) -> str:
        file, row = self._place(index)
        scalar = open_table(self.files[file]).column(self.column)[row]
        is_struct = isinstance(scalar, import_arrow().StructScalar) and scalar.is_valid and "path" in scalar
        path = scalar["path"].as_py() if is_struct else None
        return path or f"{Path(self.files[file]).stem}:{row}"

    def _place(self, index: int) -> tuple[int, int]:
        """Return the number of the file of an image, and its row in the file."""
        row = int(self.rows[index])
        file = int(np.searchsorted(self.starts, row, side="right")) - 1
        return file, row - int(self.starts[file])


class Parquet(ClassificationData):
    """Parquet files, or a folder of Arrow files that `save_to_disk` of Hugging Face's `datasets` wrote.

    The files of a split are those in `root` whose names `PLACES` gives, or those that an argument names. Without a test
    split, the test split is the validation split; without a validation split, it is every fifth image of a class.
    Parquet files are compressed in groups of rows, so they are copied once to Arrow files, from which images are read
    by position: order, shuffling and resumption are those of a folder with the same images.

    Labels are class numbers or names. The names of the classes are those in the files' metadata, as `datasets` writes
    them, or the names in `train`, sorted, or numbers.

    Args:
        train: file of the training split, or a pattern such as `part-*.parquet`, relative to `root`.
        val: as `train`, for validation.
        test: as `train`, for testing.
        image_column: column of the encoded images.
        label_column: column of the labels.
        cache: folder for the copies of Parquet files. None takes the folder .arrow in `root`.
        common: arguments of `ClassificationData`.

    Raises:
        ValueError: if pyarrow is not installed. Loading raises it if the files are not as described.
    """

    def __init__(
        self,
        *,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        cache: str | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        import_arrow()
        self.patterns = {"train": train, "val": val, "test": test}
        self.image_column, self.label_column = image_column, label_column
        assert self.root is not None
        self.cache = self.root / ".arrow" if cache is None else Path(cache).expanduser()

    @property
    def splits(self) -> Sequence[str]:
        return [split for split in SPLITS if self._files[split] or split == "val"]

    @cached_property
    def class_names(self) -> Sequence[str]:
        tables = self._tables("train")
        metadata = (tables[0].schema.metadata or {}).get(b"huggingface")
        names = read_names(metadata, self.label_column) if metadata else None
        if names is not None:
            return names
        values = self._values("train")
        if not np.issubdtype(values.dtype, np.integer):
            return sorted(set(values.tolist()))
        if (highest := int(values.max())) >= len(values):
            raise ValueError(
                f"{self.root} has the label {highest}, which would make {highest + 1} classes of {len(values)} images"
            )
        return [str(label) for label in range(highest + 1)]

    def load(self, split: str) -> ArrowImages:
        has_files = bool(self._files[split])
        source = split if has_files else "train"
        labels = self._labels(source)
        rows = np.arange(len(labels))
        if not self._files["val"] and split != "test":
            rows = np.flatnonzero(part_of_split(index_in_class(labels), split))
        return ArrowImages(self._arrow_files[source], self.image_column, rows, labels[rows])

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        """Files of each split in their order; none if the data do not have the split."""
        assert self.root is not None
        files: dict[str, list[Path]] = {}
        for split, pattern in self.patterns.items():
            usual = [place.format(name) for name in NAMES[split] for place in PLACES]
            # A folder without splits, as `save_to_disk` writes it.
            usual += ["data-*.arrow"] if split == "train" else []
            tried = usual if pattern is None else [pattern]
            found = (sorted(self.root.glob(place)) for place in tried)
            files[split] = next((paths for paths in found if paths), [])
            if not files[split] and (pattern is not None or split == "train"):
                raise ValueError(f"no files of {split} in {self.root}: looked for {', '.join(tried)}")
        return files

    @cached_property
    def _arrow_files(self) -> dict[str, list[Path]]:
        """Arrow file of each file, by split; Parquet files are copied if they have changed since they were copied."""
        return {split: [self._arrow_file(path) for path in paths] for split, paths in self._files.items()}

    def _arrow_file(self, path: Path) -> Path:
        assert self.root is not None
        if path.suffix == ".arrow":
            return path
        copy = (self.cache / path.relative_to(self.root)).with_suffix(".arrow")
        columns, facts = [self.image_column, self.label_column], path.stat()
        stamp = json.dumps([facts.st_size, facts.st_mtime_ns, columns]).encode()
        if not _has_stamp(copy, stamp):
            try:
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy_parquet(path, copy, columns, stamp)
                # A former copy may still be open.
                open_table.cache_clear()
            except OSError as error:
                raise ValueError(
                    f"{path} cannot be copied to {copy} ({error.strerror or error}): data.cache=FOLDER names another "
                    "folder"
                ) from error
        return copy

    def _tables(self, split: str) -> list[Any]:
        """Return the tables of a split's files.

        Raises:
            ValueError: if a file cannot be read, or lacks a column.
        """
        tables = []
        for path in self._arrow_files[split]:
            try:
                table = open_table(str(path))
            except (OSError, import_arrow().ArrowInvalid) as error:
                raise ValueError(f"{path} is not an Arrow file: {error}") from error
            check_columns(path, table.column_names, [self.image_column, self.label_column])
            tables.append(table)
        return tables

    def _values(self, split: str) -> np.ndarray:
        """Return the values in the column of labels: int64 (N,), or names (N,).

        Raises:
            ValueError: if a value is missing, or they are neither whole numbers nor text.
        """
        arrow = import_arrow()
        values = []
        for path, table in zip(self._files[split], self._tables(split), strict=True):
            column = table.column(self.label_column)
            if arrow.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            is_number = arrow.types.is_integer(column.type)
            is_text = arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type)
            if column.null_count or not (is_number or is_text):
                found = f"{column.null_count} empty cells" if column.null_count else str(column.type)
                raise ValueError(
                    f"{path}: the column {self.label_column} must hold whole numbers or text, not {found}; "
                    "data.label_column names another one"
                )
            values.append(np.array(column.to_pylist(), np.int64 if is_number else None))
        return np.concatenate(values)

    def _labels(self, split: str) -> np.ndarray:
        values = self._values(split)
        if np.issubdtype(values.dtype, np.integer):
            return values
        labels = {name: label for label, name in enumerate(self.class_names)}
        if unknown := sorted(set(values.tolist()) - labels.keys()):
            raise ValueError(
                f"the class {unknown[0]!r} in {split} is not one of the {len(labels)} classes in train."
                + nearest(unknown[0], labels)
            )
        return np.array([labels[name] for name in values.tolist()], np.int64)


def read_names(metadata: bytes, column: str) -> list[str] | None:
    """Return the names of the classes that `datasets` writes into a schema, or None if there are none.

    Args:
        metadata: JSON, such as {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}.
        column: column of the labels.
    """
    try:
        names = json.loads(metadata)["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def check_columns(path: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    """Check that a file has the columns of the images and of the labels.

    Raises:
        ValueError: if it lacks one.
    """
    for key, name in zip(("image", "label"), needed, strict=True):
        if name not in columns:
            raise ValueError(
                f"{path} has no column {name!r}.{nearest(name, columns)} data.{key}_column takes one of "
                f"{', '.join(columns)}"
            )


def copy_parquet(path: Path, copy: Path, columns: Sequence[str], stamp: bytes) -> None:
    """Write two columns of a Parquet file as an uncompressed Arrow file, completely or not at all.

    Args:
        path: the Parquet file.
        copy: the Arrow file.
        columns: columns of the images and of the labels.
        stamp: what tells whether the Parquet file has changed; it is kept in the Arrow file.

    Raises:
        ValueError: if `path` is no Parquet file, or lacks a column.
    """
    arrow = import_arrow()
    try:
        with arrow.parquet.ParquetFile(os.fspath(path)) as file, replacing(copy) as temporary:
            schema = file.schema_arrow
            check_columns(path, schema.names, columns)
            fields = arrow.schema([schema.field(name) for name in columns])
            fields = fields.with_metadata({**(schema.metadata or {}), b"retinue": stamp})
            with arrow.ipc.new_file(os.fspath(temporary), fields) as out:
                for batch in file.iter_batches(BATCH, columns=list(columns), use_threads=False):
                    out.write_batch(arrow.record_batch([batch.column(name) for name in columns], schema=fields))
    except arrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {' '.join(str(error).split())}") from error


def _has_stamp(path: Path, stamp: bytes) -> bool:
    """Tell whether an Arrow file is there, is whole and has this stamp."""
    if not path.is_file():
        return False
    arrow = import_arrow()
    try:
        with arrow.memory_map(os.fspath(path)) as source:
            return (arrow.ipc.open_file(source).schema.metadata or {}).get(b"retinue") == stamp
    except (OSError, arrow.ArrowInvalid):
        return False
