"""Stored label maps for token labelling (Jiang et al., NeurIPS 2021, arXiv:2104.10858).

A label map holds, for each cell of a grid over an image, the scores of the most probable classes by a teacher. The
format is that of the authors' `generate_label.py` (zihangJiang/TokenLabeling, Apache-2.0): a torch file
`<class>/<image>.pt` of one tensor (2, k, h, w), of which the first entry holds scores before the softmax and the second
one labels. Files are read without executing code that they contain.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.auto_augment import AFFINE_OPS, Op
from datamodules.batch_ops import matrix
from models.unpickling import read_weights

# Samples of a label map along each side of a token
SAMPLES = 2


class LabelMaps:
    """A set of images whose samples also hold the label map of the image.

    A sample gets `map_scores`, float32 (k, h, w), and `map_labels`, int64 (k, h, w).

    Args:
        images: the set of labelled images.
        folder: folder of the label maps, named as the images with the ending `.pt`.
        num_classes: number of classes K; labels are 0 to K - 1.

    Raises:
        ValueError: if the folder is missing; reading a sample raises it if its map is missing or damaged.
    """

    def __init__(self, images: Any, folder: str, num_classes: int):
        self.images, self.folder, self.num_classes = images, Path(folder).expanduser(), num_classes
        if not self.folder.is_dir():
            raise ValueError(f"task.token_labels.source={folder} is no folder of label maps")

    @property
    def blank(self) -> dict:
        """Sample that stands for padding."""
        return self.images.blank

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Return the name of the image at a position."""
        return self.images.name(index)

    def __getitem__(self, index: int) -> dict:
        return self.images[index] | self.read(index)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """Read the label map of the image at a position."""
        path = self.folder / f"{os.path.splitext(self.name(index))[0]}.pt"
        if not path.is_file():
            raise ValueError(f"there is no label map {path}")
        content = read_weights(path)
        if not isinstance(content, Tensor) or content.ndim != 4 or len(content) != 2:
            found = tuple(content.shape) if isinstance(content, Tensor) else type(content).__name__
            raise ValueError(f"{path} must hold one tensor (2, k, h, w) of scores and labels, not {found}")
        scores, labels = content.float()
        if not (content.numel() and labels.min() >= 0 and labels.max() < self.num_classes):
            raise ValueError(f"{path} must hold labels from 0 to {self.num_classes - 1}, the classes of the data")
        return {"map_scores": scores.numpy(), "map_labels": labels.long().numpy()}


def view_matrix(box: Sequence[float], flips: Sequence[bool], ops: Iterable[Op], size: tuple[int, int]) -> np.ndarray:
    """Return the affine map from a training image to the image file that it was made of, float32 (2, 3).

    Positions are (x, y) as shares of the width and the height, from 0 to 1.

    Args:
        box: top, left, height and width of the crop, as shares of the sides of the file's image.
        flips: whether the crop was mirrored vertically and horizontally.
        ops: ops that were then applied; those that move pixels count.
        size: height and width of the training image in pixels.
    """
    top, left, height, width = box
    view = np.array([[width, 0, left], [0, height, top], [0, 0, 1]], np.float64)
    for axis, flipped in zip((1, 0), flips, strict=True):
        if flipped:
            mirror = np.eye(3)
            mirror[axis, axis], mirror[axis, 2] = -1, 1
            view = view @ mirror
    sides = np.array([size[1], size[0]], np.float64)
    for op in ops:
        if op.name in AFFINE_OPS:
            move = np.eye(3)
            move[:2] = np.reshape(matrix(op, *size), (2, 3))
            move[:2, :2] *= sides / sides[:, None]
            move[:2, 2] /= sides
            view = view @ move
    return view[:2].astype(np.float32)


def token_scores(scores: Tensor, labels: Tensor, view: Tensor, grid: tuple[int, int], num_classes: int) -> Tensor:
    """Return the label maps' scores for the tokens of training images, float32 (B, K, H, W).

    The scores of classes that a map does not list are 0, as in the authors' code. A token gets the mean of bilinear
    samples (`SAMPLES` along each side), which is RoIAlign for a crop; outside the image file all scores are 0.

    Args:
        scores: float32 (B, k, h, w).
        labels: int64 (B, k, h, w), 0 to K - 1.
        view: float32 (B, 2, 3), as `view_matrix` returns it.
        grid: rows H and columns W of tokens.
        num_classes: K.
    """
    b, _, h, w = scores.shape
    dense = scores.new_zeros(b, num_classes, h, w).scatter_(1, labels, scores)
    ys, xs = ((torch.arange(SAMPLES * n, device=view.device) + 0.5) / (SAMPLES * n) for n in grid)
    points = torch.stack([xs.expand(len(ys), -1), ys[:, None].expand(-1, len(xs)), xs.new_ones(len(ys), len(xs))], -1)
    source = torch.einsum("hwj,bij->bhwi", points, view)
    sampled = F.grid_sample(dense, 2 * source - 1, padding_mode="border", align_corners=False)
    inside = ((source >= 0) & (source <= 1)).all(-1)[:, None]
    return F.avg_pool2d(sampled * inside, SAMPLES)
