"""Segmentation data: pairs of images and masks, the meaning of mask values, batches, and errors in folders."""

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.ade20k import ADE20K
from datamodules.cityscapes import CLASSES, Cityscapes
from datamodules.mask_folder import MaskFolder
from datamodules.segmentation import MaskedImages, pair_files

RNG = np.random.default_rng(0)


def write(path, array, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette is not None:
        image.putpalette(palette)
    image.save(path)


def write_pair(root, split, name, mask, suffix=".png"):
    """Write a mask and a random image of the same size, and return the image."""
    image = RNG.integers(0, 256, (*mask.shape, 3), np.uint8)
    write(root / f"images/{split}/{name}{suffix}", image)
    write(root / f"masks/{split}/{name}.png", mask)
    return image


@pytest.fixture
def folder(tmp_path):
    """Write three training and three validation pairs of different sizes with the mask values 0, 1, 2 and 255."""
    for split in ("train", "val"):
        for i, size in enumerate([(40, 60), (60, 40), (50, 50)]):
            write_pair(tmp_path, split, f"{i}", RNG.choice(np.array([0, 1, 2, 255], np.uint8), size))
    return tmp_path


def mask_folder(root, **args):
    defaults = {"classes": ["floor", "cat", "dog"], "image_size": (32, 64), "batch_size": 3, "num_workers": 0}
    return MaskFolder(root=str(root), **defaults | args)


def read_labels(root, **args):
    """Return the labels for the values 0, 1, 2, 3 and 255 of a mask file."""
    write_pair(root, "train", "a/x", np.array([[0, 1, 2, 3, 255]], np.uint8))
    write_pair(root, "val", "x", np.zeros((1, 5), np.uint8))
    return mask_folder(root, **args).images("train")[0]["mask"].tolist()[0]


def test_labels_of_mask_values(tmp_path):
    assert read_labels(tmp_path, classes=4) == [0, 1, 2, 3, 255]
    assert read_labels(tmp_path, classes=3, ignore=[3]) == [0, 1, 2, 255, 255]
    assert read_labels(tmp_path, classes=["a", "b", "c"], background_ignored=True) == [255, 0, 1, 2, 255]
    assert read_labels(tmp_path, classes=2, background_ignored=True, ignore=[3]) == [255, 0, 1, 255, 255]
    with pytest.raises(
        ValueError, match=r"masks/train/a/x\.png has the value 3: none of the 3 classes, and not ignored"
    ):
        read_labels(tmp_path, classes=3)


@pytest.mark.parametrize("kind", ["palette", "16 bits", "1 bit"])
def test_png_formats(tmp_path, kind):
    mask = RNG.integers(0, 2, (6, 7)).astype(np.uint8)
    write_pair(tmp_path, "train", "x", mask)
    path = tmp_path / "masks/train/x.png"
    if kind == "palette":
        write(path, mask, palette=[200, 0, 0, 0, 200, 0])
    else:
        write(path, mask.astype(np.uint16) if kind == "16 bits" else mask.astype(bool))
    write_pair(tmp_path, "val", "x", mask)
    data = mask_folder(tmp_path)
    np.testing.assert_array_equal(data.images("train")[0]["mask"], mask)
    if kind == "16 bits":
        write(path, mask.astype(np.uint16) + 511)
        with pytest.raises(ValueError, match=r"x\.png has the value 51[12]: none of the 3 classes"):
            data.images("train")[0]


@pytest.mark.parametrize("arguments", [{"classes": ["floor", "cat"]}, {"classes": ["cat"], "background_ignored": True}])
@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_of_0_and_255_are_an_error_that_says_what_to_do(tmp_path, split, arguments):
    """Such masks trained on the background alone, and the mIoU was 1."""
    for other in ("train", "val"):
        values = [0, 255] if other == split else [0, 1, 255]
        for name in "abc":
            write_pair(tmp_path, other, name, np.array([values], np.uint8))
    data = mask_folder(tmp_path, **arguments)
    with pytest.raises(
        ValueError, match=f"masks/{split}: no mask has a pixel of cat, and 255 marks pixels that are ig"
    ):
        data.images(split)
    values = [255] if "background_ignored" in arguments else [0, 255]
    data = mask_folder(
        tmp_path, classes=arguments["classes"], values=values, ignore=[0, 1] if len(values) == 1 else [1]
    )
    image = data.images(split)
    assert image[0]["mask"][0].tolist() == ([255, 0] if len(values) == 1 else [0, 1])
    assert image.mask_values.tolist() == values and data.background == (None if len(values) == 1 else 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": [0, 1]}, r"data.values must be 3 different mask values from 0 to 255, not \[0, 1\]"),
        ({"values": [0, 1, 1]}, "data.values must be 3 different mask values"),
        ({"values": [0, 1, 256]}, "data.values must be 3 different mask values"),
        ({"values": [1, 2, 3], "background_ignored": True}, r"data.ignore=\[0\], not data.background_ignored"),
        ({"values": [0, 1, 255], "ignore": [255]}, "data.ignore has 255, the mask value of class 'dog'"),
    ],
)
def test_wrong_mask_values_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        mask_folder(tmp_path, **arguments)


