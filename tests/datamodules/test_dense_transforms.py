"""Images, boxes and masks go through every transform together."""

import colorsys
import random

import numpy as np
import pytest
import torch

from datamodules.dense_transforms import (
    DenseAugment,
    DenseEvalTransform,
    DenseTrainTransform,
    crop_resize_flip,
    distort,
    fit_size,
    normalise_padded,
    pad_images,
    tight_boxes,
)
from retinue.utils.masks import IGNORED

COLOURS = np.array([[250, 20, 20], [20, 250, 20], [20, 20, 250], [240, 240, 20]], np.uint8)
POLICIES = {
    "one size": {"sizes": [[200, 333]], "hflip": 0.5},
    "several sizes": {"sizes": [[100, 200], [150, 333], [300, 500]], "hflip": 0.5},
    "DETR": {"sizes": [[150, 333], [200, 333]], "detr_crop": True, "hflip": 0.5},
    "large-scale jitter": {"sizes": [[256, 256]], "ratio": [0.1, 2.0], "crop": [256, 256], "hflip": 0.5},
    "segmentation": {"sizes": [[128, 512]], "ratio": [0.5, 2.0], "crop": [128, 128], "cat_max_ratio": 0.75},
}


def make_sample(height=180, width=240):
    """Return four rectangles, each of one colour, on black, with boxes, instance masks and a semantic mask."""
    boxes = np.array([[10, 20, 70, 80], [100, 30, 230, 90], [40, 100, 90, 170], [150, 110, 180, 140]], np.float32)
    image, mask = np.zeros((height, width, 3), np.uint8), np.full((height, width), 9, np.uint8)
    masks = np.zeros((len(boxes), height, width), np.uint8)
    for label, (x1, y1, x2, y2) in enumerate(boxes.astype(int)):
        image[y1:y2, x1:x2], mask[y1:y2, x1:x2], masks[label, y1:y2, x1:x2] = COLOURS[label], label, 1
    ignored = np.array([[0, 0, 240, 15], [200, 150, 240, 180]], np.float32)
    return {"image": image, "boxes": boxes, "labels": np.arange(4), "masks": masks, "mask": mask, "ignored": ignored}


def iou(a, b):
    return (a & b).sum() / max(1, (a | b).sum())


@pytest.mark.parametrize("policy", POLICIES)
def test_image_boxes_and_masks_move_together(policy):
    transform = DenseTrainTransform(DenseAugment.from_config(POLICIES[policy]), (200, 333))
    random.seed(0)
    shapes, counts = set(), set()
    for _ in range(30):
        sample = transform(make_sample())
        height, width = sample["image"].shape[:2]
        shapes.add((height, width))
        counts.add(len(sample["boxes"]))
        assert sample["mask"].shape == (height, width)
        assert sample["masks"].shape == (len(sample["boxes"]), height, width)
        assert len(sample["labels"]) == len(sample["boxes"])
        assert sample["boxes"].dtype == sample["ignored"].dtype == np.float32
        limits = np.array([width, height, width, height])
        for boxes in (sample["boxes"], sample["ignored"]):
            assert (boxes >= 0).all()
            assert (boxes <= limits).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
        for label, box, mask in zip(sample["labels"], sample["boxes"], sample["masks"], strict=True):
            if mask.sum() < 400:
                continue
            visible = np.abs(sample["image"].astype(int) - COLOURS[label]).max(-1) < 110
            assert iou(visible, mask == 1) > 0.85
            assert iou(sample["mask"] == label, mask == 1) == 1
            assert np.abs(tight_boxes(mask[None])[0] - box).max() <= 1
    assert len(shapes) > 1 or policy in ("one size", "segmentation")
    assert (len(counts) > 1) == (policy in ("DETR", "large-scale jitter", "segmentation"))


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_fit_their_masks_exactly(flip):
    sample = make_sample()
    # The new size is a whole multiple of the old one, so that no pixel is split.
    whole = crop_resize_flip(sample, (0, 0, 180, 240), (360, 720), flip)
    assert np.array_equal(whole["boxes"], tight_boxes(whole["masks"]))
    assert np.array_equal(whole["labels"], range(4))
    x1, y1, x2, y2 = (sample["boxes"] * [3, 2, 3, 2]).T
    expected = np.stack([720 - x2, y1, 720 - x1, y2] if flip else [x1, y1, x2, y2], axis=1)
    assert np.array_equal(whole["boxes"], expected)
    assert np.array_equal(whole["ignored"][:, 0], [0, 0] if flip else [0, 600])
    # The arrays belong to the data set and must not change.
    assert np.array_equal(sample["boxes"], make_sample()["boxes"])


