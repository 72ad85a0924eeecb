"""Corruptions of test images: those of ImageNet-C and CIFAR-10-C, occlusion, and shuffled patches.

The 15 corruptions of the benchmark and the 4 that it keeps for validation follow the specification of Hendrycks and
Dietterich (ICLR 2019, arXiv:1903.12261; github.com/hendrycks/robustness) in `corruption_levels`. Images whose shorter
side is below `BOUND` have the strengths of CIFAR-10-C, other images those of ImageNet-C; lengths in pixels scale with
the shorter side. What differs from the specification:

- `frost` has generated textures with the mean and the deviation of the authors' five photos instead of these photos;
- `spatter` takes the border of the drops for their edges, where the authors run OpenCV's Canny;
- images are not stored as JPEGs of quality 85 afterwards, as those of ImageNet-C are.

`occlusion` and `patch_shuffle` are those of Naseer et al. (NeurIPS 2021, arXiv:2105.10497): cells of a grid become
black, or change places.
"""

import io
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.signal import fftconvolve

from datamodules.corruption_levels import CIFAR, IMAGENET, NAMES, PATCHES, SEVERITIES
from retinue.utils.suggestions import nearest

# Geometric mean of the sides of CIFAR's and ImageNet's images, in pixels.
BOUND = math.sqrt(32 * 224)
# Mean (R, G, B) and deviation, from 0 to 255, of the five photos that the authors draw from.
FROSTS = (((78, 149, 166), 19), ((201, 205, 214), 22), ((201, 205, 214), 22), ((138, 153, 165), 29),
          ((112, 123, 135), 43))  # fmt: skip
OCCLUSION_GRID = 14
GREY_WEIGHTS = np.array([0.299, 0.587, 0.114])
WATER, MUD = np.array([175, 238, 238]) / 255, np.array([63, 42, 20]) / 255


def corrupt(image: np.ndarray, name: str, severity: int) -> np.ndarray:
    """Return a corrupted image; all that is random follows from the image, the name and the severity.

    Args:
        image: uint8 (H, W, 3), or (H, W, 1) for grey.
        name: name of the corruption, one of `CORRUPTIONS`.
        severity: strength, 1 to 5.

    Returns:
        uint8, of the same shape.

    Raises:
        ValueError: if there is no such corruption or severity, or the image has another number of channels.
    """
    if name not in NAMES:
        raise ValueError(f"no corruption is called {name!r}.{nearest(name, NAMES)} There are: {', '.join(NAMES)}")
    if severity not in SEVERITIES:
        raise ValueError(f"a corruption has a severity from 1 to 5, not {severity!r}")
    if image.shape[2] not in (1, 3):
        raise ValueError(f"data.corrupt is for images of 1 or 3 channels, not of {image.shape[2]} bands")
    if image.shape[2] == 1:
        colour = corrupt(image.repeat(3, axis=2), name, severity)
        return np.rint(colour @ GREY_WEIGHTS).astype(np.uint8)[..., None]
    rng = np.random.default_rng([zlib.crc32(image.tobytes()), zlib.crc32(name.encode()), severity])
    if name in PATCHES:
        return CORRUPTIONS[name](image, PATCHES[name][severity - 1], rng)
    side = min(image.shape[:2])
    levels, reference = (CIFAR, 32) if side < BOUND else (IMAGENET, 224)
    corrupted = CORRUPTIONS[name](image / 255, levels[name][severity - 1], side / reference, rng)
    # The authors cut off the decimals.
    return (np.clip(corrupted, 0, 1) * 255 + 1e-6).astype(np.uint8)


@dataclass(frozen=True)
class CorruptTransform:
    """Transform of a test sample that corrupts the image after evaluation's resizing and cropping.

    Attributes:
        transform: evaluation's transform.
        name: name of the corruption.
        severity: strength, 1 to 5.
    """

    transform: Callable[[dict], dict]
    name: str
    severity: int

    def __call__(self, sample: dict) -> dict:
        sample = self.transform(sample)
        return sample | {"image": corrupt(sample["image"], self.name, self.severity)}


def gaussian_noise(x: np.ndarray, deviation: float, scale: float, rng: np.random.Generator) -> np.ndarray:
    return x + rng.normal(0, deviation, x.shape)


