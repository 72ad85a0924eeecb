"""timm's automatic augmentation, repaired and quickened: the same draws and, within 1 of 255, the same pixels.

Most of RandAugment's time goes into Pillow's bicubic shears and shifts, which filter 4 x 4 pixels for each one. The
axis that stands still needs no filter: 4 pixels are enough.
"""

import random
from functools import partial
from itertools import chain

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP, AutoAugment
from torch import Tensor

SLIDES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel")


def quicken(transform) -> None:
    """Exchange ops within timm's RandAugment, AutoAugment or AugMix, where it can be done better."""
    policy = transform.policy if isinstance(transform, AutoAugment) else [getattr(transform, "ops", [])]
    for op in chain.from_iterable(policy):
        if op.name in SLIDES:
            op.aug_fn = partial(_slide, name=op.name)
        elif op.name.startswith("Posterize"):
            op.aug_fn = partial(_posterize, name=op.name)


def _posterize(image: Image.Image, bits: int, *, name: str, **kwargs) -> Image.Image:
    """At its highest magnitude timm keeps no bits: Pillow used to give a black image for that, and now refuses."""
    return NAME_TO_OP[name](image, bits, **kwargs) if bits > 0 else Image.new(image.mode, image.size)


def _slide(image: Image.Image, amount: float, *, name: str, fillcolor: tuple, resample) -> Image.Image:
    """Shear or shift by `amount`, as timm means it for the op called `name`."""
    if isinstance(resample, tuple):
        resample = random.choice(resample)
    if resample != Image.Resampling.BICUBIC or image.mode != "RGB":
        return NAME_TO_OP[name](image, amount, fillcolor=fillcolor, resample=resample)
    upright = "X" in name
    image = image if upright else image.transpose(Image.Transpose.TRANSPOSE)
    if name.startswith("Shear"):
        shifts = amount * (torch.arange(image.height, dtype=torch.float64) + 0.5)
    else:
        pixels = amount * image.width if name.endswith("Rel") else amount
        shifts = torch.full((image.height,), pixels, dtype=torch.float64)
    image = slide_rows(image, shifts, fillcolor)
    return image if upright else image.transpose(Image.Transpose.TRANSPOSE)


def slide_rows(image: Image.Image, shifts: Tensor, fill: tuple[int, ...]) -> Image.Image:
    """Row y of the result at x is row y of `image` at x + shifts[y], by Pillow's bicubic filter (a = -1).

    Args:
        image: RGB, H rows of W pixels.
        shifts: float64 (H,), in pixels.
        fill: colour of what lies outside the image.
    """
    height, width = image.height, image.width
    shifts = shifts[:, None]
    whole = shifts.floor()
    columns = (torch.arange(-1, width + 2) + whole.long()).clamp_(0, width - 1)  # (H, W + 3): edges are repeated
    places = columns + torch.arange(0, height * width, width)[:, None]
    pixels = torch.from_numpy(np.array(image)).view(height * width, 3).index_select(0, places.view(-1))
    pixels = pixels.view(height, -1).float()  # (H, (W + 3)·3)
    t = (shifts - whole).float()
    t2, t3 = t * t, t * t * t
    taps = [pixels[:, 3 * k : 3 * (k + width)] for k in range(4)]  # of the pixels from one before to two after
    out = (taps[0] * (2 * t2 - t - t3)).addcmul_(taps[1], 1 - 2 * t2 + t3)
    out.addcmul_(taps[2], t + t2 - t3).addcmul_(taps[3], t3 - t2)
    out = out.add_(1e-3).clamp_(0, 255).to(torch.uint8).view(height, width, 3)  # Pillow cuts decimals off, too
    position = torch.arange(width) + 0.5 + shifts
    out[(position < 0) | (position >= width)] = torch.tensor(fill, dtype=torch.uint8)
    return Image.fromarray(out.numpy())
