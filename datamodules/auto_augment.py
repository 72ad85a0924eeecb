"""timm's automatic augmentation and colour jitter, with drawing and applying of the ops kept apart.

The ops that timm draws for an image are recorded (`OpSampler`) and then applied: to one image on the CPU (`apply_ops`,
the pixels of Pillow and timm, or within 1 of 255 where Pillow's bicubic filter is slow), or to a whole batch on the
device that trains (`datamodules.batch_ops`). Both take the same random numbers in the same order as timm does.
"""

import math
import random
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP, AugmentOp, AutoAugment, RandAugment
from torch import Tensor
from torchvision.transforms import ColorJitter

# Number of AugMix views of an image that `augment.jsd` compares with the image.
AUGMIX_VIEWS = 2
# Names of timm's ops that move pixels along one axis.
SHIFT_OPS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel")
# Names of timm's ops that interpolate.
AFFINE_OPS = (*SHIFT_OPS, "Rotate")
# Beginnings of the names of timm's ops whose new value depends on the old value alone.
POINT_OPS = ("Invert", "Posterize", "Solarize", "Brightness")
# ColorJitter's ops, in the order of its numbers.
JITTER_OPS = ("Brightness", "Contrast", "Color")
# Every value of a pixel once.
RAMP = Image.frombytes("L", (256, 1), bytes(range(256)))


class Op(NamedTuple):
    """An op that was drawn for an image.

    Attributes:
        name: timm's name of the op, such as `Rotate`.
        amount: the op's argument in timm's unit, such as degrees; 0 if the op has none.
        bicubic: whether an op that interpolates does so bicubically; otherwise bilinearly.
    """

    name: str
    amount: float
    bicubic: bool


# Names by the codes that stand for them in an array of ops; the code 0 is no op.
OP_NAMES = ("", *NAME_TO_OP)


class OpSampler:
    """Draw the ops of an image as timm and torchvision do, from the global random generators.

    Args:
        transforms: timm's RandAugment and AutoAugment, and torchvision's ColorJitter. timm's ops are changed to record
            what they draw.

    Attributes:
        slots: largest number of ops that an image may get.
        fill: colour of pixels that lie outside the image, (red, green, blue).

    Raises:
        ValueError: if a transform is of another kind, such as AugMix.
    """

    def __init__(self, transforms: Sequence[Any]):
        self.transforms, self.slots = transforms, 0
        self.fill: Any = (0, 0, 0)
        for transform in transforms:
            if isinstance(transform, ColorJitter):
                self.slots += len(JITTER_OPS)
            elif isinstance(transform, RandAugment | AutoAugment):
                is_rand = isinstance(transform, RandAugment)
                if is_rand:
                    # NumPy, which draws from the ops, would turn a list to an array for each image.
                    transform.ops = np.array(transform.ops)
                self.slots += transform.num_layers if is_rand else max(len(policy) for policy in transform.policy)
                for op in timm_ops(transform):
                    self.fill = op.kwargs["fillcolor"]
                    op.aug_fn = partial(_record, name=op.name)
            else:
                raise ValueError(f"{type(transform).__name__} is no list of ops")

    def __call__(self) -> list[Op]:
        """Return the ops that an image gets, in their order."""
        drawn: list[Op] = []
        for transform in self.transforms:
            drawn = drawn + draw_jitter(transform) if isinstance(transform, ColorJitter) else transform(drawn)
        return drawn

    def encode(self, ops: Sequence[Op]) -> np.ndarray:
        """Return ops as float64 (slots, 3): code of the name (position in `OP_NAMES`), amount and whether bicubic."""
        array = np.zeros((self.slots, 3))
        for row, op in zip(array, ops, strict=False):
            row[:] = OP_NAMES.index(op.name), op.amount, op.bicubic
        return array


def timm_ops(transform: Any) -> Iterable[AugmentOp]:
    """Return all ops of timm's RandAugment, AutoAugment or AugMix."""
    return chain.from_iterable(transform.policy if isinstance(transform, AutoAugment) else [transform.ops])


