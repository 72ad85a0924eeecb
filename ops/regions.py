"""Regions of a map: superpixels of its features, and attention inside regions of any sizes and shapes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.precision import at_least_float32, without_autocast


@torch.no_grad()
def superpixels(x: Tensor, side: int, steps: int, compactness: float) -> Tensor:
    """Return the superpixel of each token: (B, H * W), numbered from 0 in each image.

    Superpixels are clusters of k-means (SLIC: Achanta et al., TPAMI 2012) over the normalised features and the
    positions of tokens. K-means starts from the means of a regular grid of cells; a cluster without members is kept.

    Args:
        x: Map (B, H, W, C).
        side: Number of cells along each side of the map; less on a map with fewer tokens along it.
        steps: Number of times that the clusters' means are computed again.
        compactness: Weight of the positions, which count in units of the mean distance of the cells' centres: 0
            clusters by the features alone, and a very large value gives the cells.
    """
    H, W = x.shape[1:3]
    grid = (min(side, H), min(side, W))
    with without_autocast(x):
        (features,) = at_least_float32(x)
        spacing = (H * W / (grid[0] * grid[1])) ** 0.5
        axes = (torch.arange(n, device=x.device, dtype=features.dtype) * compactness / spacing for n in (H, W))
        positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).expand(x.shape[0], -1, -1, -1)
        features = torch.cat([F.normalize(features, dim=-1), positions], dim=-1)
        means = F.adaptive_avg_pool2d(features.permute(0, 3, 1, 2), grid).flatten(2).transpose(1, 2)  # (B, K, C + 2)
        features = features.flatten(1, 2)
        for _ in range(steps):
            members = F.one_hot(nearest(features, means), means.shape[1]).to(features.dtype)
            counts = members.sum(1).unsqueeze(-1)
            means = torch.where(counts > 0, members.transpose(1, 2) @ features / counts, means)
        return nearest(features, means)


def nearest(x: Tensor, means: Tensor) -> Tensor:
    """Return the index of the mean (B, K, C) with the smallest distance to each of x (B, N, C): (B, N)."""
    return (x @ means.transpose(1, 2) - means.square().sum(-1).unsqueeze(1) / 2).argmax(-1)


def region_attention(q: Tensor, k: Tensor, v: Tensor, labels: Tensor, scale: float, regions: int) -> Tensor:
    """Compute attention of each token to the tokens of its image with the same label.

    Regions whose sizes have the same number of binary digits are computed together, padded to the largest of them. So
    cost is at most four times the sum of the regions' squared sizes, and no larger matrix is built.

    Args:
        q: Queries (B, heads, N, D).
        k: Keys (B, heads, N, D).
        v: Values (B, heads, N, D).
        labels: Whole numbers of at least 0, (B, N).
        scale: Factor on the scores before the softmax.
        regions: Number of regions of equal size for which operations are counted on the meta device, where labels have
            no values.

    Returns:
        Tensor (B, heads, N, D).
    """
    B, _, N, _ = q.shape
    if labels.is_meta:
        q, k, v = (t[:, :, : N // regions * regions].unflatten(2, (regions, -1)) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=scale).flatten(2, 3)
        return F.pad(out, (0, 0, 0, N - out.shape[2]))
    images = torch.arange(B, device=labels.device).unsqueeze(1)
    _, region, sizes = (images * (labels.max() + 1) + labels).unique(return_inverse=True, return_counts=True)
    order = region.flatten().argsort(stable=True)
    starts = sizes.cumsum(0) - sizes
    digits = sizes.to(torch.float64).log2().floor()
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))  # (B * N, heads, D)
    outputs, tokens = [], []
    for number in digits.unique():
        start, size = (t[digits == number].unsqueeze(1) for t in (starts, sizes))
        step = torch.arange(int(size.max()), device=size.device)
        present = step < size  # (regions, length)
        # Places after a region's end repeat its last token
        index = order[torch.minimum(start + step, start + size - 1)]
        q_rows, k_rows, v_rows = (t[index].transpose(1, 2) for t in (q, k, v))  # (regions, heads, length, D)
        out = F.scaled_dot_product_attention(q_rows, k_rows, v_rows, attn_mask=present[:, None, None], scale=scale)
        outputs.append(out.transpose(1, 2)[present])
        tokens.append(index[present])
    out = torch.cat(outputs)[torch.cat(tokens).argsort()]
    return out.unflatten(0, (B, N)).transpose(1, 2)
