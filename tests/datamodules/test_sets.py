"""Classification data sets: their content, their splits, and their messages for errors in folders."""

import gzip
import hashlib
import json
import pickle
import shutil
import struct

import numpy as np
import pytest
from PIL import Image

from datamodules.cifar10 import CIFAR10
from datamodules.digits import Digits
from datamodules.fashion_mnist import FashionMNIST
from datamodules.image_folder import ImageFolder
from datamodules.imagenet import ImageNet, readable_names, synsets
from datamodules.images import index_in_class
from tests.imagenet_folder import WNIDS, make_imagenet_folder

RNG = np.random.default_rng(0)


def arrays(images):
    return [images.image(i) for i in range(len(images))]


def test_index_in_class():
    assert index_in_class(np.array([2, 0, 2, 2, 0, 1])).tolist() == [0, 0, 1, 2, 1, 0]


def test_digits_have_fixed_splits():
    data = Digits(image_size=32, flip=False, augment={"hflip": 0.5})
    splits = {split: data.images(split) for split in ("train", "val", "test")}
    assert {split: len(images) for split, images in splits.items()} == {"train": 1255, "val": 185, "test": 357}
    distinct = {image.tobytes() for images in splits.values() for image in arrays(images)}
    assert len(distinct) == 1797
    assert hashlib.sha256(splits["test"].labels.tobytes()).hexdigest()[:16] == "b070f04a562e00f2"
    assert all(np.bincount(images.labels).min() >= 18 for images in splits.values())
    assert splits["train"][0]["image"].shape == (32, 32, 3)
    assert (data.num_classes, data.class_names[3], data.names("val")[:2]) == (
        10,
        "3",
        ["digits/val/00000", "digits/val/00001"],
    )
    # A mirrored digit is not a digit, so the recipe's hflip is not applied.
    assert data.augment.hflip == 0


def write_idx(path, array, compress):
    data = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.with_name(f"{path.name}.gz" if compress else path.name).write_bytes(gzip.compress(data) if compress else data)


@pytest.mark.parametrize("compress", [False, True])
def test_fashion_mnist(tmp_path, compress):
    train, test = (RNG.integers(0, 256, (n, 28, 28), np.uint8) for n in (100, 20))
    for stem, images in (("train", train), ("t10k", test)):
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte", images, compress)
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte", np.arange(len(images), dtype=np.uint8) % 10, compress)
    data = FashionMNIST(root=str(tmp_path), image_size=28)
    np.testing.assert_array_equal(np.stack(arrays(data.images("test")))[..., 0], test)
    assert [len(data.images(split)) for split in ("train", "val", "test")] == [90, 10, 20]
    assert sorted(data.images("val").labels) == list(range(10))
    np.testing.assert_array_equal(data.images("val").image(3)[..., 2], train[3])


