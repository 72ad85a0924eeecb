"""Multi-scale attention fusion of MAFormer (Wang et al., arXiv:2209.01620).

By the paper's abstract and the equations of a later paper that restates them; there is no public code. The norms before
the fusion, its residual connection, the separable form of the down-sampling, and its initialisation are our choice.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from ops.attention.window import WindowAttention
from ops.functional import map_attention
from ops.precision import at_least_float32
from ops.registry import FIRST, Place, register_op
from retinue.utils.arithmetic import ceil_div


@register_op("multi_scale_fusion")
class MultiScaleFusion(nn.Module):
    """Tokens attend to their window, and the result attends to a learned down-sampling of the whole map.

    Each token of the smaller map is a learned weighted sum of all tokens, plus a position. For a map of another size
    than `size`, the weights and positions are interpolated. Cost is quadratic in H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads of both attentions.
        place: The stride sets the default of `size`.
        window: Side of a window in tokens; default 7. Windows are not shifted.
        ratio: Number of tokens of the smaller map, relative to the map, above 0 and at most 1; default 0.5.
        size: Size (H, W) of the map that the weights are learned for, or one number for both; by default the size at an
            image of 224 pixels.
        separable: Sum over rows, then over columns (default). False has a weight for each pair of tokens.
    """

    family = "mixed"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        window: int = 7,
        ratio: float = 0.5,
        size: int | tuple[int, int] | None = None,
        separable: bool = True,
    ):
        super().__init__()
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1, not {ratio}")
        H, W = map(int, to_2tuple(ceil_div(224, place.stride) if size is None else size))
        if min(H, W) < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        self.num_heads, self.side = num_heads, math.sqrt(ratio)
        self.local = WindowAttention(dim, num_heads, window=window, shift=0)
        h, w = self.grid(H, W)
        if separable:
            self.rows, self.columns = nn.Parameter(averaging(h, H)), nn.Parameter(averaging(w, W))
        else:
            self.weight = nn.Parameter(torch.einsum("hH,wW->hwHW", averaging(h, H), averaging(w, W)))
        self.separable = separable
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, dim, h, w), std=0.02))
        self.norm_q, self.norm_kv = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def resize_table(self, name: str, value: Tensor) -> Tensor:
        """Interpolate a checkpoint's weights or positions to this op's `size`, for `load_weights`."""
        shape = self.get_parameter(name).shape
        if name == "pos_embed":
            return interpolate(value, (shape[2], shape[3]))
        if name == "weight":
            return resize_joint_weights(value, (shape[0], shape[1]), (shape[2], shape[3]))
        return resize_weights(value, shape[0], shape[1])

    def forward(self, x: Tensor) -> Tensor:
        local = self.local(x)
        return local + self.fuse(local, x)

    def fuse(self, local: Tensor, x: Tensor) -> Tensor:
        """Let the tokens of `local` attend to the down-sampled map `x`; all (B, H, W, C)."""
        k, v = self.kv(self.norm_kv(self.downsample(x))).chunk(2, dim=-1)
        return self.proj(map_attention(self.q(self.norm_q(local)), k, v, self.num_heads))

    def downsample(self, x: Tensor) -> Tensor:
        """Return the smaller map (B, h, w, C) of (B, H, W, C)."""
        H, W = x.shape[1:3]
        h, w = self.grid(H, W)
        if self.separable:
            rows, columns = resize_weights(self.rows, h, H), resize_weights(self.columns, w, W)
            x = torch.einsum("hH,wW,bHWc->bhwc", rows.to(x.dtype), columns.to(x.dtype), x)
        else:
            x = torch.einsum("hwHW,bHWc->bhwc", resize_joint_weights(self.weight, (h, w), (H, W)).to(x.dtype), x)
        pos_embed = self.pos_embed
        if pos_embed.shape[2:] != (h, w):
            pos_embed = interpolate(pos_embed, (h, w))
        return x + pos_embed.permute(0, 2, 3, 1).to(x.dtype)

    def grid(self, H: int, W: int) -> tuple[int, int]:
        """Return the size of the smaller map."""
        return math.ceil(self.side * H), math.ceil(self.side * W)


def averaging(count: int, size: int) -> Tensor:
    """Return the matrix (count, size) that averages `size` positions in `count` cells of nearly equal length."""
    cells = torch.arange(size) * count // size
    matrix = (cells == torch.arange(count)[:, None]).float()
    return matrix / matrix.sum(1, keepdim=True)


def resize_weights(weight: Tensor, count: int, size: int) -> Tensor:
    """Interpolate weights (outputs, inputs) to (count, size), with about the same sum for each output."""
    if weight.shape == (count, size):
        return weight
    return interpolate(weight[None, None], (count, size))[0, 0] * (weight.shape[1] / size)


def resize_joint_weights(weight: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Interpolate weights (h', w', H', W') to (*grid, *size), with about the same sum for each output."""
    if weight.shape == (*grid, *size):
        return weight
    old_grid, old_size = weight.shape[:2], weight.shape[2:]
    weight = interpolate(weight.flatten(0, 1)[None], size)[0]  # (h' * w', H, W)
    weight = interpolate(weight.flatten(1).T.unflatten(1, old_grid)[None], grid)[0]  # (H * W, h, w)
    return weight.flatten(1).T.unflatten(1, size).unflatten(0, grid) * (math.prod(old_size) / math.prod(size))


def interpolate(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate (B, C, H, W) to `size`; a smaller size averages, so that no weight is passed over."""
    (x,) = at_least_float32(x)
    return F.interpolate(x, size, mode="bilinear", antialias=True)