def _record(drawn: list[Op], *args: float, name: str, fillcolor: tuple, resample: Any) -> list[Op]:
    """Append an op to the list that timm passes from op to op, with the random numbers that timm's op would draw."""
    amount = float(args[0]) if args else 0.0
    if name == "GaussianBlurRand":
        name, amount = "GaussianBlur", random.uniform(0.1, 2.0 * amount)
    if name in AFFINE_OPS and isinstance(resample, tuple):
        resample = random.choice(resample)
    return [*drawn, Op(name, amount, resample == Image.Resampling.BICUBIC)]


def draw_jitter(jitter: Any) -> list[Op]:
    """Return the ops of torchvision's ColorJitter without hue: the ops are those of Pillow, as in timm."""
    drawn: Any = ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    order, *factors, _ = drawn
    numbers = [number for number in order.tolist() if number < len(JITTER_OPS)]
    return [Op(JITTER_OPS[i], float(factors[i]), True) for i in numbers if factors[i] is not None]


def apply_ops(image: np.ndarray, ops: Iterable[Op], fill: tuple[int, ...]) -> np.ndarray:
    """Apply ops to an image, uint8 (H, W, 3); `fill` is the colour of pixels that lie outside the image."""
    for op in ops:
        if op.name.startswith(POINT_OPS):
            # Python's bytes.translate takes a third of the time of Pillow, whose pixels have four bytes.
            image = np.frombuffer(image.tobytes().translate(point_table(op)), np.uint8).reshape(image.shape)
        elif op.name in SHIFT_OPS and op.bicubic:
            image = shear_or_translate(image, op, fill)
        else:
            resample = Image.Resampling.BICUBIC if op.bicubic else Image.Resampling.BILINEAR
            picture = Image.fromarray(image)
            image = np.asarray(NAME_TO_OP[op.name](picture, *arguments(op), fillcolor=fill, resample=resample))
    return image


def arguments(op: Op) -> tuple[float, ...]:
    """Return the arguments of timm's function for an op, which takes whole numbers where the op counts."""
    if op.name in ("AutoContrast", "Equalize", "Invert"):
        return ()
    return (int(op.amount),) if op.name.startswith(("Posterize", "Solarize")) else (op.amount,)


@lru_cache(maxsize=1024)
def point_table(op: Op) -> bytes:
    """Return the 256 new values of an op of `POINT_OPS`, by the old value.

    At the highest magnitude, timm posterizes to 0 bits: older versions of Pillow returned a black image, newer ones
    refuse.
    """
    if op.name.startswith("Posterize") and op.amount < 1:
        return bytes(256)
    return NAME_TO_OP[op.name](RAMP, *arguments(op)).tobytes()


def shear_or_translate(image: np.ndarray, op: Op, fill: tuple[int, ...]) -> np.ndarray:
    """Shear or translate an image, uint8 (H, W, 3), with the bicubic filter."""
    if op.name.startswith("Translate"):
        axis = 0 if "Y" in op.name else 1
        return translate(image, op.amount * image.shape[axis] if op.name.endswith("Rel") else op.amount, axis, fill)
    if op.name == "ShearY":
        return transpose(shear_or_translate(transpose(image), op._replace(name="ShearX"), fill))
    shifts = op.amount * (torch.arange(image.shape[0], dtype=torch.float64) + 0.5)
    return shift_rows(image, shifts, fill)


def transpose(image: np.ndarray) -> np.ndarray:
    """Return the transpose (W, H, 3) of an image, uint8 (H, W, 3), in contiguous memory."""
    # Pixels that are one value of three bytes are copied in half of the time of single bytes.
    turned = np.ascontiguousarray(np.ascontiguousarray(image).view("V3")[..., 0].T)
    return turned.view(np.uint8).reshape(*turned.shape, 3)