def test_incomplete_fashion_mnist(tmp_path):
    with pytest.raises(ValueError, match=r"^no t10k-images-idx3-ubyte or t10k-images-idx3-ubyte.gz in .*fetch_data.py"):
        FashionMNIST(root=str(tmp_path)).images("test")
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.zeros((3, 28, 28), np.uint8), True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    for content in (path.read_bytes()[:-9], gzip.compress(gzip.decompress(path.read_bytes())[:-5]), b"GIF89a"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz cannot be read: "):
            FashionMNIST(root=str(tmp_path)).images("test")


@pytest.fixture(scope="module")
def cifar10():
    """Return images (120, 32, 32, 3), which are 20 per batch, and their labels (120,)."""
    return RNG.integers(0, 256, (120, 32, 32, 3), np.uint8), RNG.permutation(120) % 10


def write_cifar10(root, form, images, labels):
    root.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(names):
        rows = slice(20 * i, 20 * i + 20)
        batch_images, batch_labels = images[rows], labels[rows]
        planes = batch_images.transpose(0, 3, 1, 2).reshape(20, 3072)
        if form == "pickle":
            (root / name).write_bytes(pickle.dumps({b"data": planes, b"labels": batch_labels.tolist()}, protocol=2))
        elif form == "binary":
            records = np.concatenate([batch_labels[:, None].astype(np.uint8), planes], axis=1)
            (root / f"{name}.bin").write_bytes(records.tobytes())
        else:
            Image.fromarray(batch_images.reshape(20, 1024, 3)).save(root / f"{name}.png")
    if form == "png":
        (root / "train_lables.json").write_text(json.dumps(labels[:100].tolist()))
        (root / "test_lables.json").write_text(json.dumps(labels[100:].tolist()))


@pytest.mark.parametrize("form", ["pickle", "binary", "png"])
def test_cifar10_in_each_format(tmp_path, cifar10, form):
    images, labels = cifar10
    write_cifar10(tmp_path / "batches", form, images, labels)
    data = CIFAR10(root=str(tmp_path), image_size=32)
    test = data.images("test")
    np.testing.assert_array_equal(np.stack(arrays(test)), images[100:])
    assert test.labels.tolist() == labels[100:].tolist()
    held_out = index_in_class(labels[:100]) % 10 == 0
    for split, in_split in (("train", ~held_out), ("val", held_out)):
        np.testing.assert_array_equal(np.stack(arrays(data.images(split))), images[:100][in_split])
        assert data.images(split).labels.tolist() == labels[:100][in_split].tolist()


class RunsCode:
    def __reduce__(self):
        return print, ("this ran",)


def test_cifar10_runs_no_code(tmp_path, capsys):
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": RunsCode(), b"labels": [1]}, protocol=2))
    with pytest.raises(ValueError, match=r"test_batch is not a batch of CIFAR-10: it would run .*print"):
        CIFAR10(root=str(tmp_path)).images("test")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "name, content", [("test_batch", b"\x80\x02}."), ("test_batch.bin", b"123"), ("test_batch.png", b"1")]
)
def test_files_that_are_not_cifar10(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not a batch of CIFAR-10: "):
        CIFAR10(root=str(tmp_path)).images("test")


def write_images(folder, count):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(RNG.integers(0, 256, (9, 9, 3), np.uint8)).save(folder / f"{i}.png")


def test_image_folder_with_splits(tmp_path):
    for split, count in (("train", 4), ("val", 3), ("test", 2)):
        for name in ("dog", "cat"):
            write_images(tmp_path / split / name, count)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    data = ImageFolder(root=str(tmp_path))
    assert data.class_names == ["cat", "dog"]
    assert [len(data.images(split)) for split in ("train", "val", "test")] == [8, 6, 4]
    assert data.names("test") == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
    shutil.rmtree(tmp_path / "test")
    data = ImageFolder(root=str(tmp_path))
    assert data.names("test") == data.names("val")


def test_image_folder_with_class_folders_only(tmp_path):
    write_images(tmp_path / "cat" / "inner", 11)
    write_images(tmp_path / "dog", 6)
    data = ImageFolder(root=str(tmp_path))
    train, val = (set(data.names(split)) for split in ("train", "val"))
    assert (len(train), len(val), len(train | val)) == (12, 5, 17)
    assert sorted(name for name in val if name.startswith("dog")) == ["dog/0.png", "dog/5.png"]
    assert data.images("val").labels.tolist() == [0, 0, 0, 1, 1]
    assert data.names("test") == data.names("val")


def test_imagenet_with_folders_and_flat(tmp_path):
    folders = ImageNet(root=str(make_imagenet_folder(tmp_path / "a")), image_size=32)
    flat = ImageNet(root=str(make_imagenet_folder(tmp_path / "b", flat_val=True)), image_size=32)
    assert folders.class_names == flat.class_names == ["tench", "goldfish", "great white shark"]
    assert flat.images("val").labels.tolist() == folders.images("val").labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    for in_folder, in_flat in zip(arrays(folders.images("val")), arrays(flat.images("val")), strict=True):
        np.testing.assert_array_equal(in_folder, in_flat)
    assert folders.names("val")[0] == "n01440764/ILSVRC2012_val_00000001.JPEG"
    assert (len(folders.images("train")), folders.class_subset) == (36, None)


def test_imagenet_label_files(tmp_path):
    root = make_imagenet_folder(tmp_path, flat_val=True)
    expected = ImageNet(root=str(root)).images("val").labels.tolist()
    lines = [line.split() for line in (root / "val.txt").read_text().splitlines()]
    (root / "val.txt").unlink()
    rows = [f"{name.split('.')[0]},{WNIDS[int(label)]} 1 2 3 4" for name, label in lines]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows[::-1]]))
    assert ImageNet(root=str(root)).images("val").labels.tolist() == expected
    other = tmp_path / "elsewhere.txt"
    other.write_text("\n".join(f"{name} {WNIDS[int(label)]}" for name, label in lines))
    assert ImageNet(root=str(root), val_labels=str(other)).images("val").labels.tolist() == expected


