"""The ops of `datamodules.auto_augment` for whole batches of uint8 images, on any device.

Each image has its own ops with its own amounts, which are drawn on the CPU. The pixels are within 1 of 255 of those
that Pillow computes for timm. No function waits for the device: what depends on the drawn ops is computed on the CPU
and sent, what depends on pixels stays on the device.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.auto_augment import AFFINE_OPS, OP_NAMES, POINT_OPS, Op, cubic_weights, point_table

# Largest number of images that one op changes at once, which limits the memory for intermediate results.
MAX_IMAGES = 32
# Number of box filters that Pillow's Gaussian blur consists of.
BLUR_PASSES = 3


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """Return a tensor of the array on a device, without waiting for the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def apply_batch_ops(image: Tensor, ops: np.ndarray, fill: tuple[int, ...]) -> Tensor:
    """Apply the ops of each image.

    Args:
        image: uint8 (B, 3, H, W) in channels-last memory; it stays unchanged.
        ops: float64 (B, S, 3), S ops of each image in their order, as `OpSampler.encode` returns them.
        fill: colour of pixels that lie outside the image.

    Returns:
        uint8 (B, 3, H, W) in channels-last memory.
    """
    pixels = image.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)  # (B, H, W, 3)
    for slot in ops.transpose(1, 0, 2):
        for change, names in CHANGES.items():
            rows = np.flatnonzero(np.isin(slot[:, 0], [OP_NAMES.index(name) for name in names]))
            for part in np.split(rows, range(MAX_IMAGES, len(rows), MAX_IMAGES)):
                if not part.size:
                    continue
                drawn = [Op(OP_NAMES[int(code)], amount, bool(bicubic)) for code, amount, bicubic in slot[part]]
                index = send(part, pixels.device)
                pixels.index_copy_(0, index, change(pixels[index], drawn, fill))
    return pixels.permute(0, 3, 1, 2)


def to_grey(image: Tensor) -> Tensor:
    """Return a batch of colour images, uint8 (B, 3, H, W), as grey ones, (B, 1, H, W), with Pillow's values."""
    return _grey(image.permute(0, 2, 3, 1)).to(torch.uint8)[:, None].contiguous(memory_format=torch.channels_last)


