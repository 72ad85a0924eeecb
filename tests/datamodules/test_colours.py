"""Colour changes of views: each does what it says, with its probability, and follows from the seed."""

import numpy as np
import pytest

from datamodules.colours import Colours
from datamodules.loader import private_rng, seed_rng
from datamodules.views import View, ViewTransform


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)


def changed(colours: Colours, image: np.ndarray, seed: int = 0) -> np.ndarray:
    with private_rng():
        seed_rng(seed)
        return colours(image)


def test_each_change_alone(image):
    assert np.array_equal(changed(Colours(), image), image)
    grey = changed(Colours(grey=1.0), image)
    assert (grey == grey[..., :1]).all()
    luma = image @ np.array([0.299, 0.587, 0.114])
    assert np.abs(grey[..., 0] - luma).max() <= 1
    assert np.array_equal(changed(Colours(solarize=1.0), image), np.where(image < 128, image, 255 - image))
    # Mean absolute difference of neighbours; the blur's deviation is from 0.1 to 2 pixels.
    blurred = [changed(Colours(blur=1.0), image, seed).astype(float) for seed in range(20)]
    steps = [np.abs(np.diff(picture, axis=0)).mean() for picture in (*blurred, image.astype(float))]
    assert min(steps) < 0.2 * steps[-1] < np.mean(steps) < 0.6 * steps[-1]
    brighter = changed(Colours(jitter=(0.4, 0, 0, 0), jitter_prob=1.0), image).astype(float)
    inner = (image > 0) & (brighter < 255)
    factors = (brighter[inner] + 0.5) / image[inner]
    assert 0.6 < np.median(factors) < 1.4 and abs(np.median(factors) - 1) > 0.01


def test_probabilities(image):
    small = image[:4, :4]
    counts = {"grey": 0, "solarize": 0, "jitter": 0}
    tries = 400
    for seed in range(tries):
        counts["grey"] += not np.array_equal(changed(Colours(grey=0.2), small, seed), small)
        counts["solarize"] += not np.array_equal(changed(Colours(solarize=0.2), small, seed), small)
        jitter = Colours(jitter=(0.4, 0.4, 0.2, 0.1), jitter_prob=0.8)
        counts["jitter"] += not np.array_equal(changed(jitter, small, seed), small)
    expected = {"grey": 0.2, "solarize": 0.2, "jitter": 0.8}
    for name, p in expected.items():
        # Four standard deviations
        assert abs(counts[name] / tries - p) < 4 * (p * (1 - p) / tries) ** 0.5, name


def test_follows_from_the_seed_and_keeps_grey_images_grey(image):
    colours = Colours(jitter=(0.4, 0.4, 0.2, 0.1), grey=0.2, blur=0.5, solarize=0.2)
    assert np.array_equal(changed(colours, image, 3), changed(colours, image, 3))
    assert not np.array_equal(changed(colours, image, 3), changed(colours, image, 4))
    assert changed(colours, image[..., :1]).shape == (12, 10, 1)


@pytest.mark.parametrize("wrong", [{"blur": 1.5}, {"jitter": (0.4, 0.4, 0.2)}, {"jitter": (0.4, 0.4, 0.2, 0.6)}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"a view's colours.{next(iter(wrong))} must be"):
        Colours(**wrong)


def transform(views: dict[str, dict]) -> ViewTransform:
    kinds = [View.from_config(view) for view in views.values()]
    return ViewTransform(
        kinds, {}, 32, flip=False, mean=(0.5, 0.5, 0.5), in_chans=3, bands=False, mask_patch=lambda side: 4
    )


def test_views_have_their_own_sizes_and_colours():
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    views = {
        "plain": {},
        "grey": {"number": 2, "share": 0.43, "colours": {"grey": 1.0, "jitter": [0.4, 0.4, 0.2, 0.1]}},
    }
    with private_rng():
        seed_rng(0)
        plain, first, second = (view["image"] for view in transform(views)({"image": image})["views"])
    assert plain.shape == (32, 32, 3) and first.shape == second.shape == (16, 16, 3)
    assert not (plain == plain[..., :1]).all()
    assert (first == first[..., :1]).all() and (second == second[..., :1]).all()
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(("side", "share", "expected"), [(224, 0.43, 96), (32, 0.43, 16), (224, 1.0, 224), (8, 0.1, 8)])
def test_a_share_of_the_image_is_a_multiple_of_eight_pixels(side, share, expected):
    assert View(share=share).side(side) == (expected, expected)
