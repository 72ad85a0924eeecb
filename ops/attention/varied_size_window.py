"""Varied-size window attention, VSA (Zhang et al., ECCV 2022, arXiv:2204.08446).

Written after the paper and what the authors' repository, ViTAE-Transformer/ViTAE-VSA, computes. The repository names no
licence, so nothing of it is here.
"""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ops.attention.window import relative_position_index
from ops.functional import biased_attention
from ops.registry import FIRST, Place, register_op
from ops.windows import from_windows, pad_to_multiple, to_windows, window_means


@register_op("varied_size_window")
class VariedSizeWindowAttention(nn.Module):
    """Windows attend to keys and values sampled from a rectangle that each head moves and scales.

    The mean of the window's input gives, for each head and axis, a shift of the window and a factor on its side. Keys
    and values are read bilinearly at window² points of this rectangle; they are zeros outside the map. Scores have a
    learned bias for each relative position in the window, wherever its rectangle is.

    The map is zero-padded on the right and at the bottom to a multiple of the window; padded tokens count in a window's
    mean. (The authors' detection code puts half of the padding on the left and at the top.) Cost is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        window: Side of a window in tokens; default 7.
        out_dim: Number of channels of the output; by default `dim`.
    """

    family = "local"
    relative_position_index: Tensor
    renames = ((r"^relative_position_index$", None), (r"^(sampling_\w+)\.2\.", r"\1."))

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, window: int = 7, out_dim: int | None = None):
        super().__init__()
        if window < 1:
            raise ValueError(f"window must be at least 1, not {window}")
        out_dim = dim if out_dim is None else out_dim
        self.num_heads, self.window_size = num_heads, (window, window)
        # In the paper, scores are scaled by the channels of the input; attention scales by those of the output
        self.q_scale = (out_dim / dim) ** 0.5
        self.sampling_offsets = nn.Linear(dim, 2 * num_heads)
        self.sampling_scales = nn.Linear(dim, 2 * num_heads)
        self.qkv = nn.Linear(dim, 3 * out_dim)
        self.proj = nn.Linear(out_dim, out_dim)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)

    def no_weight_decay(self) -> set[str]:
        return {"relative_position_bias_table"}

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        padded = pad_to_multiple(x, self.window_size)
        size = padded.shape[1:3]
        grid = (size[0] // self.window_size[0], size[1] // self.window_size[1])

        q, kv = self.qkv(x).tensor_split([self.qkv.out_features // 3], dim=-1)
        q = to_windows(pad_to_multiple(self.q_scale * q, self.window_size), grid)
        kv = self.sample(kv, self.points(window_means(padded, self.window_size), grid, (H, W)))
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1).unsqueeze(0)
        out = biased_attention(torch.cat((q, kv), dim=-1), bias, self.num_heads)
        return self.proj(from_windows(out, grid, size)[:, :H, :W])

    def points(self, means: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Return the points that each head of each window reads: (B, heads, windows, window², 2).

        Args:
            means: Mean of each window's input, (B, windows, C).
            grid: Number of windows along H and W.
            size: Size (H, W) of the map.

        Returns:
            The x and y of each point, in the coordinates of `F.grid_sample`.
        """
        side, means = self.window_size[0], F.leaky_relu(means)
        # Points are at least float32, because half precision would round them
        dtype = torch.promote_types(means.dtype, torch.float32)
        offset, scale = (
            layer(means).to(dtype).unflatten(-1, (self.num_heads, 1, 2)).transpose(1, 2)
            for layer in (self.sampling_offsets, self.sampling_scales)
        )  # (B, heads, windows, 1, 2)
        # In tokens: the centres of the windows, and the points relative to the centre of their window
        centre = side * coordinates(grid, like=offset)[:, None] + (side - 1) / 2  # (windows, 1, 2)
        relative = coordinates((side, side), like=offset) - (side - 1) / 2  # (window², 2)
        axes = []
        for axis, (tokens, windows) in enumerate(zip(size[::-1], grid[::-1], strict=True)):
            # The unit of offsets is half of the padded map, divided by the number of whole windows on the map
            unit = (side * windows - 1) / 2 / max(tokens // side, 1)
            point = centre[..., axis] + relative[..., axis] * (1 + scale[..., axis]) + unit * offset[..., axis]
            axes.append((2 * point + 1) / tokens - 1)
        return torch.stack(axes, dim=-1)

    def sample(self, kv: Tensor, points: Tensor) -> Tensor:
        """Read keys and values (B, H, W, 2C) at each head's points: (B, windows, window², 2C)."""
        kv = kv.unflatten(-1, (2, self.num_heads, -1)).permute(0, 4, 3, 5, 1, 2)  # (B, heads, 2, C / heads, H, W)
        maps = kv.flatten(2, 3).flatten(0, 1).to(points.dtype)
        samples = F.grid_sample(maps, points.flatten(0, 1), align_corners=False)
        samples = samples.view(*kv.shape[:4], *points.shape[2:4]).to(kv.dtype)
        return samples.permute(0, 4, 5, 2, 1, 3).flatten(-3)


def coordinates(size: tuple[int, int], like: Tensor) -> Tensor:
    """Return x and y of each token of a map of `size` = (H, W), row by row: (H * W, 2).

    The result has the dtype and the device of `like`.
    """
    y, x = (torch.arange(n, dtype=like.dtype, device=like.device) for n in size)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)
