"""Transforms of one sample on the CPU for classification: `image` changes from uint8 (H, W, 3) to uint8 (h, w, C).

Normalising, erasing and mixing are cheaper or only possible in batches; they are in `datamodules.batch`.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import AugMixAugment
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.data.transforms_factory import transforms_imagenet_eval, transforms_imagenet_train
from torch.nn.functional import interpolate
from torchvision.transforms import Compose

from datamodules.auto_augment import AUGMIX_VIEWS, OpSampler, accelerate, apply_ops
from datamodules.decode import EncodedJPEG
from datamodules.mixing import MaskMix
from datamodules.sizes import Size
from datamodules.token_maps import view_matrix
from retinue.utils.suggestions import nearest

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
# Pillow's image modes by number of channels.
PILLOW_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Augmentation for classification: the fields of a recipe's `augment` section.

    Attributes:
        scale: (minimum, maximum) share of the image's area that a random resized crop takes. None resizes the shorter
            side to the image size and takes a random square (DeiT III's simple random crop).
        ratio: (minimum, maximum) aspect ratio of the random resized crop.
        pad_crop: number of pixels by which the image is padded (by mirroring) before the random square is taken; only
            with scale=None.
        interpolation: bilinear, bicubic, or random (one of these two for each sample).
        hflip: probability of mirroring horizontally.
        vflip: probability of mirroring vertically.
        auto_augment: timm's string: `rand-m9-mstd0.5-inc1` (RandAugment, arXiv:1909.13719), `original`, `v0`, ...
            (AutoAugment, arXiv:1805.09501), `augmix-m3-w3` (arXiv:1912.02781), or `3a` (grey, solarize or blur: DeiT
            III, arXiv:2204.07118). None means no automatic augmentation.
        color_jitter: strength of the changes of brightness, contrast and saturation. timm ignores this value if
            `auto_augment` is set; here both apply.
        repeats: number of copies of an image in the order of an epoch (repeated augmentation).
        erasing: probability of random erasing (arXiv:1708.04896).
        erasing_mode: pixel, rand or const, as in timm.
        mixup: alpha of MixUp (arXiv:1710.09412); 0 is off. A batch uses either MixUp or CutMix.
        cutmix: alpha of CutMix (arXiv:1905.04899); 0 is off.
        mixup_prob: probability that a batch is mixed.
        switch_prob: probability that a mixed batch uses CutMix if both are on.
        maskmix: MaskMix (arXiv:2304.12043), which mixes some batches in the cells of a grid; None is off.
        jsd: weight of the Jensen-Shannon divergence between the predictions for an image and for two AugMix views of it
            (arXiv:1912.02781; the paper has 12); 0 is off. The image itself then stays without AugMix.
        label_smoothing: share of a mixed target that is spread over all classes. Without mixing, the loss smooths.
        device: gpu applies `auto_augment` and `color_jitter` to batches on the device that trains; the ops and their
            strengths are drawn on the CPU all the same. None applies them on the CPU.
        sizes: sizes of training images, each a side or (height, width): stages of equal length in which the size of all
            images is the next one. None means the data's image size.
        size_by: step draws one of `sizes` for each batch instead. See `datamodules.sizes`.
        decode: reduced decodes JPEGs at 1/2, 1/4 or 1/8 of their size where the crop stays at least as large as the
            image size. None decodes them whole.
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
    maskmix: MaskMix | None = None
    jsd: float = 0.0
    label_smoothing: float = 0.0
    device: str | None = None
    decode: str | None = None
    sizes: tuple[Size, ...] | None = None
    size_by: str | None = None

    @classmethod
    def from_config(cls, config: Mapping | None) -> "Augment":
        """Read a recipe's `augment` section.

        Raises:
            ValueError: if a key is unknown or a value is out of its range.
        """
        values = known_fields(cls, config)
        for key in ("scale", "ratio"):
            if values.get(key) is not None:
                values[key] = tuple(values[key])
        if values.get("sizes") is not None:
            values["sizes"] = tuple(size if isinstance(size, int) else tuple(size) for size in values["sizes"])
        if values.get("maskmix") is not None:
            values["maskmix"] = MaskMix(**known_fields(MaskMix, values["maskmix"], "augment.maskmix"))
        values["jsd"] = values.get("jsd") or 0.0
        augment = cls(**values)
        augment._check()
        return augment

    @property
    def mixes(self) -> bool:
        """Tell whether batches may be mixed."""
        return bool(self.mixup or self.cutmix or self.maskmix)

    def _check(self) -> None:
        def require(valid: bool, key: str, expected: str) -> None:
            if not valid:
                raise ValueError(f"augment.{key} must be {expected}, not {getattr(self, key)!r}")

        for key in ("hflip", "vflip", "erasing", "mixup_prob", "switch_prob", "label_smoothing"):
            require(0 <= getattr(self, key) <= 1, key, "from 0 to 1")
        for key in ("color_jitter", "mixup", "cutmix", "pad_crop", "jsd"):
            require(getattr(self, key) >= 0, key, "0 or more")
        if self.scale is not None:
            expected = "(minimum, maximum) with 0 < minimum <= maximum <= 1"
            require(_is_range(self.scale) and self.scale[1] <= 1, "scale", expected)
        require(_is_range(self.ratio), "ratio", "(minimum, maximum) with 0 < minimum <= maximum")
        require(isinstance(self.repeats, int) and self.repeats >= 1, "repeats", "a whole number from 1 up")
        require(self.interpolation in ("bilinear", "bicubic", "random"), "interpolation", "bilinear, bicubic or random")
        require(self.erasing_mode in ("pixel", "rand", "const"), "erasing_mode", "pixel, rand or const")
        require(self.device in (None, "gpu"), "device", "gpu or null")
        require(self.decode in (None, "reduced"), "decode", "reduced or null")
        require(self.sizes is None or len(self.sizes) > 0, "sizes", "one or more sizes, or null")
        require(self.size_by in (None, "step"), "size_by", "step or null")
        require(self.size_by is None or self.sizes is not None, "size_by", "null without augment.sizes")
        if self.maskmix is not None:
            valid = self.maskmix.alpha > 0 and self.maskmix.cell >= 1 and 0 <= self.maskmix.prob <= 1
            require(valid, "maskmix", "alpha above 0, cell of at least 1 pixel and prob from 0 to 1")
        if self.jsd:
            name = self.auto_augment or ""
            require(name.startswith("augmix"), "auto_augment", "AugMix, such as augmix-m3-w3, with augment.jsd")
            require(not self.mixes, "jsd", "null with mixup, cutmix or maskmix, which change the images' labels")


def _is_range(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and 0 < value[0] <= value[1]


def known_fields(augment: type, config: Mapping | None, section: str = "augment") -> dict[str, Any]:
    """Return a recipe's `augment` section as keyword arguments of a dataclass.

    Args:
        augment: the dataclass.
        config: the section; None stands for an empty section.
        section: name of the section, for the error.

    Raises:
        ValueError: if the dataclass has no field of a name in the section.
    """
    names = [field.name for field in fields(augment)]
    values = {} if config is None else {str(key): value for key, value in config.items()}
    for key in values:
        if key not in names:
            raise ValueError(f"{section} has no {key!r}.{nearest(key, names)} It takes: {', '.join(names)}")
    return values


def resize(image: np.ndarray, size: tuple[int, int], mode: str, antialias: bool = True) -> np.ndarray:
    """Resize an image; with antialiasing, values differ from Pillow's by at most 1, in half of Pillow's time.

    Args:
        image: uint8 (H, W, C).
        size: (height, width) of the result.
        mode: bilinear or bicubic.
        antialias: whether a filter precedes downsampling.

    Returns:
        uint8 (height, width, C).
    """
    if image.shape[:2] == size:
        return image
    batch = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)  # (1, C, H, W), channels-last
    return interpolate(batch, size=size, mode=mode, antialias=antialias)[0].permute(1, 2, 0).numpy()


def to_array(image: Image.Image) -> np.ndarray:
    """Convert a Pillow image to uint8 (H, W, C), with C = 1 for a grey image."""
    array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


class EvalTransform:
    """Resize and crop an evaluation sample exactly as timm does.

    Pillow resizes, so that published accuracies are met to the digit.

    Args:
        image_size: side, or (height, width), of the result.
        crop_pct: share of the resized image that the crop keeps.
        crop_mode: center, squash or border, as in timm.
        interpolation: one of `INTERPOLATIONS`.
        mean: mean of each channel, which fills the border with crop_mode=border.
        in_chans: 3, or 1 for grey.

    Raises:
        ValueError: if there is no such interpolation or crop_mode.
    """

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
        self.mode = PILLOW_MODES[in_chans]
        self.size = (image_size, image_size) if isinstance(image_size, int) else image_size
        steps = transforms_imagenet_eval(
            image_size,
            crop_pct=crop_pct,
            crop_mode=crop_mode,
            interpolation=interpolation,
            mean=mean,
            normalize=False,
        )
        # timm's last step converts the image to a tensor, which `collate` does here.
        self.resize_and_crop = Compose(steps.transforms[:-1])

    def __call__(self, sample: dict) -> dict:
        image = Image.fromarray(sample["image"])
        image = image if self.mode == "RGB" else image.convert(self.mode)
        return sample | {"image": to_array(self.resize_and_crop(image))}


class TrainTransform:
    """Crop, resize and mirror a training sample, then apply timm's augmentations of colour and shape.

    A sample with a label map (`datamodules.token_maps`) gets `map_view`, float32 (2, 3), the place of the crop in the
    image. With `augment.jsd`, a sample gets `views`, uint8 (V, h, w, C), the AugMix views of the crop, and the crop
    itself stays without AugMix. With `augment.device`, the sample gets `ops`, the ops that were drawn for it
    (`OpSampler.encode`), and keeps its colours. All random numbers come from the global generators, the same ones
    wherever the ops are applied.

    Args:
        augment: the recipe's augmentation.
        image_size: side, or (height, width), of the result.
        mean: mean of each channel, which fills pixels that a shift uncovers.
        in_chans: 3, or 1 for grey.

    Attributes:
        sampler: draws the ops of a sample; None if there are none, or if they cannot be drawn in advance (AugMix).

    Raises:
        ValueError: if `pad_crop` is not less than the image size, `auto_augment` is not a string of timm, or AugMix is
            to be applied to batches.
    """

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
        self.mode = PILLOW_MODES[in_chans]
        if augment.pad_crop >= min(self.size):
            raise ValueError(f"augment.pad_crop={augment.pad_crop} is not less than the image size, {min(self.size)}")
        if augment.maskmix is not None and augment.maskmix.cell >= max(self.size):
            raise ValueError(
                f"augment.maskmix.cell={augment.maskmix.cell} is not less than the image size, {max(self.size)}: all "
                "images would stay whole"
            )
        try:
            _, self.color_and_shape, _ = transforms_imagenet_train(
                self.size,
                auto_augment=augment.auto_augment,
                color_jitter=augment.color_jitter if augment.color_jitter else None,  # type: ignore[arg-type]
                force_color_jitter=True,
                interpolation=augment.interpolation,
                # A grey mean is repeated, because shifts precede the conversion to grey.
                mean=tuple(mean) * (3 // in_chans),
                separate=True,
            )
        except (AssertionError, KeyError, ValueError) as error:
            raise ValueError(
                f"augment.auto_augment={augment.auto_augment!r} is not one of timm's strings ({error}): examples are "
                "rand-m9-mstd0.5-inc1, augmix-m3-w3, 3a, original, originalr, v0 and v0r"
            ) from error
        steps = self.color_and_shape.transforms
        self.sampler = None
        if any(isinstance(step, AugMixAugment) for step in steps):
            if augment.device is not None:
                raise ValueError("augment.device=gpu has no AugMix: augment.device=null, or another auto_augment")
            accelerate(steps[0])
        elif steps:
            self.sampler = OpSampler(steps)

    def __call__(self, sample: dict) -> dict:
        image, box = self._crop(sample["image"])
        flips = self._draw_flips()
        if any(flips):
            # torch's flip takes a small part of the time of copying NumPy's reversed view.
            image = torch.from_numpy(image).flip([axis for axis in (0, 1) if flips[axis]]).numpy()
        ops = [] if self.sampler is None else self.sampler()
        if "map_scores" in sample:
            sample = sample | {"map_view": view_matrix(box, flips, ops, self.size)}
        if self.augment.jsd:
            picture = Image.fromarray(image)
            views = [self._in_mode(to_array(self.color_and_shape(picture))) for _ in range(AUGMIX_VIEWS)]
            return sample | {"image": self._in_mode(image), "altered": np.stack(views)}
        if self.sampler is not None:
            if self.augment.device is not None:
                return sample | {"image": image, "ops": self.sampler.encode(ops)}
            image = apply_ops(image, ops, self.sampler.fill)
        elif self.color_and_shape.transforms:
            image = to_array(self.color_and_shape(Image.fromarray(image)))
        return sample | {"image": self._in_mode(image)}

    def _in_mode(self, image: np.ndarray) -> np.ndarray:
        """Return an image, uint8 (H, W, 3), in grey if the net takes one channel."""
        return image if self.mode == "RGB" else to_array(Image.fromarray(image).convert(self.mode))

    def _crop(self, image: np.ndarray | EncodedJPEG) -> tuple[np.ndarray, tuple[float, float, float, float]]:
        """Return a random crop of an image, uint8 (H, W, 3), resized to the image size.

        Returns:
            The crop, and its top, left, height and width as shares of the image's sides.
        """
        height, width, _ = image.shape
        if self.augment.scale is not None:
            # timm takes the size of the image from a tensor; without memory it costs nothing.
            size_only = torch.empty(3, height, width, device="meta")
            crop = RandomResizedCropAndInterpolation.get_params(size_only, self.augment.scale, self.augment.ratio)
            # timm may draw an empty crop from an image of one pixel.
            top, left, h, w = crop if min(crop[2:]) > 0 else (0, 0, height, width)
            box = top / height, left / width, h / height, w / width
            return resize(_part(image, top, left, h, w, self.size), self.size, self._draw_interpolation()), box
        mode, size = self._draw_interpolation(), self.square_from(height, width)
        image = resize(_part(image, 0, 0, height, width, size), size, mode)
        starts = self._draw_starts(size)
        rows, columns = (self._positions(start, axis, size) for axis, start in enumerate(starts))
        box = starts[0] / size[0], starts[1] / size[1], self.size[0] / size[0], self.size[1] / size[1]
        return image[rows[:, None], columns], box

    def square_from(self, height: int, width: int) -> tuple[int, int]:
        """Return the size to which an image is resized before a random square is taken from it."""
        h, w = self.size
        factor = max(h / height, w / width)
        return max(h, round(height * factor)), max(w, round(width * factor))

    def draw_square(self, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """Draw what `__call__` draws for an image of this size that needs no resizing, and leave the pixels alone.

        Returns:
            `square`: int64 (4,), first row and first column in the padded image, and whether it is mirrored vertically
            and horizontally. `ops`: see `OpSampler.encode`; only if there are any.
        """
        self._draw_interpolation()
        drawn = {"square": np.array([*self._draw_starts(size), *self._draw_flips()], np.int64)}
        return drawn if self.sampler is None else drawn | {"ops": self.sampler.encode(self.sampler())}

    def _draw_starts(self, size: tuple[int, int]) -> list[int]:
        pad = self.augment.pad_crop
        return [random.randint(-pad, side - length + pad) for side, length in zip(size, self.size, strict=True)]

    def _draw_flips(self) -> list[bool]:
        return [random.random() < p for p in (self.augment.vflip, self.augment.hflip)]

    def _positions(self, start: int, axis: int, size: tuple[int, int]) -> np.ndarray:
        """Return the positions of a window along an axis of an image of this size, which is padded by mirroring."""
        positions = np.abs(np.arange(start, start + self.size[axis]))
        return size[axis] - 1 - np.abs(size[axis] - 1 - positions)

    def _draw_interpolation(self) -> str:
        name = self.augment.interpolation
        return random.choice(("bilinear", "bicubic")) if name == "random" else name


def _part(
    image: np.ndarray | EncodedJPEG, top: int, left: int, height: int, width: int, size: tuple[int, int]
) -> np.ndarray:
    """Return a part of an image; of a JPEG that is not decoded, in any size that is no smaller than `size`."""
    if isinstance(image, EncodedJPEG):
        return image.crop(top, left, height, width, size)
    return image[top : top + height, left : left + width]