def shot_noise(x: np.ndarray, photons: float, scale: float, rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(x * photons) / photons


def impulse_noise(x: np.ndarray, share: float, scale: float, rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random(x.shape) < share, rng.random(x.shape) < 0.5, x)


def speckle_noise(x: np.ndarray, deviation: float, scale: float, rng: np.random.Generator) -> np.ndarray:
    return x + x * rng.normal(0, deviation, x.shape)


def gaussian_blur(x: np.ndarray, deviation: float, scale: float, rng: np.random.Generator) -> np.ndarray:
    return _blur(x, deviation * scale)


def glass_blur(x: np.ndarray, level: tuple, scale: float, rng: np.random.Generator) -> np.ndarray:
    deviation, displacement, passes = level[0] * scale, max(1, round(level[1] * scale)), level[2]
    height, width, _ = x.shape
    x = np.floor(_blur(x, deviation) * 255) / 255
    # Position from which each pixel takes its value. The authors' exchange of two views of an array in fact copies one
    # pixel onto the other one, and the published images show that.
    source = list(range(height * width))
    rows, columns = range(height - displacement, displacement, -1), range(width - displacement, displacement, -1)
    for _ in range(passes):
        moves = rng.integers(-displacement, displacement, (len(rows), len(columns), 2)) @ [width, 1]
        for row, row_moves in zip(rows, moves.tolist(), strict=True):
            for column, move in zip(columns, row_moves, strict=True):
                source[row * width + column] = source[row * width + column + move]
    return _blur(x.reshape(-1, 3)[source].reshape(x.shape), deviation)


def defocus_blur(x: np.ndarray, level: tuple, scale: float, rng: np.random.Generator) -> np.ndarray:
    radius, smoothing = level[0] * scale, level[1] * scale
    reach = max(8, math.ceil(radius))
    offsets = np.arange(-reach, reach + 1)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(float)
    # The authors' kernel has 3 values, above a radius of 8 pixels 5.
    half = 1 if radius <= 8 else 2
    weights = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * smoothing**2))
    disk = ndimage.correlate(disk / disk.sum(), np.outer(weights, weights) / weights.sum() ** 2, mode="mirror")
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    return np.asarray(fftconvolve(padded, disk[..., None], mode="valid", axes=(0, 1)))


def motion_blur(x: np.ndarray, level: tuple, scale: float, rng: np.random.Generator) -> np.ndarray:
    return _move(x, level[0] * scale, level[1] * scale, rng.uniform(-45, 45))


def zoom_blur(x: np.ndarray, level: tuple, scale: float, rng: np.random.Generator) -> np.ndarray:
    zooms = [_zoom(x, factor) for factor in np.arange(1, *level)]
    return (x + sum(zooms)) / (len(zooms) + 1)


def snow(x: np.ndarray, level: tuple, scale: float, rng: np.random.Generator) -> np.ndarray:
    mean, deviation, flake, threshold, radius, motion, share = level
    layer = _zoom(rng.normal(mean, deviation, (*x.shape[:2], 1)), max(1.0, flake * scale))
    layer = np.floor(np.clip(np.where(layer < threshold, 0, layer), 0, 1) * 255) / 255
    layer = np.floor(_move(layer, radius * scale, motion * scale, rng.uniform(-135, -45)) * 255) / 255
    whitened = np.maximum(x, (x @ GREY_WEIGHTS)[..., None] * 1.5 + 0.5)
    return share * x + (1 - share) * whitened + layer + np.rot90(layer, 2)


def frost(x: np.ndarray, level: tuple, scale: float, rng: np.random.Generator) -> np.ndarray:
    colour, deviation = FROSTS[rng.integers(len(FROSTS))]
    heights = _plasma(x.shape[:2], 1.15, rng)
    texture = np.array(colour) + deviation * ((heights - heights.mean()) / heights.std())[..., None]
    return level[0] * x + level[1] * np.clip(texture, 0, 255) / 255


def fog(x: np.ndarray, level: tuple, scale: float, rng: np.random.Generator) -> np.ndarray:
    weight, decay = level
    return (x + weight * _plasma(x.shape[:2], decay, rng)[..., None]) * x.max() / (x.max() + weight)


