"""MultiGrain's margin loss: copies of an image have near features, and those of other images have far ones.

Papers: MultiGrain: a unified image embedding for classes and instances (Berman et al., 2019, arXiv:1902.05509), whose
loss is that of Sampling Matters in Deep Embedding Learning (Wu et al., ICCV 2017, arXiv:1706.07567), with copies of an
image in place of images of a class. Written after the papers and checked against facebookresearch/multigrain and
chaoyuaw/sampling_matters. The weights of the draws are computed row by row as logarithms, so none of them underflows.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from retinue.tasks.methods.processes import gather, ranks

# Distance between unit vectors that parts near ones from far ones at the start, and the margin on both sides of it.
BOUNDARY, MARGIN = 1.2, 0.2
# Negatives nearer than this are drawn as if they were this far, and none beyond the other distance is drawn.
NEAREST, FARTHEST = 0.5, 1.4
# Added to a squared distance before its root
EPS = 1e-8


class MarginLoss(nn.Module):
    """Loss of the distances between an anchor, a copy of the same image and another image.

    A distance d to a copy costs max(0, d - b + m), and one to another image max(0, b - d + m), where the boundary b is
    learnt and m is `MARGIN`. The loss is the mean over the costs that are not 0.

    Args:
        copies: Number of copies of an image in a batch, at least 2.
    """

    def __init__(self, copies: int):
        super().__init__()
        self.pairs = copies - 1
        self.boundary = nn.Parameter(torch.tensor(BOUNDARY))

    def forward(self, features: Tensor, image: Tensor, seed: int) -> Tensor:
        """Compute the loss of all processes' features, a scalar; every process computes the same.

        Args:
            features: (B, C), this process's features.
            image: int64 (B,), number of the image that each row is a copy of.
            seed: Seed of the draws, the same on all processes.
        """
        unit, image = in_order(F.normalize(features.float(), dim=1)), in_order(image)
        positives, known = copies_of(image, self.pairs)
        negatives = draw_negatives(unit.detach(), image, self.pairs, seed)
        near, far = (_distances(unit, others) for others in (positives, negatives))
        costs = torch.stack([near - self.boundary, self.boundary - far]).add(MARGIN).relu() * known
        return costs.sum() / (costs > 0).sum().clamp(min=1)


def in_order(x: Tensor) -> Tensor:
    """Return the rows of all processes (W * B, ...) in the order in which one process would have them."""
    return gather(x).unflatten(0, (ranks(), -1)).transpose(0, 1).flatten(0, 1)


def copies_of(image: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the rows of `count` other copies of each row's image, (N, count), and which of them there are.

    Rows without another image in the batch have no copies either, since nothing could be compared with them.

    Args:
        image: int64 (N,), number of the image of each row.
        count: Number of other copies.
    """
    same = image[:, None] == image
    others = same.float().fill_diagonal_(0)
    known, rows = others.topk(count, dim=1)
    return rows, (known > 0) & ~same.all(1, keepdim=True)


@torch.no_grad()
def draw_negatives(unit: Tensor, image: Tensor, count: int, seed: int) -> Tensor:
    """Draw other images for each row, so that all distances up to `FARTHEST` are about equally frequent.

    The weight of a distance d is the inverse of its density between random unit vectors, d^(2 - C) (1 - d²/4)^((3 - C)
    / 2). A row whose other images are all farther than `FARTHEST` draws from all of them alike. Rows are drawn without
    repetition if there are enough.

    Args:
        unit: Unit vectors (N, C).
        image: int64 (N,), number of the image of each row.
        count: Number of draws for each row.
        seed: Seed of the draws.

    Returns:
        int64 (N, count), drawn rows.
    """
    dim = unit.shape[1]
    with torch.autocast(unit.device.type, enabled=False):
        distance = torch.cdist(unit, unit).clamp(min=NEAREST)
    other = image[:, None] != image
    near = other & (distance < FARTHEST)
    has_near = near.any(1, keepdim=True)
    squares = distance.clamp(max=FARTHEST).square()
    log_weights = (2 - dim) / 2 * squares.log() - (dim - 3) / 2 * (1 - squares / 4).log()
    allowed = torch.where(has_near, near, other)
    log_weights = torch.where(has_near, log_weights, 0.0).masked_fill(~allowed, -math.inf)
    # The largest sums of logarithms and Gumbel noise are draws by these weights without repetition.
    generator = torch.Generator(unit.device).manual_seed(seed)
    noise = -torch.empty_like(log_weights).exponential_(generator=generator).log()
    drawn = (log_weights + noise).topk(count, dim=1).indices
    enough = allowed.sum(1, keepdim=True).clamp(min=1)
    return drawn.gather(1, torch.arange(count, device=unit.device) % enough)


def _distances(unit: Tensor, rows: Tensor) -> Tensor:
    """Return the distances (N, count) between each unit vector (N, C) and its rows (N, count)."""
    return (unit[:, None] - unit[rows]).square().sum(-1).add(EPS).sqrt()


def check_margin_loss(augment: Mapping[str, Any], *, maps: bool) -> None:
    """Check that the margin loss has several whole copies of an image in a batch, and is the only loss that learns.

    Args:
        augment: Section `augment` of a recipe.
        maps: Whether the net also learns from the maps of a teacher.

    Raises:
        ValueError: There is one copy only, images are mixed or have views, or there is a loss between maps.
    """
    if maps or augment.get("jsd"):
        other = "task.distillation.maps" if maps else "recipe.augment.jsd"
        raise ValueError(f"task.margin_loss cannot be combined with {other}")
    if (augment.get("repeats") or 1) < 2:
        raise ValueError("task.margin_loss compares copies of an image: it needs recipe.augment.repeats=3")
    if augment["mixup"] or augment["cutmix"] or augment.get("maskmix"):
        raise ValueError(
            "task.margin_loss needs whole images: recipe.augment.mixup=0 recipe.augment.cutmix=0 "
            "recipe.augment.maskmix=null"
        )


def register_parts(model: Any) -> None:
    """Let FSDP gather the weights for the two parts of a net that `run_with_features` calls, if the net is sharded."""
    if isinstance(model, FSDPModule):
        for part in ("forward_features", "forward_head"):
            register_fsdp_forward_method(model, part)  # pyright: ignore[reportArgumentType]


def run_with_features(model: Any, image: Tensor) -> tuple[Any, Tensor]:
    """Return a net's scores for images (B, C, H, W), and the features (B, D) that its classifier reads.

    Raises:
        ValueError: The classifier does not read one vector for each image.
    """
    maps = model.forward_features(image)
    features = model.forward_head(maps, pre_logits=True)
    if features.ndim != 2:
        raise ValueError("task.margin_loss needs a net whose classifier reads one vector for each image")
    return model.forward_head(maps), features