def test_imagenet_classes(tmp_path):
    root = make_imagenet_folder(tmp_path, classes=4)
    two = [WNIDS[3], WNIDS[1]]
    folder = ImageNet(root=str(root), classes=two)
    assert folder.class_names == ["goldfish", "tiger shark"]
    assert (len(folder.images("train")), set(folder.images("val").labels), folder.class_subset) == (24, {0, 1}, None)
    whole = ImageNet(root=str(root), synsets="imagenet1k")
    assert (whole.num_classes, whole.class_subset, len(whole.images("val"))) == (1000, None, 24)
    assert set(whole.images("val").labels) == {0, 1, 2, 3}
    (tmp_path / "two.txt").write_text("\n".join(two))
    some = ImageNet(root=str(root), synsets="imagenet1k", classes=str(tmp_path / "two.txt"))
    assert (some.class_subset, set(some.images("val").labels)) == ([1, 3], {1, 3})
    named = ImageNet(root=str(root), synsets="imagenet1k", classes="imagenet_r")
    assert len(named.class_subset or []) == 200
    assert set(named.images("val").labels) <= set(named.class_subset or [])


def test_a_folder_for_evaluation_only(tmp_path):
    root = make_imagenet_folder(tmp_path / "in") / "val"
    data = ImageNet(root=str(root), synsets="imagenet1k")
    assert data.names("test")[0] == "n01440764/ILSVRC2012_val_00000001.JPEG"
    with pytest.raises(ValueError, match="has no train folder, so it is for evaluation only"):
        data.train_dataloader()


def test_readable_names():
    names = readable_names(synsets())
    assert len(set(names)) == 1000
    assert names[0] == "tench"
    assert sorted(name for name in names if name.startswith("crane")) == ["crane (n02012849)", "crane (n03126707)"]
    assert readable_names(["n01440764", "dishes"]) == ["tench", "dishes"]