def test_parts_outside_the_window_are_removed():
    sample = make_sample()
    # The object becomes an L: left of x = 130 its upper part is missing.
    sample["masks"][1, :60, 100:130] = 0
    out = crop_resize_flip(sample, (0, 0, 95, 130), (95, 130))
    assert out["labels"].tolist() == [0, 1]
    assert out["boxes"].tolist() == [[10, 20, 70, 80], [100, 60, 130, 90]]
    assert out["ignored"].tolist() == [[0, 0, 130, 15]]
    # Now the window contains no part of the object.
    sample["masks"][1, 60:90, 100:130] = 0
    assert crop_resize_flip(sample, (0, 0, 95, 130), (95, 130))["labels"].tolist() == [0]
    del sample["masks"]
    out = crop_resize_flip(sample, (0, 0, 95, 130), (95, 130))
    assert out["boxes"].tolist() == [[10, 20, 70, 80], [100, 30, 130, 90]]
    empty = crop_resize_flip(make_sample(), (0, 232, 8, 8), (16, 16))
    assert empty["boxes"].shape == (0, 4)
    assert empty["masks"].shape == (0, 16, 16)


def test_samples_without_objects():
    sample = make_sample() | {key: make_sample()[key][:0] for key in ("boxes", "labels", "masks", "ignored")}
    for policy in POLICIES.values():
        out = DenseTrainTransform(DenseAugment.from_config(policy), (200, 333))(sample)
        assert out["boxes"].shape == (0, 4)
        assert out["masks"].shape == (0, *out["image"].shape[:2])


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((480, 640), (800, 1333), (800, 1067)),
        ((640, 427), (800, 1333), (1199, 800)),
        ((300, 1200), (800, 1333), (333, 1333)),
        ((1024, 2048), (1024, 2048), (1024, 2048)),
        ((1, 5000), (100, 100), (1, 100)),
    ],
)
def test_sizes_keep_the_ratio_within_the_limits(size, limits, expected):
    assert fit_size(size, limits) == expected
    sample = {"image": np.zeros((*size, 3), np.uint8), "mask": np.zeros(size, np.uint8)}
    out = DenseEvalTransform(limits)(sample)
    assert out["image"].shape[:2] == expected
    assert out["original_size"].tolist() == list(size)
    assert out["mask"].shape == size


