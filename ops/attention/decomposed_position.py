"""Attention with decomposed relative positions (MViTv2, Li et al., CVPR 2022, arXiv:2112.01526), as ViTDet has it.

ViTDet: Exploring Plain Vision Transformer Backbones for Object Detection (Li et al., ECCV 2022, arXiv:2203.16527).
Written after the papers and the authors' repository, facebookresearch/detectron2 (Apache-2.0).
"""

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.registry import FIRST, Place, register_op
from ops.windows import from_windows, pad_to_multiple, to_windows
from retinue.utils.arithmetic import ceil_div


def resize_offsets(table: Tensor, size: int) -> Tensor:
    """Interpolate a table of offsets (2 * s - 1, D) linearly to (2 * size - 1, D)."""
    if len(table) == 2 * size - 1:
        return table
    return F.interpolate(table.T[None], 2 * size - 1, mode="linear")[0].T


@register_op("decomposed_position")
class DecomposedPositionAttention(nn.Module):
    """Tokens attend to their window, or to the whole map, with a score for the vertical and for the horizontal offset.

    The score of an offset is the product of the query with the offset's vector. For windows, the map is zero-padded on
    the right and at the bottom to a multiple of the window; padded tokens are attended to. Cost is linear in H * W with
    windows, else quadratic. The tables are interpolated for maps of another size.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The stride sets the default of `size`.
        window: Side of a window in tokens; 0 (default) attends to the whole map.
        size: Size (H, W) of the map that the offsets of attention to the whole map are learned for, or one number for
            both; by default the size at an image of 224 pixels.

    Raises:
        ValueError: `window` is negative, or `size` is less than 1.
    """

    family = "full"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        window: int = 0,
        size: int | tuple[int, int] | None = None,
    ):
        super().__init__()
        H, W = map(int, to_2tuple(window or (ceil_div(224, place.stride) if size is None else size)))
        if window < 0 or min(H, W) < 1:
            raise ValueError(f"window must be at least 0 and size at least 1, not {window} and {size}")
        self.num_heads, self.window = num_heads, window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * H - 1, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * W - 1, dim // num_heads))

    def resize_table(self, name: str, value: Tensor) -> Tensor:
        """Interpolate a checkpoint's offsets to this op's size, for `load_weights`."""
        if name not in ("rel_pos_h", "rel_pos_w") or value.ndim != 2 or len(value) % 2 == 0:
            return value
        return resize_offsets(value, ceil_div(len(self.get_parameter(name)), 2))

    def forward(self, x: Tensor) -> Tensor:
        if not self.window:
            return self.proj(self.attend(x))
        side = (self.window, self.window)
        padded = pad_to_multiple(x, side)
        grid = (padded.shape[1] // self.window, padded.shape[2] // self.window)
        windows = to_windows(padded, grid)
        out = self.attend(windows.flatten(0, 1).unflatten(1, side)).flatten(1, 2).view(windows.shape)
        return self.proj(from_windows(out, grid, padded.shape[1:3])[:, : x.shape[1], : x.shape[2]])

    def attend(self, x: Tensor) -> Tensor:
        """Return the heads' outputs for maps (B, H, W, C), each of which attends to itself."""
        _, H, W, _ = x.shape
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).flatten(1, 2).chunk(3, dim=-1))
        scores = []
        for axis, (table, side) in enumerate(((self.rel_pos_h, H), (self.rel_pos_w, W))):
            places = torch.arange(side, device=x.device)
            offsets = places[:, None] - places + side - 1
            vectors = resize_offsets(table, side)[offsets].to(q.dtype)  # (side, side, D)
            # (B, heads, H, W, D) with the vectors of each row or each column
            by_axis = "bnhwd,hkd->bnhwk" if axis == 0 else "bnhwd,wkd->bnhwk"
            scores.append(torch.einsum(by_axis, q.unflatten(2, (H, W)), vectors).flatten(2, 3))
        # Keys that carry their row and column as unit vectors select the score of their offset, so that no matrix of
        # all pairs of tokens is stored.
        rows, columns = torch.eye(H, device=x.device, dtype=q.dtype), torch.eye(W, device=x.device, dtype=q.dtype)
        units = torch.cat([rows.repeat_interleave(W, 0), columns.repeat(H, 1)], dim=1)
        q = torch.cat([q * q.shape[-1] ** -0.5, *scores], dim=-1)
        k = torch.cat([k, units.expand(*k.shape[:2], -1, -1)], dim=-1)
        return merge_heads(F.scaled_dot_product_attention(q, k, v, scale=1.0)).unflatten(1, (H, W))
