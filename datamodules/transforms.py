"""Per-sample transforms on the CPU: a sample's `image` goes from uint8 (H, W, 3) to uint8 (h, w, C).

What is cheaper or only possible in batches (normalising, erasing, mixing) is in `datamodules.batch`.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.data.transforms_factory import transforms_imagenet_eval, transforms_imagenet_train
from torch.nn.functional import interpolate
from torchvision.transforms import Compose

from datamodules.auto_augment import quicken
from retinue.utils.suggestions import nearest

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels


@dataclass(frozen=True, kw_only=True)
class Augment:
    """A recipe's augmentation: all of a recipe's `augment` section. What is not named is off.

    Attributes:
        scale: share of the image's area that a random resized crop takes, (least, most). None: the shorter side is
            resized to the image size and a random square is taken (DeiT III's simple random crop).
        ratio: aspect ratio of the random resized crop, (least, most).
        pad_crop: pixels by which the image is padded (mirrored) before the random square is taken; with scale=None.
        interpolation: bilinear, bicubic, or random (one of the two a sample).
        hflip, vflip: probability of mirroring.
        auto_augment: timm's strings: `rand-m9-mstd0.5-inc1` (RandAugment, arXiv:1909.13719), `original`, `v0`, ...
            (AutoAugment, arXiv:1805.09501), `augmix-m3-w3` (arXiv:1912.02781), `3a` (grey, solarize or blur: DeiT III,
            arXiv:2204.07118).
        color_jitter: strength for brightness, contrast and saturation. timm leaves it out where `auto_augment` is set;
            here it is what it says.
        repeats: times that an image stands in the order of an epoch (repeated augmentation).
        erasing: probability of random erasing (arXiv:1708.04896); `erasing_mode`: pixel, rand or const.
        mixup, cutmix: alpha of MixUp (arXiv:1710.09412) and CutMix (arXiv:1905.04899), one of them a batch.
        mixup_prob: probability that a batch is mixed; `switch_prob`: that it is CutMix where both are on.
        label_smoothing: share of a mixed target that is spread over all classes (without mixing, the loss smooths).
    """

    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    pad_crop: int = 0
    interpolation: str = "bicubic"
    hflip: float = 0.0
    vflip: float = 0.0
    auto_augment: str | None = None
    color_jitter: float = 0.0
    repeats: int = 1
    erasing: float = 0.0
    erasing_mode: str = "pixel"
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    switch_prob: float = 0.5
    label_smoothing: float = 0.0

    @classmethod
    def from_config(cls, config: Mapping | None) -> "Augment":
        """Raises: ValueError: a key is unknown or a value out of its range."""
        values = known_fields(cls, config)
        for key in ("scale", "ratio"):
            if values.get(key) is not None:
                values[key] = tuple(values[key])
        augment = cls(**values)
        augment._check()
        return augment

    def _check(self) -> None:
        def expect(right: bool, key: str, what: str) -> None:
            if not right:
                raise ValueError(f"augment.{key} must be {what}, not {getattr(self, key)!r}")

        for key in ("hflip", "vflip", "erasing", "mixup_prob", "switch_prob", "label_smoothing"):
            expect(0 <= getattr(self, key) <= 1, key, "from 0 to 1")
        for key in ("color_jitter", "mixup", "cutmix", "pad_crop"):
            expect(getattr(self, key) >= 0, key, "0 or more")
        for key, most in (("scale", 1.0), ("ratio", float("inf"))):
            pair = getattr(self, key)
            if key == "ratio" or pair is not None:
                ordered = isinstance(pair, tuple) and len(pair) == 2 and 0 < pair[0] <= pair[1] <= most
                expect(ordered, key, "(least, most)" + (" with 0 < least <= most <= 1" if key == "scale" else ""))
        expect(isinstance(self.repeats, int) and self.repeats >= 1, "repeats", "a whole number from 1 up")
        expect(self.interpolation in ("bilinear", "bicubic", "random"), "interpolation", "bilinear, bicubic or random")
        expect(self.erasing_mode in ("pixel", "rand", "const"), "erasing_mode", "pixel, rand or const")


def known_fields(augment: type, config: Mapping | None) -> dict[str, Any]:
    """A recipe's `augment` section; a ValueError where it names what the dataclass `augment` does not have."""
    names = [field.name for field in fields(augment)]
    values = {str(key): value for key, value in (config or {}).items()}
    for key in values:
        if key not in names:
            raise ValueError(f"augment has no {key!r}.{nearest(key, names)} It takes: {', '.join(names)}")
    return values


def resize(image: np.ndarray, size: tuple[int, int], mode: str, antialias: bool = True) -> np.ndarray:
    """uint8 (H, W, C) → (h, w, C); with antialiasing within 1 of Pillow's, in half of its time."""
    if image.shape[:2] == size:
        return image
    batch = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)  # (1, C, H, W), channels-last
    return interpolate(batch, size=size, mode=mode, antialias=antialias)[0].permute(1, 2, 0).numpy()


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, C), C = 1 for grey."""
    array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


class EvalTransform:
    """timm's resize and crop for evaluation, by Pillow, so that published accuracies can be met to the digit."""

    def __init__(
        self,
        image_size: int | tuple[int, int],
        *,
        crop_pct: float = 0.875,
        crop_mode: str = "center",
        interpolation: str = "bicubic",
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        in_chans: int = 3,
    ):
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"no interpolation is called {interpolation!r}; there are {', '.join(INTERPOLATIONS)}")
        if crop_mode not in CROP_MODES:
            raise ValueError(f"no crop_mode is called {crop_mode!r}; there are {', '.join(CROP_MODES)}")
        self.mode = MODES[in_chans]
        how = {"crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": interpolation, "mean": mean}
        steps = transforms_imagenet_eval(image_size, normalize=False, **how)  # type: ignore[arg-type]
        self.resize_and_crop = Compose(steps.transforms[:-1])  # the last one makes a tensor

    def __call__(self, sample: dict) -> dict:
        image = Image.fromarray(sample["image"])
        image = image if self.mode == "RGB" else image.convert(self.mode)
        return sample | {"image": to_array(self.resize_and_crop(image))}