def test_detr_crops_half_of_the_images_to_sides_of_384_to_600():
    rows, columns = np.mgrid[:480, :640]
    # The value of each pixel is its position.
    image = np.stack([columns % 256, columns // 256, rows // 2], axis=-1).astype(np.uint8)
    transform = DenseTrainTransform(DenseAugment(detr_crop=True, sizes=((480, 1333),)), (480, 640))
    random.seed(1)
    # Share of the image's height that each result covers.
    shares = []
    for _ in range(200):
        rows_of_result = transform({"image": image})["image"][..., 2]
        shares.append((int(rows_of_result.max()) - int(rows_of_result.min())) / 239)
    cropped = np.array([share for share in shares if share < 0.999])
    # Half of the images are cropped, and some crops take the whole height.
    assert 60 < len(cropped) < 130
    # The smallest share is the smallest crop of the largest size.
    assert 384 / 600 - 0.01 <= cropped.min() < 0.7
    assert cropped.max() > 0.9


def test_no_class_covers_nearly_the_whole_crop():
    mask = np.zeros((100, 400), np.uint8)
    # In a sixth of the crops, either class covers at most 75 %.
    mask[:, 300:], mask[:50] = 1, IGNORED
    sample = {"image": np.zeros((100, 400, 3), np.uint8), "mask": mask}
    uneven = {}
    for max_share in (None, 0.75):
        augment = DenseAugment(sizes=((100, 400),), crop=(100, 100), cat_max_ratio=max_share)
        random.seed(0)
        crops = [DenseTrainTransform(augment, (100, 400))(sample)["mask"] for _ in range(100)]
        uneven[max_share] = np.mean([not 0.25 <= (crop == 1).sum() / (crop != IGNORED).sum() <= 0.75 for crop in crops])
    assert uneven[None] > 0.7
    # Ten tries fail with a probability of (5/6)^10 = 0.16.
    assert uneven[0.75] < 0.3


def fix_random_numbers(monkeypatch, draws, values):
    """Let Python's generator return `draws` (below 0.5 a change is made) and `values` (the amounts of the changes)."""
    draws, values = iter(draws), iter(values)
    monkeypatch.setattr(random, "random", lambda: next(draws))
    monkeypatch.setattr(random, "uniform", lambda low, high: next(values))


def test_photometric_distortion_follows_its_formulas(monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
    values = image.astype(float)
    order = ["brightness", "contrast", "contrast first", "saturation", "hue"]

    def draws(*changes):
        return [0.1 if name in changes else 0.9 for name in order]

    fix_random_numbers(monkeypatch, draws(), [])
    assert np.array_equal(distort(image), image)
    fix_random_numbers(monkeypatch, draws("brightness", "contrast", "contrast first"), [20, 0.5])
    assert np.array_equal(distort(image), ((values + 20).clip(0, 255) * 0.5).round())
    fix_random_numbers(monkeypatch, draws("contrast"), [1.5])
    assert np.array_equal(distort(image), (values * 1.5).round().clip(0, 255))
    fix_random_numbers(monkeypatch, draws("saturation", "hue"), [0.6, 0.1])
    expected = [colorsys.rgb_to_hsv(*pixel) for pixel in values.reshape(-1, 3) / 255]
    expected = np.array([colorsys.hsv_to_rgb((h + 0.1) % 1, s * 0.6, v) for h, s, v in expected]).reshape(image.shape)
    # The intermediate hue and saturation are rounded to bytes.
    assert np.abs(distort(image) - 255 * expected).max() < 8


def test_photometric_distortion_covers_its_ranges():
    image = np.full((4, 4, 3), (90, 120, 150), np.uint8)
    random.seed(0)
    out = np.array([distort(image)[0, 0] for _ in range(400)], int)
    assert 0.03 < np.mean((out == (90, 120, 150)).all(1)) < 0.1  # a sixteenth
    assert out[:, 1].min() < 60
    assert out[:, 1].max() > 180
    # The hue never changes enough for this order of the channels.
    assert (out[:, 0] > out[:, 2]).sum() == 0


def test_padding_is_zero_after_normalising():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (height, width, 3), np.uint8) for height, width in ((20, 30), (32, 17))]
    batch, sizes = pad_images(images, (32, 64))
    assert batch.shape == (2, 3, 32, 64)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert sizes.tolist() == [[20, 30], [32, 17]]
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    out = normalise_padded(batch, sizes, mean, std)
    for image, (h, w), normalised in zip(images, sizes.tolist(), out, strict=True):
        expected = torch.from_numpy((image / 255 - mean) / std).permute(2, 0, 1).float()
        torch.testing.assert_close(normalised[:, :h, :w], expected)
        assert normalised[:, h:].abs().sum() == normalised[:, :, w:].abs().sum() == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": [[800, 1333]]}, "augment has no 'size'. Did you mean 'sizes'?"),
        ({"sizes": []}, "augment.sizes must be one or more pairs"),
        ({"sizes": 800}, "augment.sizes must be one or more pairs"),
        ({"sizes": [800, 1333]}, "augment.sizes must be one or more pairs"),
        ({"sizes": [[1333, 800]]}, "augment.sizes must be one or more pairs"),
        ({"ratio": [2.0, 0.5]}, "augment.ratio must be"),
        ({"ratio": 2.0}, "augment.ratio must be"),
        ({"ratio": [0.5, 2.0], "sizes": [[400, 600], [500, 600]]}, "a single pair if augment.ratio is set"),
        ({"crop": 512}, "augment.crop must be"),
        ({"crop": [0, 512]}, "augment.crop must be"),
        ({"cat_max_ratio": 0.75}, "augment.cat_max_ratio must be null if augment.crop is null"),
        ({"cat_max_ratio": 75, "crop": [9, 9]}, "augment.cat_max_ratio must be above 0"),
        ({"hflip": 1.5}, "augment.hflip must be from 0 to 1"),
    ],
)
def test_wrong_augmentations_are_refused(config, message):
    with pytest.raises(ValueError) as error:
        DenseAugment.from_config(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