def _grey(pixels: Tensor) -> Tensor:
    """Return Pillow's grey values, int32 (N, H, W), of pixels (N, H, W, 3)."""
    red, green, blue = pixels.int().unbind(-1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _amounts(pixels: Tensor, drawn: list[Op], dims: int) -> Tensor:
    """Return the amounts, float32 (N, 1, 1, ...) with `dims` dimensions, on the device of the pixels."""
    return send(np.array([op.amount for op in drawn], np.float32), pixels.device).view(-1, *[1] * (dims - 1))


def _blend(base: Tensor, image: Tensor, share: Tensor) -> Tensor:
    """Return base + share * (image - base) as uint8, with decimals cut off, as Pillow's `Image.blend` does."""
    return torch.lerp(base.float(), image.float(), share).clamp_(0, 255).to(torch.uint8)


def _look_up(pixels: Tensor, tables: Tensor) -> Tensor:
    """Replace each value of pixels (N, H, W, 3) by its new value in tables (N, 256, 3)."""
    return tables.gather(1, pixels.flatten(1, 2).long()).view_as(pixels)


def _ramp(pixels: Tensor) -> Tensor:
    return torch.arange(256, device=pixels.device)[None, :, None]  # (1, 256, 1)


def _change_points(pixels: Tensor, drawn: list[Op], fill: tuple[int, ...]) -> Tensor:
    tables = send(np.stack([np.frombuffer(point_table(op), np.uint8) for op in drawn]), pixels.device)
    return _look_up(pixels, tables[..., None].expand(-1, -1, 3))


def _auto_contrast(pixels: Tensor, drawn: list[Op], fill: tuple[int, ...]) -> Tensor:
    low, high = (bound.int()[:, None] for bound in torch.aminmax(pixels.flatten(1, 2), dim=1))  # (N, 1, 3)
    ramp = _ramp(pixels)
    stretched = ((ramp - low) * 255).div((high - low).clamp(min=1), rounding_mode="floor")
    return _look_up(pixels, torch.where(high > low, stretched, ramp).clamp(0, 255).to(torch.uint8))


def _equalize(pixels: Tensor, drawn: list[Op], fill: tuple[int, ...]) -> Tensor:
    values = pixels.flatten(1, 2).long()  # (N, H·W, 3)
    counts = torch.zeros(len(pixels), 256, 3, dtype=torch.long, device=pixels.device)
    counts.scatter_add_(1, values, torch.ones_like(values))
    step = (values.shape[1] - counts.gather(1, values.amax(1, keepdim=True))) // 255  # (N, 1, 3)
    below = counts.cumsum(1) - counts
    equalized = (step // 2 + below) // step.clamp(min=1)
    return _look_up(pixels, torch.where(step > 0, equalized, _ramp(pixels)).clamp(0, 255).to(torch.uint8))


def _change_contrast(pixels: Tensor, drawn: list[Op], fill: tuple[int, ...]) -> Tensor:
    grey = _grey(pixels).flatten(1)
    mean = (2 * grey.sum(1) + grey.shape[1]) // (2 * grey.shape[1])
    tables = _blend(mean[:, None, None], _ramp(pixels), _amounts(pixels, drawn, 3))
    return _look_up(pixels, tables.expand(-1, -1, 3))


def _change_colour(pixels: Tensor, drawn: list[Op], fill: tuple[int, ...]) -> Tensor:
    shares = [min(1, max(0, 1 - op.amount)) if op.name == "Desaturate" else op.amount for op in drawn]
    share = send(np.array(shares, np.float32), pixels.device).view(-1, 1, 1, 1)
    return _blend(_grey(pixels)[..., None], pixels, share)


def _change_sharpness(pixels: Tensor, drawn: list[Op], fill: tuple[int, ...]) -> Tensor:
    smooth = pixels.float()
    if min(pixels.shape[1:3]) > 2:
        # Pillow's filter SMOOTH: the centre counts 5 of 13; pixels at the edge stay unchanged.
        sums = F.avg_pool2d(smooth.permute(0, 3, 1, 2), 3, 1, divisor_override=1).permute(0, 2, 3, 1)
        inner = smooth[:, 1:-1, 1:-1]
        inner.copy_(((sums + 4 * inner) / 13 + 0.5).floor_())
    return _blend(smooth, pixels, _amounts(pixels, drawn, 4))


def _blur(pixels: Tensor, drawn: list[Op], fill: tuple[int, ...]) -> Tensor:
    radii = np.array([box_radius(op.amount) for op in drawn])
    whole = radii.astype(int)
    reach = int(whole.max()) + 1
    offsets = np.abs(np.arange(-reach, reach + 1))
    # A box filter of a radius that is no whole number has smaller weights at its ends.
    inner = 1 / (2 * radii + 1)
    outer = (1 - (2 * whole + 1) * inner) / 2
    weights = np.where(offsets <= whole[:, None], inner[:, None], 0.0)
    weights = np.where(offsets == whole[:, None] + 1, outer[:, None], weights)
    columns = send(weights.astype(np.float32), pixels.device).t()[..., None, None, None]  # (2·reach + 1, N, 1, 1, 1)
    image = pixels.permute(0, 3, 1, 2).float()
    for padding in ((reach, reach, 0, 0), (0, 0, reach, reach)):
        axis, side = (3, image.shape[3]) if padding[0] else (2, image.shape[2])
        for _ in range(BLUR_PASSES):
            padded = F.pad(image, padding, mode="replicate")
            image = torch.full_like(image, 0.5)
            for i, column in enumerate(columns):
                image.addcmul_(column, padded.narrow(axis, i, side))
            image.floor_()
    return image.to(torch.uint8).permute(0, 2, 3, 1)


def box_radius(sigma: float) -> float:
    """Return the radius in pixels of the box filter that, applied `BLUR_PASSES` times, has the deviation `sigma`.

    Source: "Theoretical foundations of Gaussian convolution by extended box filtering" (Gwosdek et al., 2011).
    """
    variance = sigma * sigma / BLUR_PASSES
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return whole + part / (6 * (variance - (whole + 1) ** 2))


def matrix(op: Op, height: int, width: int) -> tuple[float, ...]:
    """Return (a, b, c, d, e, f): the result at (x, y) is the image at (a·x + b·y + c, d·x + e·y + f)."""
    if op.name == "Rotate":
        angle = -math.radians(op.amount)
        cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
        x, y = width / 2, height / 2
        return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y
    if op.name.startswith("Shear"):
        return (1, op.amount, 0, 0, 1, 0) if op.name == "ShearX" else (1, 0, 0, op.amount, 1, 0)
    side = width if "X" in op.name else height
    pixels = op.amount * side if op.name.endswith("Rel") else op.amount
    return (1, 0, pixels, 0, 1, 0) if "X" in op.name else (1, 0, 0, 0, 1, pixels)


def _move(pixels: Tensor, drawn: list[Op], fill: tuple[int, ...]) -> Tensor:
    """Rotate, shear and translate."""
    n, height, width, _ = pixels.shape
    device = pixels.device
    # Apple's GPUs have no float64; there, single pixels at the edge may be filled or not.
    exact = torch.float32 if device.type == "mps" else torch.float64
    entries = torch.tensor([matrix(op, height, width) for op in drawn], dtype=exact)
    a, b, c, d, e, f = send(entries.numpy(), device).t()[..., None, None]
    xs, ys = (torch.arange(side, device=device, dtype=exact) + 0.5 for side in (width, height))
    x, y = a * xs + b * ys[:, None] + c, d * xs + e * ys[:, None] + f  # (N, H, W)
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    bicubic = send(np.array([op.bicubic for op in drawn]), device)[:, None, None, None]
    columns, column_weights = _taps(x - 0.5, width, bicubic)
    rows, row_weights = _taps(y - 0.5, height, bicubic)
    first = torch.arange(n, device=device)[:, None, None] * (height * width)
    flat, out = pixels.reshape(-1, 3), torch.zeros(n, height, width, 3, device=device)
    for row, weight in zip(rows.unbind(-1), row_weights.unbind(-1), strict=True):
        index = (first + row * width)[..., None] + columns  # (N, H, W, 4)
        taps = flat[index.view(-1)].view(*index.shape, 3)
        out.addcmul_((taps * column_weights[..., None]).sum(3), weight[..., None])
    # Decimals are cut off, as in Pillow.
    out = out.add_(1e-3).clamp_(0, 255).to(torch.uint8)
    return torch.where(outside[..., None], send(np.array(fill, np.uint8), device), out)


def _taps(position: Tensor, side: int, bicubic: Tensor) -> tuple[Tensor, Tensor]:
    """Return the four pixels along one axis that a position is interpolated from, and their weights.

    Args:
        position: (N, H, W), in pixels from the centre of the first one.
        side: number of pixels along the axis; those at the edges are repeated.
        bicubic: bool (N, 1, 1, 1), whether the weights are those of the bicubic filter.

    Returns:
        int64 (N, H, W, 4) and float32 (N, H, W, 4).
    """
    whole = position.floor()
    t = (position - whole).float()
    zero = torch.zeros_like(t)
    weights = torch.where(bicubic, torch.stack(cubic_weights(t), -1), torch.stack((zero, 1 - t, t, zero), -1))
    return (whole.long()[..., None] + torch.arange(-1, 3, device=t.device)).clamp_(0, side - 1), weights


# Names of the ops that each function does; the functions change images (N, H, W, 3).
CHANGES: dict[Callable[..., Tensor], tuple[str, ...]] = {
    _change_points: tuple(name for name in OP_NAMES if name.startswith(POINT_OPS)),
    _auto_contrast: ("AutoContrast",),
    _equalize: ("Equalize",),
    _change_contrast: ("Contrast", "ContrastIncreasing"),
    _change_colour: ("Color", "ColorIncreasing", "Desaturate"),
    _change_sharpness: ("Sharpness", "SharpnessIncreasing"),
    _blur: ("GaussianBlur",),
    _move: AFFINE_OPS,
}