def test_classes_without_a_pixel_are_warned_of_once(tmp_path, caplog):
    for split in ("train", "val"):
        write_pair(tmp_path, split, "a", np.array([[0, 1]], np.uint8))
        write_pair(tmp_path, split, "b", np.array([[0, 0]], np.uint8))
    data = mask_folder(tmp_path)
    for split in ("train", "val", "train", "test"):
        data.images(split)
    assert [record.getMessage() for record in caplog.records if "pixel" in record.getMessage()] == [
        f"{tmp_path / 'masks/train'}: no training mask has a pixel of dog, so it cannot be learnt"
    ]


def test_few_masks_are_read_where_all_classes_occur(tmp_path, monkeypatch):
    for split in ("train", "val"):
        for i in range(20):
            write_pair(tmp_path, split, f"{i}", np.array([[0, 1, 2]], np.uint8))
    read = []
    original = MaskedImages.mask
    monkeypatch.setattr(MaskedImages, "mask", lambda self, index: read.append(index) or original(self, index))
    data = mask_folder(tmp_path)
    data.images("train")
    data.images("val")
    assert len(read) == 2


def test_ade20k(tmp_path):
    mask = np.arange(151, dtype=np.uint8).reshape(1, 151)
    image = RNG.integers(0, 256, (1, 151, 3), np.uint8)
    for split, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        write(tmp_path / f"images/{split}/{name}.jpg", image)
        write(tmp_path / f"annotations/{split}/{name}.png", mask)
    data = ADE20K(root=str(tmp_path), image_size=[512, 2048])
    assert (data.num_classes, data.class_names[0], data.class_names[-1], data.class_names[44]) == (
        150,
        "wall",
        "flag",
        "chest of drawers",
    )
    assert len(set(data.class_names)) == 150
    # Without a test split, the validation split is tested.
    assert data.names("test") == ["ADE_val_00000001.jpg"]
    assert data.images("train")[0]["mask"].tolist() == [[255, *range(150)]]


def test_cityscapes(tmp_path):
    ids = np.arange(34, dtype=np.uint8).reshape(1, 34)
    train_ids = np.array([[*range(19), 255]], np.uint8)
    for split, what, mask in (("train", "labelIds", ids), ("val", "labelTrainIds", train_ids)):
        name = f"{split}/ulm/ulm_000000_000019_"
        write(tmp_path / f"leftImg8bit/{name}leftImg8bit.png", np.zeros((*mask.shape, 3), np.uint8))
        write(tmp_path / f"gtFine/{name}gtFine_{what}.png", mask)
        write(tmp_path / f"gtFine/{name}gtFine_color.png", mask)
        write(tmp_path / f"gtFine/{name}gtFine_instanceIds.png", mask)
    data = Cityscapes(root=str(tmp_path), image_size=[512, 1024])
    mask = data.images("train")[0]["mask"][0].tolist()
    assert {i: data.class_names[label] for i, label in enumerate(mask) if label != 255} == CLASSES
    assert (CLASSES[7], CLASSES[26], CLASSES[33], len(CLASSES)) == ("road", "car", "bicycle", 19)
    assert data.images("val")[0]["mask"].tolist() == train_ids.tolist()