class TrainTransform:
    """Crop, resize, mirror, then timm's colour and shape augmentations; draws from the global generators."""

    def __init__(
        self,
        augment: Augment,
        image_size: int | tuple[int, int],
        *,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        in_chans: int = 3,
    ):
        self.augment = augment
        self.size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.mode = MODES[in_chans]
        if augment.pad_crop >= min(self.size):
            raise ValueError(f"augment.pad_crop={augment.pad_crop} is not less than the image size, {min(self.size)}")
        try:
            _, self.recolour, _ = transforms_imagenet_train(
                self.size,
                auto_augment=augment.auto_augment,
                color_jitter=augment.color_jitter or None,  # type: ignore[arg-type]
                force_color_jitter=True,
                interpolation=augment.interpolation,
                mean=tuple(mean) * (3 // in_chans),  # fills what a shift uncovers, before any turn to grey
                separate=True,
            )
        except (AssertionError, KeyError, ValueError) as error:
            raise ValueError(
                f"augment.auto_augment={augment.auto_augment!r} is not one of timm's strings ({error}): it is like "
                "rand-m9-mstd0.5-inc1, augmix-m3-w3, 3a, original, originalr, v0 or v0r"
            ) from error
        for transform in self.recolour.transforms:
            quicken(transform)

    def __call__(self, sample: dict) -> dict:
        image = self._crop(sample["image"])
        flips = [axis for axis, p in enumerate((self.augment.vflip, self.augment.hflip)) if random.random() < p]
        if flips:
            image = torch.from_numpy(image).flip(flips).numpy()  # much quicker than copying NumPy's reversed view
        if self.recolour.transforms or self.mode != "RGB":
            picture = self.recolour(Image.fromarray(image))
            image = to_array(picture if picture.mode == self.mode else picture.convert(self.mode))
        return sample | {"image": image}

    def _crop(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) → (h, w, 3) of the image size."""
        height, width = image.shape[:2]
        if self.augment.scale is not None:
            channels_first = torch.from_numpy(image).permute(2, 0, 1)
            crop = RandomResizedCropAndInterpolation.get_params(channels_first, self.augment.scale, self.augment.ratio)
            top, left, h, w = crop if min(crop[2:]) > 0 else (0, 0, height, width)  # of one pixel it may take none
            return resize(image[top : top + h, left : left + w], self.size, self._filter())
        h, w = self.size
        factor = max(h / height, w / width)
        image = resize(image, (max(h, round(height * factor)), max(w, round(width * factor))), self._filter())
        rows, columns = (self._window(side, length) for side, length in zip(image.shape, self.size, strict=False))
        return image[rows[:, None], columns]

    def _window(self, side: int, length: int) -> np.ndarray:
        """Positions of a random window of `length` in a side that is padded by mirroring."""
        pad = self.augment.pad_crop
        start = random.randint(-pad, side - length + pad)
        positions = np.abs(np.arange(start, start + length))
        return side - 1 - np.abs(side - 1 - positions)

    def _filter(self) -> str:
        name = self.augment.interpolation
        return random.choice(("bilinear", "bicubic")) if name == "random" else name
