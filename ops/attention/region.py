"""Region attention of the Region Attention Transformer, RAT (Yang et al., MICCAI 2024, arXiv:2407.09268).

Paper: Region Attention Transformer for Medical Image Restoration. Written after the paper and the authors' repository,
Yaziwel/Region-Attention-Transformer-for-Medical-Image-Restoration (Apache-2.0). The authors take the regions from a
segmentation model; superpixels and clusters of the features, which stand in where no regions are given, are ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.clusters import Centroids, nearest_centroids, spherical_step
from ops.functional import merge_heads, split_heads
from ops.precision import at_least_float32, without_autocast
from ops.regions import region_attention, superpixels
from ops.registry import FIRST, Place, register_op
from retinue.utils.suggestions import nearest

SOURCES = ("superpixels", "centers")
# Regions along each side of the map by stage: about 7 x 7 tokens each at an image of 224 pixels
GRIDS = (8, 4, 2, 1)


def resize_labels(labels: Tensor, x: Tensor) -> Tensor:
    """Return labels (h, w) or (B, h, w) for the tokens of a map (B, H, W, C), taking the nearest: (B, H, W)."""
    rows, columns = (
        torch.arange(side, device=labels.device) * given // side
        for side, given in zip(x.shape[1:3], labels.shape[-2:], strict=True)
    )
    return labels[..., rows[:, None], columns].expand(x.shape[:3])


@register_op("region")
class RegionAttention(nn.Module):
    """Tokens attend to the tokens of their region, which may have any size and shape.

    `forward(x, labels)` takes a map of regions. Without one, each image is divided by its features, without a gradient:

    - "superpixels": k-means over the features and the positions of the tokens, which starts from a regular grid.
    - "centers": the nearest of grid² centres, by the cosine, which follow those of the training batches
      (`ops.clusters.Centroids`).

    Cost is the sum of the squared sizes of the regions; that of superpixels grows with H * W * grid².

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The stage sets the default of `grid`.
        source: "superpixels" (default) or "centers".
        grid: Number of regions along each side of the map; by default 8, 4, 2 and 1 by stage.
        steps: Number of steps of k-means for superpixels; default 5.
        compactness: Weight of the positions in superpixels; default 1. See `ops.regions.superpixels`.

    Raises:
        ValueError: A value is out of its range.
    """

    family = "sparse"
    renames = ((r"^project_out\.", "proj."),)
    # The sizes of the regions are data
    fullgraph = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        source: str = "superpixels",
        grid: int | None = None,
        steps: int = 5,
        compactness: float = 1.0,
    ):
        super().__init__()
        grid = GRIDS[min(place.stage, 3)] if grid is None else grid
        if source not in SOURCES:
            raise ValueError(f"source must be superpixels or centers, not {source!r}.{nearest(source, SOURCES)}")
        if grid < 1 or min(steps, compactness) < 0:
            raise ValueError(
                f"grid must be at least 1, and steps and compactness at least 0, not {grid}, {steps} and {compactness}"
            )
        self.num_heads, self.grid, self.steps, self.compactness = num_heads, grid, steps, compactness
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.centers = Centroids(grid**2, dim) if source == "centers" else None

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Mix the tokens of a map (B, H, W, C).

        Args:
            x: The map.
            labels: Number of each token's region, at least 0: (H, W) or (B, H, W). A map of another size, such as the
                image's, is resized by taking the nearest.
        """
        qkv = self.qkv(x.flatten(1, 2))
        regions = self.divide(x, qkv) if labels is None else resize_labels(labels, x).flatten(1)
        q, k, v = split_heads(qkv, 3 * self.num_heads).chunk(3, dim=1)
        # The authors scale by the number of heads, not by the channels of a head
        out = region_attention(q, k, v, regions, self.num_heads**-0.5, self.grid**2)
        return self.proj(merge_heads(out)).view(x.shape)

    def divide(self, x: Tensor, qkv: Tensor) -> Tensor:
        """Return the region of each token of a map (B, H, W, C): (B, H * W).

        Args:
            x: The map.
            qkv: Queries, keys and values, whose gradient is computed in every backward pass.
        """
        if self.centers is None:
            return superpixels(x, self.grid, self.steps, self.compactness)
        with without_autocast(x):
            unit = F.normalize(at_least_float32(x.detach().flatten(1, 2))[0], dim=-1)
            if self.training:
                self.centers.start(unit)
            means = F.normalize(self.centers.means.to(unit.dtype), dim=-1)
            if self.training:
                self.centers.follow(spherical_step(unit, means), after=qkv)
            return nearest_centroids(unit, means)
