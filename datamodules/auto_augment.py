"""Faster and repaired ops for timm's automatic augmentation: the same random draws and pixels within 1 of 255.

RandAugment spends most of its time in Pillow's bicubic shears and translations, which filter 4 x 4 pixels for each
pixel of the result. These ops move pixels along one axis only, so the other axis needs no filter and 4 pixels are
enough.
"""

import random
from functools import partial
from itertools import chain

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP, AutoAugment
from torch import Tensor

# Names of timm's ops that move pixels along one axis.
SHIFT_OPS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel")


def accelerate(transform) -> None:
    """Replace the slow and failing ops in a transform of timm, in place.

    Args:
        transform: timm's RandAugment, AutoAugment or AugMix; other transforms stay unchanged.
    """
    policy = transform.policy if isinstance(transform, AutoAugment) else [getattr(transform, "ops", [])]
    for op in chain.from_iterable(policy):
        if op.name in SHIFT_OPS:
            op.aug_fn = partial(_shear_or_translate, name=op.name)
        elif op.name.startswith("Posterize"):
            op.aug_fn = partial(_posterize, name=op.name)


def _posterize(image: Image.Image, bits: int, *, name: str, **kwargs) -> Image.Image:
    """Keep the highest `bits` bits of each value.

    At the highest magnitude, timm asks for 0 bits: older versions of Pillow returned a black image, newer ones refuse.
    """
    return NAME_TO_OP[name](image, bits, **kwargs) if bits > 0 else Image.new(image.mode, image.size)


def _shear_or_translate(image: Image.Image, amount: float, *, name: str, fillcolor: tuple, resample) -> Image.Image:
    """Shear or translate by `amount`, in the unit that timm uses for the op called `name`."""
    if isinstance(resample, tuple):
        resample = random.choice(resample)
    if resample != Image.Resampling.BICUBIC or image.mode != "RGB":
        return NAME_TO_OP[name](image, amount, fillcolor=fillcolor, resample=resample)
    moves_rows = "X" in name
    image = image if moves_rows else image.transpose(Image.Transpose.TRANSPOSE)
    if name.startswith("Shear"):
        shifts = amount * (torch.arange(image.height, dtype=torch.float64) + 0.5)
    else:
        pixels = amount * image.width if name.endswith("Rel") else amount
        shifts = torch.full((image.height,), pixels, dtype=torch.float64)
    image = shift_rows(image, shifts, fillcolor)
    return image if moves_rows else image.transpose(Image.Transpose.TRANSPOSE)


def shift_rows(image: Image.Image, shifts: Tensor, fill: tuple[int, ...]) -> Image.Image:
    """Shift each row of an image by its own distance, with Pillow's bicubic filter (a = -1).

    Pixel (y, x) of the result is the value of row y of `image` at x + shifts[y].

    Args:
        image: RGB image with H rows of W pixels.
        shifts: float64 (H,), in pixels.
        fill: colour of the pixels that lie outside `image`.
    """
    height, width = image.height, image.width
    shifts = shifts[:, None]
    whole = shifts.floor()
    # (H, W + 3); the pixels at the edges are repeated.
    columns = (torch.arange(-1, width + 2) + whole.long()).clamp_(0, width - 1)
    indices = columns + torch.arange(0, height * width, width)[:, None]
    pixels = torch.from_numpy(np.array(image)).view(height * width, 3).index_select(0, indices.view(-1))
    pixels = pixels.view(height, -1).float()  # (H, (W + 3)·3)
    t = (shifts - whole).float()
    t2, t3 = t * t, t * t * t
    # The four pixels that the filter combines: from one before the position to two after it.
    taps = [pixels[:, 3 * k : 3 * (k + width)] for k in range(4)]
    out = (taps[0] * (2 * t2 - t - t3)).addcmul_(taps[1], 1 - 2 * t2 + t3)
    out.addcmul_(taps[2], t + t2 - t3).addcmul_(taps[3], t3 - t2)
    # Decimals are cut off, as in Pillow.
    out = out.add_(1e-3).clamp_(0, 255).to(torch.uint8).view(height, width, 3)
    position = torch.arange(width) + 0.5 + shifts
    out[(position < 0) | (position >= width)] = torch.tensor(fill, dtype=torch.uint8)
    return Image.fromarray(out.numpy())