def translate(image: np.ndarray, pixels: float, axis: int, fill: tuple[int, ...]) -> np.ndarray:
    """Shift an image, uint8 (H, W, 3), along its axis 0 or 1, as `shift_rows` does."""
    length, whole = image.shape[axis], math.floor(pixels)
    # From one before the first position to two after the last; the pixels at the edges are repeated.
    positions = torch.arange(whole - 1, whole + length + 2).clamp_(0, length - 1)
    padded = torch.from_numpy(np.array(image)).index_select(axis, positions).float()
    out = combine([padded.narrow(axis, k, length) for k in range(4)], torch.tensor(pixels - whole))
    position = np.arange(length) + 0.5 + pixels
    outside = (position < 0) | (position >= length)
    paint(out, outside if axis == 0 else (slice(None), outside), fill)
    return out


def shift_rows(image: np.ndarray, shifts: Tensor, fill: tuple[int, ...]) -> np.ndarray:
    """Shift each row of an image by its own distance, with Pillow's bicubic filter (a = -1).

    Pixel (y, x) of the result is the value of row y of `image` at x + shifts[y]. Pillow filters 4 x 4 pixels for each
    pixel of the result; along one axis 4 pixels are enough.

    Args:
        image: uint8 (H, W, 3), contiguous.
        shifts: float64 (H,), in pixels.
        fill: colour of the pixels that lie outside `image`.
    """
    height, width, _ = image.shape
    shifts = shifts[:, None]
    whole = shifts.floor()
    # (H, W + 3); the pixels at the edges are repeated.
    columns = (torch.arange(-1, width + 2) + whole.long()).clamp_(0, width - 1)
    indices = columns + torch.arange(0, height * width, width)[:, None]
    pixels = torch.from_numpy(np.array(image)).view(height * width, 3).index_select(0, indices.view(-1))
    pixels = pixels.view(height, -1).float()  # (H, (W + 3)·3)
    out = combine([pixels[:, 3 * k : 3 * (k + width)] for k in range(4)], (shifts - whole).float())
    out = out.reshape(height, width, 3)
    position = torch.arange(width) + 0.5 + shifts
    outside = ((position < 0) | (position >= width)).numpy()
    paint(out, outside, fill)
    return out


def combine(taps: Sequence[Tensor], t: Tensor) -> np.ndarray:
    """Return Pillow's bicubic combination of four pixels as uint8.

    Args:
        taps: four float32 tensors of one shape, from one pixel before the position to two after it.
        t: distance of the position from the second pixel, from 0 to 1.
    """
    weights = cubic_weights(t)
    out = taps[0] * weights[0]
    for tap, weight in zip(taps[1:], weights[1:], strict=True):
        out.addcmul_(tap, weight)
    # Decimals are cut off, as in Pillow. NumPy converts to uint8 in a third of the time that torch takes.
    return out.add_(1e-3).clamp_(0, 255).numpy().astype(np.uint8)


def paint(image: np.ndarray, where: Any, fill: tuple[int, ...]) -> None:
    """Set the pixels of an image, uint8 (H, W, 3), at an index of its rows and columns to one colour."""
    # A pixel as one value of three bytes: NumPy assigns these in a third of the time of single bytes.
    image.view("V3")[..., 0][where] = np.array(fill, np.uint8).view("V3")[0]


def cubic_weights(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the weights of Pillow's bicubic filter (a = -1) for the four pixels around a position.

    Args:
        t: distance from the second of the four pixels, from 0 to 1.
    """
    t2, t3 = t * t, t * t * t
    return 2 * t2 - t - t3, 1 - 2 * t2 + t3, t + t2 - t3, t3 - t2


def accelerate(transform: Any) -> None:
    """Replace the slow and failing ops of timm's AugMix, in place: it mixes pictures and cannot be recorded."""
    for op in timm_ops(transform):
        op.aug_fn = partial(_apply_at_once, name=op.name)


def _apply_at_once(
    picture: Image.Image, *args: float, name: str, fillcolor: tuple[int, ...], resample: Any
) -> Image.Image:
    ops = _record([], *args, name=name, fillcolor=fillcolor, resample=resample)
    return Image.fromarray(apply_ops(np.asarray(picture), ops, fillcolor))