def test_training_batches(folder):
    data = mask_folder(folder, augment={"ratio": [0.5, 1.2], "crop": [48, 48], "hflip": 0.5})
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert sorted(batch) == ["image", "index", "mask", "seed"]
    assert (batch["image"].dtype, batch["image"].shape) == (torch.float32, (3, 3, 48, 48))
    assert (batch["mask"].dtype, batch["mask"].shape) == (torch.int64, (3, 48, 48))
    assert sorted(batch["index"].tolist()) == [0, 1, 2]
    padded = (batch["image"] == 0).all(1)
    # Images are zero only where they are padded, and masks are padded there too.
    assert (batch["mask"][padded] == 255).all()
    assert padded.any() and not padded.all()


def test_masks_stay_aligned_with_their_images(tmp_path):
    """Mask and image show the same blocks of classes, so that they can be compared after any change of geometry."""
    levels = np.array([20, 120, 220])
    for split in ("train", "val"):
        for i in range(4):
            blocks = RNG.integers(0, 3, (4, 5)).repeat(16, axis=0).repeat(16, axis=1)
            write(tmp_path / f"images/{split}/{i}.png", levels[blocks][..., None].repeat(3, 2).astype(np.uint8))
            write(tmp_path / f"masks/{split}/{i}.png", blocks.astype(np.uint8))
    augment = {"ratio": [0.5, 2.0], "crop": [64, 64], "hflip": 0.5, "cat_max_ratio": 0.75}
    data = mask_folder(tmp_path, augment=augment, image_size=(64, 80), batch_size=4, mean=(0, 0, 0), std=(1, 1, 1))
    loader = data.train_dataloader()
    agree = []
    for epoch in range(5):
        loader.set_epoch(epoch)
        for batch in loader:
            batch = data.on_after_batch_transfer(batch, 0)
            label = (batch["image"][:, :1] * 255 - torch.from_numpy(levels)[:, None, None]).abs().argmin(1)
            agree.append((label == batch["mask"])[batch["mask"] != 255].float().mean())
    # The edges of the blocks are blurred and may differ.
    assert torch.stack(agree).min() > 0.9


def test_without_a_crop_batches_are_padded_to_multiples_of_32(folder):
    data = mask_folder(folder, mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7))
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    # The images are 32 x 48, 48 x 32 and 32 x 32 without the padding.
    assert batch["image"].shape == (3, 3, 64, 64)
    i = batch["index"].tolist().index(2)
    assert (batch["mask"][i, 32:] == 255).all() and (batch["mask"][i, :, 32:] == 255).all()
    assert not batch["image"][i, :, 32:].any() and not batch["image"][i, :, :, 32:].any()
    assert (batch["image"][i, :, :32, :32] != 0).any(0).all()