def spatter(x: np.ndarray, level: tuple, scale: float, rng: np.random.Generator) -> np.ndarray:
    mean, deviation, blur, threshold, strength, is_mud = level
    liquid = _blur(rng.normal(mean, deviation, x.shape[:2]), blur * scale)
    drops = liquid >= threshold
    if is_mud:
        cover = _blur(drops.astype(float), strength * scale)[..., None]
        cover = np.where(cover < 0.8, 0, cover)
        return x * (1 - cover) + MUD * cover
    if not drops.any():
        return x
    depth = np.floor(np.where(drops, liquid, 0) * 255)
    depth = depth * _relief(drops)
    return x + strength * (depth / max(depth.max(), 1))[..., None] * WATER


def brightness(x: np.ndarray, summand: float, scale: float, rng: np.random.Generator) -> np.ndarray:
    return _change_hsv(x, 2, 1, summand)


def contrast(x: np.ndarray, factor: float, scale: float, rng: np.random.Generator) -> np.ndarray:
    mean = x.mean((0, 1))
    return (x - mean) * factor + mean


def saturate(x: np.ndarray, level: tuple, scale: float, rng: np.random.Generator) -> np.ndarray:
    return _change_hsv(x, 1, *level)


def jpeg_compression(x: np.ndarray, quality: int, scale: float, rng: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    _picture(x).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)) / 255


def pixelate(x: np.ndarray, factor: float, scale: float, rng: np.random.Generator) -> np.ndarray:
    height, width, _ = x.shape
    small = _picture(x).resize((int(width * factor), int(height * factor)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX)) / 255


def elastic_transform(x: np.ndarray, level: tuple, scale: float, rng: np.random.Generator) -> np.ndarray:
    strength, deviation, corner = (value * scale for value in level)
    centre, side = np.array(x.shape[:2]) // 2, min(x.shape[:2]) // 3
    # Three corners of a square, (3, 2), in rows and columns
    square = centre + side * np.array([[1, 1], [-1, 1], [-1, -1]])
    moved = np.column_stack([square + rng.uniform(-corner, corner, square.shape), np.ones(3)])
    affine = np.linalg.solve(moved, square).T  # (2, 3)
    positions = np.indices(x.shape[:2]).astype(float)
    whole = np.tensordot(affine[:, :2], positions, 1) + affine[:, 2][:, None, None]
    x = _sample(x, whole, "mirror")
    moves = rng.uniform(-1, 1, (2, *x.shape[:2]))
    smooth = ndimage.gaussian_filter(moves, (0, deviation, deviation), mode="reflect", truncate=3)
    return _sample(x, positions + strength * smooth, "reflect")


def occlusion(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    drawn = rng.permutation(OCCLUSION_GRID**2).reshape(OCCLUSION_GRID, OCCLUSION_GRID)
    rows, columns = (np.arange(side) * OCCLUSION_GRID // side for side in image.shape[:2])
    covered = (drawn < round(share * OCCLUSION_GRID**2))[rows[:, None], columns]
    return np.where(covered[..., None], np.uint8(0), image)


def patch_shuffle(image: np.ndarray, grid: int, rng: np.random.Generator) -> np.ndarray:
    # Cells have equal sizes; the rest at the right and at the bottom stays.
    (height, width), shuffled = (side // grid for side in image.shape[:2]), image.copy()
    for cell, source in enumerate(rng.permutation(grid**2)):
        (top, left), (from_top, from_left) = divmod(cell, grid), divmod(int(source), grid)
        part = image[from_top * height : (from_top + 1) * height, from_left * width : (from_left + 1) * width]
        shuffled[top * height : (top + 1) * height, left * width : (left + 1) * width] = part
    return shuffled


def _blur(x: np.ndarray, deviation: float) -> np.ndarray:
    """Blur rows and columns by a Gaussian kernel that ends at four deviations, as scikit-image does."""
    return ndimage.gaussian_filter(x, (deviation, deviation, 0)[: x.ndim], mode="nearest", truncate=4)


def _move(x: np.ndarray, radius: float, deviation: float, angle: float) -> np.ndarray:
    """Blur (H, W, C) along a direction as ImageMagick's motion blur does: half a Gaussian kernel, whole pixels.

    Args:
        x: the image.
        radius: half the length of the kernel in pixels.
        deviation: deviation of the kernel in pixels.
        angle: direction in degrees.
    """
    steps = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-(steps**2) / (2 * deviation**2))
    direction = np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))
    shifts = [np.ceil(steps * part - 0.5).astype(int) for part in direction]
    reach, (height, width, _) = len(steps), x.shape
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    moved = np.zeros_like(x)
    for weight, row, column in zip(weights / weights.sum(), *shifts, strict=True):
        moved += weight * padded[reach + row : reach + row + height, reach + column : reach + column + width]
    return moved