def test_each_error_is_one_line(tmp_path):
    root = make_imagenet_folder(tmp_path / "whole", classes=2)
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "plain" / "cat", 2)
    (tmp_path / "hollow" / "n01440764").mkdir(parents=True)
    (tmp_path / "hollow" / "n01443537").mkdir()
    odd = make_imagenet_folder(tmp_path / "odd")
    (odd / "val" / WNIDS[2]).rename(odd / "val" / WNIDS[5])
    flat = make_imagenet_folder(tmp_path / "flat", flat_val=True)
    labels = (flat / "val.txt").read_text()
    (tmp_path / "half" / "train" / "cat").mkdir(parents=True)

    def relabelled(text):
        (flat / "val.txt").write_text(text)
        return ImageNet(root=str(flat)).images("val")

    cases = [
        (lambda: ImageNet(), "ImageNet needs a folder: data.root=FOLDER"),
        (lambda: ImageNet(root="/no/such"), "data.root=/no/such is missing"),
        (lambda: ImageNet(root=str(flat / "val.txt")), f"data.root={flat / 'val.txt'} is not a folder"),
        (lambda: Digits(root="here"), "data=digits is embedded and takes no data.root, not 'here'"),
        (lambda: CIFAR10(root=str(tmp_path / "empty")).images("val"), f"no CIFAR-10 in {tmp_path / 'empty'}"),
        (lambda: ImageFolder(root=str(tmp_path / "empty")).num_classes, f"no class folders in {tmp_path / 'empty'}"),
        (lambda: ImageNet(root=str(tmp_path / "empty")).num_classes, f"no class folders in {tmp_path / 'empty'}"),
        (
            lambda: ImageNet(root=str(tmp_path / "plain")).num_classes,
            "no class folders named by wnids, like n01440764, in",
        ),
        (lambda: ImageNet(root=str(tmp_path / "hollow")).images("val"), "no images in the class folders of"),
        (lambda: ImageFolder(root=str(tmp_path / "hollow")).images("val"), "no images in the class folders of"),
        (lambda: ImageFolder(root=str(tmp_path / "half")).num_classes, f"{tmp_path / 'half'} has no val folder"),
        (
            lambda: ImageNet(root=str(odd)).num_classes,
            "3 class folders in train but 3 in val: n01484850 in train, not in val",
        ),
        (lambda: ImageFolder(root=str(odd)).num_classes, "3 class folders in train but 3 in val: n01484850 in train"),
        (
            lambda: relabelled(labels[: labels.rindex("ILS")]),
            f"{flat / 'val.txt'} has no label for images that are in val: 1, like ",
        ),
        (
            lambda: relabelled(labels + "ILSVRC2012_val_9.JPEG 0"),
            f"{flat / 'val.txt'} has labels for images that are not",
        ),
        (lambda: relabelled(labels + "x.JPEG 3"), f"{flat / 'val.txt'}, line 19: '3' is not one of the 3 classes"),
        (lambda: relabelled(labels + "x.JPEG"), f"{flat / 'val.txt'}, line 19: expected a file name and a wnid"),
        (lambda: ImageNet(root=str(flat), val_labels="no.txt").images("val"), "data.val_labels=no.txt is missing"),
        (
            lambda: ImageNet(root=str(root), classes="imagenet_q"),
            "no list or file of classes is called 'imagenet_q'. Did",
        ),
        (
            lambda: ImageNet(root=str(root), classes=["n0"]).num_classes,
            "'n0' in data.classes is not one of the 2 classes of",
        ),
        (lambda: ImageNet(root=str(root), synsets="all"), "data.synsets must be folder or imagenet1k, not 'all'"),
        (lambda: Digits(in_chans=4), "data.in_chans must be 1 or 3, not 4"),
        (lambda: Digits(in_chans=1), "data.mean and data.std need 1 values for data.in_chans=1, not 3 and 3"),
        (
            lambda: Digits(interpolation="cubic"),
            "no interpolation is called 'cubic'; there are nearest, bilinear, bicubic",
        ),
        (lambda: Digits(crop_mode="middle"), "no crop_mode is called 'middle'; there are center, squash, border"),
        (lambda: Digits(crop_pct=1.5), "data.crop_pct must be above 0 and at most 1.2, not 1.5"),
        (lambda: Digits(broken_limit=2), "data.broken_limit must be a share from 0 to 1, not 2"),
        (lambda: Digits(batch_size=0), "batch_size must be at least 1, not 0"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith(message), (message, str(error.value))
        assert "\n" not in str(error.value)
    (flat / "val.txt").unlink()
    with pytest.raises(ValueError, match=r"has no class folders and there is no label file: expected val\.txt"):
        ImageNet(root=str(flat)).images("val")


def test_grey():
    data = Digits(
        in_chans=1, mean=[0.3], std=[0.3], batch_size=8, num_workers=0, augment={"auto_augment": "rand-m9-inc1"}
    )
    for loader in (data.train_dataloader(), data.test_dataloader()):
        assert next(iter(loader))["image"].shape[1] == 1