def test_evaluation_batches(folder):
    mean, std = (0.2, 0.3, 0.4), (0.5, 0.6, 0.7)
    data = mask_folder(folder, batch_size=2, mean=mean, std=std)
    first, last = (data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader())
    assert sorted(first) == ["image", "index", "mask", "original_sizes"]
    assert [tuple(image.shape) for image in first["image"]] == [(3, 32, 48), (3, 48, 32)]
    assert first["image"][0].dtype == torch.float32
    assert first["original_sizes"].tolist() == [[40, 60], [60, 40]]
    assert (first["index"].tolist(), last["index"].tolist()) == ([0, 1], [2])
    for i, mask in enumerate(first["mask"]):
        assert mask.dtype == torch.int64
        np.testing.assert_array_equal(mask, Image.open(folder / f"masks/val/{i}.png"))
    unresized = mask_folder(folder, image_size=(50, 50), mean=mean, std=std)
    *_, image = next(iter(unresized.val_dataloader()))["image"]
    np.testing.assert_array_equal(image, np.array(Image.open(folder / "images/val/2.png")).transpose(2, 0, 1))
    normalised = unresized.on_after_batch_transfer(next(iter(unresized.val_dataloader())), 0)["image"][2]
    expected = (image / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(normalised, expected)


def test_batches_do_not_depend_on_workers(folder):
    augment = {"ratio": [0.5, 2.0], "crop": [32, 40], "hflip": 0.5, "cat_max_ratio": 0.75, "photometric": True}
    batches = [next(iter(mask_folder(folder, augment=augment, num_workers=n).train_dataloader())) for n in (0, 2)]
    for key in ("image", "mask", "index"):
        assert torch.equal(batches[0][key], batches[1][key])


def test_no_mirroring_if_it_changes_classes(folder):
    assert mask_folder(folder, augment={"hflip": 0.5}).augment.hflip == 0.5
    assert mask_folder(folder, augment={"hflip": 0.5}, flip=False).augment.hflip == 0


def test_files_that_cannot_be_read_are_left_out(folder, caplog):
    (folder / "images/val/0.png").write_bytes(b"GIF89a")
    (folder / "masks/val/1.png").write_bytes((folder / "masks/val/1.png").read_bytes()[:60])
    data = mask_folder(folder, broken_limit=0.7)
    (batch,) = data.val_dataloader()
    assert batch["index"].tolist() == [-1, -1, 2]
    assert (batch["mask"][0] == 255).all()
    assert "broken image skipped: 0.png" in caplog.text and "1.png (its mask " in caplog.text


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda root: (root / "masks/val/1.png").unlink(),
            r"1\.png: image without its mask in .*masks/val \(looked for 1\.png; 1 of 3",
        ),
        (
            lambda root: (root / "images/val/1.png").unlink(),
            r"1\.png: mask without its image in .*images/val \(looked for 1\{\.jpg,.*; 1 of 3",
        ),
        (
            lambda root: [p.unlink() for p in (root / "images/val").iterdir()],
            r"^no images in .*images/val \(looked for",
        ),
        (
            lambda root: write(root / "images/val/1.jpg", np.zeros((9, 9), np.uint8)),
            r"1\.jpg and 1\.png in .* the same name",
        ),
        (
            lambda root: write(root / "masks/val/0.png", np.zeros((9, 8), np.uint8)),
            r"masks/val/0\.png is 8 x 9 px, but its image is 60 x 40",
        ),
        (
            lambda root: write(root / "masks/val/0.png", np.zeros((9, 8, 3), np.uint8)),
            r"masks/val/0\.png is RGB: a mask",
        ),
        (lambda root: write(root / "masks/val/0.png", np.full((40, 60), 9, np.uint8)), r"0\.png has the value 9: none"),
        (lambda root: (root / "masks/val").rename(root / "masks/validation"), r"^there is no folder .*masks/val$"),
    ],
)
def test_errors_in_folders(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        mask_folder(folder).images("val")[0]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "args, message",
    [
        ({"classes": None}, r"data.classes=\[NAME, ...\] or data.classes=COUNT"),
        ({"classes": "cat"}, r"data.classes=\[NAME, ...\] or data.classes=COUNT, not 'cat'"),
        ({"ignore": 3}, r"data.ignore must be a list of mask values, like \[3\], not 3"),
        ({"ignore": ["cat"]}, "data.ignore must be a list of mask values"),
        ({"classes": 0}, "must be 1 to 255 classes, not 0"),
        ({"classes": ["a", "b", "a"]}, "names 'a' twice"),
        ({"ignore": [256]}, "from 0 to 255, not 256"),
        ({"ignore": [2]}, "data.ignore has 2, the mask value of class 'dog'"),
        ({"image_size": (64, 32)}, r"must be \[short, long\] with 0 < short <= long, not \(64, 32\)"),
        ({"in_chans": 1, "mean": [0.5], "std": [0.5]}, "data.in_chans must be 3 for detection and segmentation, not 1"),
        ({"augment": {"hflp": 0.5}}, "augment has no 'hflp'. Did you mean 'hflip'"),
    ],
)
def test_invalid_arguments(folder, args, message):
    with pytest.raises(ValueError, match=message):
        mask_folder(folder, **args)


def test_pairs_have_equal_paths(tmp_path):
    mask = np.zeros((4, 4), np.uint8)
    for name in ("b/1", "a/1", "a/x.y"):
        write(tmp_path / f"images/{name}_image.JPG", mask)
        write(tmp_path / f"masks/{name}_mask.png", mask)
    write(tmp_path / "images/a/1_other.png", mask)
    assert pair_files(tmp_path / "images", tmp_path / "masks", "_image", "_mask") == [
        ("a/1_image.JPG", "a/1_mask.png"),
        ("a/x.y_image.JPG", "a/x.y_mask.png"),
        ("b/1_image.JPG", "b/1_mask.png"),
    ]
    with pytest.raises(ValueError, match=r"^there is no folder .*nowhere$"):
        pair_files(tmp_path / "nowhere", tmp_path / "masks")
