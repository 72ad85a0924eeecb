"""Multi-scale deformable attention (Zhu et al., ICLR 2021, arXiv:2010.04159): definition, and choice of kernels.

DINO and Mask2Former use it in their heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.backend import obstacle_to_kernels, primitive, use_triton


@primitive
def deformable_attention(value: Tensor, spatial_shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Compute for each query the weighted sum of values that are sampled bilinearly at its locations.

    The centre of the first token of a level with W columns lies at x = 0.5 / W. Outside a map, the values are zero.
    Half precision is computed in float32.

    Args:
        value: Values (B, N, heads, D) of the tokens of all levels, concatenated.
        spatial_shapes: Height and width of each level's map (levels, 2), integers.
        locations: x and y of each sample (B, Q, heads, levels, points, 2), relative to the map's width and height, from
            0 to 1.
        weights: Weights of the samples (B, Q, heads, levels, points).

    Returns:
        Tensor (B, Q, heads * D) of the values' type.

    Raises:
        ValueError: `ops.backend=triton` was chosen and the kernels cannot run.
    """
    if use_triton("deformable_attention", obstacle_to_deformable_kernels(value, locations)):
        from ops.kernels.deformable_attention import deformable_attention as kernel

        return kernel(value, spatial_shapes, locations, weights)
    dtype = torch.promote_types(value.dtype, torch.float32)
    return sample_and_mix(value.to(dtype), spatial_shapes, locations.to(dtype), weights.to(dtype)).to(value.dtype)


def obstacle_to_deformable_kernels(value: Tensor, locations: Tensor) -> str | None:
    """Return the reason why the Triton kernels cannot run, or None if they can."""
    if reason := obstacle_to_kernels(value, value.shape[-1]):
        return reason
    # The kernels sort the samples by the four tokens around them, both numbered in 32 bits
    B, N, heads, _ = value.shape
    largest = max(4 * B * N * heads, locations.numel() // 2)
    return None if largest < 2**31 else f"it numbers samples and cells of the maps below 2^31, not {largest}"


def sample_and_mix(value: Tensor, spatial_shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Compute `deformable_attention` in plain PyTorch; the arguments are the same, of one type of at least 32 bits."""
    B, _, heads, D = value.shape
    Q = locations.shape[1]
    sizes: list[list[int]] = spatial_shapes.tolist()
    # `grid_sample` takes coordinates from -1 to 1
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B * heads, Q, levels, points, 2)
    maps = value.permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in sizes], 2)  # (B * heads, D, h * w)
    sampled = [
        F.grid_sample(tokens.unflatten(2, (h, w)), grid[:, :, level], align_corners=False)
        for level, (tokens, (h, w)) in enumerate(zip(maps, sizes, strict=True))
    ]
    weights = weights.transpose(1, 2).reshape(B * heads, 1, Q, -1)
    mixed = (torch.cat(sampled, -1) * weights).sum(-1)  # (B * heads, D, Q)
    return mixed.view(B, heads * D, Q).transpose(1, 2).contiguous()
