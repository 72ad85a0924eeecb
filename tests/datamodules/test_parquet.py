"""Parquet files and saved folders give the images, the order and the batches of the folder of the same images."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.image_folder import ImageFolder
from datamodules.parquet import Parquet

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

CLASSES = ["cat", "cow", "dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of images of three classes, 11 to train and 6 to validate."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 11), ("val", 6)):
        for i in range(count):
            path = root / split / CLASSES[i % 3] / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (9, 9 + i, 3), dtype=np.uint8)).save(path)
    return root


def rows_of(folder, split):
    """Return the bytes, the path and the label of each image, in the folder's order."""
    images = make(ImageFolder, folder).images(split)
    return [(images.read(i), images.name(i), int(images.labels[i])) for i in range(len(images))]


def table(rows, names=False, text=False, plain=False):
    contents = [content if plain else {"bytes": content, "path": path} for content, path, _ in rows]
    labels = [CLASSES[label] if text else label for *_, label in rows]
    made = pa.table({"id": list(range(len(rows))), "image": contents, "label": labels})
    feature = {"label": {"names": CLASSES, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    about = {"huggingface": json.dumps({"info": {"features": feature}})}
    return made.replace_schema_metadata(about) if names else made


def make(kind, root, **arguments):
    augment = {"scale": [0.5, 1.0], "hflip": 0.5, "color_jitter": 0.3}
    return kind(root=str(root), image_size=8, batch_size=3, num_workers=0, seed=3, augment=augment, **arguments)


def batches(data, epoch=1):
    loader = data.train_dataloader()
    loader.set_epoch(epoch)
    return [data.on_after_batch_transfer(batch, 0) for batch in (*loader, *data.val_dataloader())]


@pytest.mark.parametrize("form", ["names", "text", "plain", "arrow", "hub"])
def test_the_batches_are_those_of_the_folder(folder, tmp_path, form):
    for split in ("train", "val"):
        rows = rows_of(folder, split)
        made = table(rows, names=form in ("names", "arrow", "hub"), text=form == "text", plain=form == "plain")
        if form == "arrow":
            # Two files of a stream with several batches each, as `save_to_disk` writes them.
            (tmp_path / split).mkdir()
            for number, part in enumerate((made[:4], made[4:])):
                with pa.ipc.new_stream(tmp_path / split / f"data-0000{number}-of-00002.arrow", part.schema) as out:
                    out.write_table(part, max_chunksize=3)
        elif form == "hub":
            (tmp_path / "data").mkdir(exist_ok=True)
            for number, part in enumerate((made[:4], made[4:])):
                name = {"train": "train", "val": "validation"}[split]
                pq.write_table(part, tmp_path / f"data/{name}-0000{number}-of-00002.parquet", row_group_size=2)
        else:
            pq.write_table(made, tmp_path / f"{split}.parquet", row_group_size=4)
    data, expected = make(Parquet, tmp_path), make(ImageFolder, folder)
    assert list(data.class_names) == (["0", "1", "2"] if form == "plain" else CLASSES)
    assert list(data.splits) == ["train", "val"]
    ours, theirs = batches(data), batches(expected)
    assert len(ours) == len(theirs) == 5
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key in ("image", "label", "index"):
            assert torch.equal(one[key], other[key]), key
    names = data.names("train")
    assert len(set(names)) == 11
    assert names == (["train:0"] + [f"train:{i}" for i in range(1, 11)] if form == "plain" else expected.names("train"))


def test_every_fifth_image_of_a_class_is_for_validation_if_there_is_no_such_split(folder, tmp_path):
    pq.write_table(table(rows_of(folder, "train"), names=True), tmp_path / "train.parquet")
    data, whole = make(Parquet, tmp_path), make(ImageFolder, folder / "train")
    for split in ("train", "val", "test"):
        assert data.names(split) == whole.names(split)
        np.testing.assert_array_equal(data.images(split).labels, whole.images(split).labels)
        np.testing.assert_array_equal(data.images(split).image(1), whole.images(split).image(1))


def test_copies_are_made_once_and_anew_if_a_file_changes_or_the_copy_is_damaged(folder, tmp_path):
    rows, path = rows_of(folder, "train"), tmp_path / "train.parquet"
    pq.write_table(table(rows, names=True), path)
    copy = tmp_path / "copies/train.arrow"
    first = make(Parquet, tmp_path, cache=str(tmp_path / "copies")).images("train")
    made = copy.stat().st_mtime_ns
    assert make(Parquet, tmp_path, cache=str(tmp_path / "copies")).images("train").read(0) == first.read(0)
    assert copy.stat().st_mtime_ns == made
    copy.write_bytes(copy.read_bytes()[:100])
    os.utime(path)
    assert make(Parquet, tmp_path, cache=str(tmp_path / "copies")).images("train").read(0) == first.read(0)
    assert copy.stat().st_mtime_ns != made


def test_an_image_without_bytes_is_broken(folder, tmp_path):
    rows = rows_of(folder, "train")
    rows[1] = (None, *rows[1][1:])
    rows[2] = (b"no image", *rows[2][1:])
    pq.write_table(table(rows, names=True), tmp_path / "train.parquet")
    pq.write_table(table(rows, names=True), tmp_path / "val.parquet")
    data = make(Parquet, tmp_path, broken_limit=0.5)
    index = torch.cat([batch["index"] for batch in data.val_dataloader()])
    assert index.tolist() == [0, -1, -1, *range(3, 11)]
    assert data.broken["val"][1] == "the file holds no bytes of the image"


@pytest.mark.parametrize(
    ("change", "arguments", "says"),
    [
        (None, {}, "no files of train in .*: looked for train.parquet, train-"),
        (None, {"train": "*.pq"}, r"no files of train in .*: looked for \*.pq$"),
        (lambda t: t, {"image_column": "images"}, "no column 'images'. Did you mean 'image'.* one of id, image, label"),
        (
            lambda t: t.set_column(2, "label", pa.array([0.5] * len(t))),
            {},
            "must hold whole numbers or text, not double",
        ),
        (lambda t: t.set_column(2, "label", pa.array([None, *[0] * (len(t) - 1)])), {}, "text, not 1 empty cells"),
        (lambda t: t.set_column(2, "label", pa.array([10**9] * len(t))), {}, "would make 1000000001 classes of 11"),
        (lambda t: t.set_column(2, "label", pa.array([-1] * len(t))), {}, "the label -1 in train"),
    ],
)
def test_what_is_wrong_is_one_line(folder, tmp_path, change, arguments, says):
    if change is not None:
        pq.write_table(change(table(rows_of(folder, "train"))), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=says) as error:
        make(Parquet, tmp_path, **arguments).images("train")
    assert "\n" not in str(error.value)


def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"text" * 10)
    with pytest.raises(ValueError, match=r"train\.parquet is not a Parquet file"):
        make(Parquet, tmp_path).images("train")
    (tmp_path / "train.parquet").unlink()
    (tmp_path / "train").mkdir()
    (tmp_path / "train/data.arrow").write_bytes(b"text" * 10)
    with pytest.raises(ValueError, match=r"data\.arrow is not an Arrow file"):
        make(Parquet, tmp_path).images("train")


def test_without_pyarrow_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"data=parquet needs pyarrow: pip install 'retinue\[parquet\]'"):
        make(Parquet, tmp_path)