def _zoom(x: np.ndarray, factor: float) -> np.ndarray:
    """Enlarge the centre of (H, W, C) to the size of the whole by linear interpolation."""
    sides = x.shape[:2]
    crops = [math.ceil(side / factor) for side in sides]
    starts = [(side - crop) // 2 for side, crop in zip(sides, crops, strict=True)]
    centre = x[starts[0] : starts[0] + crops[0], starts[1] : starts[1] + crops[1]]
    zoomed = np.asarray(ndimage.zoom(centre, (factor, factor, 1), order=1))
    top, left = ((large - side) // 2 for large, side in zip(zoomed.shape[:2], sides, strict=True))
    return zoomed[top : top + sides[0], left : left + sides[1]]


def _plasma(sides: tuple[int, int], decay: float, rng: np.random.Generator) -> np.ndarray:
    """Return a random height map (H, W) from 0 to 1 by the diamond-square algorithm on a torus.

    Args:
        sides: (H, W).
        decay: factor by which the random part decreases from a scale to the next smaller one, before it is squared.
        rng: source of the random part.
    """
    side = 2 ** math.ceil(math.log2(max(sides)))
    heights, spread, step = np.zeros((side, side)), 100.0, side

    def add_noise(total: np.ndarray) -> np.ndarray:
        return total / 4 + rng.uniform(-(spread**2), spread**2, total.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        centres = add_noise(pairs + np.roll(pairs, -1, 1))
        heights[half::step, half::step] = centres
        heights[::step, half::step] = add_noise(centres + np.roll(centres, 1, 0) + corners + np.roll(corners, -1, 1))
        heights[half::step, ::step] = add_noise(centres + np.roll(centres, 1, 1) + corners + np.roll(corners, -1, 0))
        step, spread = half, spread / decay
    heights -= heights.min()
    return (heights / heights.max())[: sides[0], : sides[1]]


def _relief(drops: np.ndarray) -> np.ndarray:
    """Return how the light falls on drops of water, (H, W) from 0 to 255, from the distance to the drops' borders."""
    border = drops ^ ndimage.binary_erosion(drops, border_value=1)
    distance = np.minimum(np.asarray(ndimage.distance_transform_edt(~border)), 20)
    distance = ndimage.uniform_filter(distance, 3, mode="mirror").astype(np.uint8)
    counts = np.bincount(distance.ravel(), minlength=256)
    first = counts[counts > 0][0]
    equal = np.rint((counts.cumsum() - first) * 255 / max(1, distance.size - first))[distance]
    light = ndimage.correlate(equal, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], float), mode="mirror")
    return ndimage.uniform_filter(np.clip(light, 0, 255), 3, mode="mirror")


def _change_hsv(x: np.ndarray, channel: int, factor: float, summand: float) -> np.ndarray:
    """Return (H, W, 3) with another saturation (channel 1) or value (channel 2) in the HSV space."""
    from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

    hsv = rgb_to_hsv(x)
    hsv[..., channel] = np.clip(hsv[..., channel] * factor + summand, 0, 1)
    return hsv_to_rgb(hsv)


def _sample(x: np.ndarray, positions: np.ndarray, mode: str) -> np.ndarray:
    """Return (H, W, C) interpolated at positions (2, H, W) of rows and columns."""
    channels = [ndimage.map_coordinates(x[..., c], positions, order=1, mode=mode) for c in range(x.shape[2])]
    return np.stack(channels, -1)


def _picture(x: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(x * 255).astype(np.uint8))


CORRUPTIONS: dict[str, Callable[..., Any]] = {name: globals()[name] for name in NAMES}
