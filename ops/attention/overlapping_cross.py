"""Overlapping cross-attention and the channel branch of HAT (Chen et al., CVPR 2023, arXiv:2205.04437).

Paper: Activating More Pixels in Image Super-Resolution Transformer. Written after the paper and the authors'
repository, XPixelGroup/HAT (Apache-2.0). The authors' maps are whole windows; windows that shrink or are padded are
ours.
"""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ops.functional import biased_scores_attention, merge_heads, split_heads
from ops.registry import FIRST, Place, register_op
from ops.tiles import ragged_window_attention
from ops.windows import from_windows, pad_to_multiple, to_windows


class ChannelBranch(nn.Module):
    """Convolutions and a gate for each channel, which depends on the channels' means: HAT's channel attention block.

    Maps (B, H, W, C) to the same shape.

    Args:
        dim: Number of channels C.
        compress: C divided by the number of channels between the two convolutions.
        squeeze: C divided by the number of hidden units of the gate.
    """

    renames = ((r"^cab\.3\.attention\.", "gate."), (r"^cab\.", "convs."))

    def __init__(self, dim: int, compress: int = 3, squeeze: int = 30):
        super().__init__()
        hidden, units = max(dim // compress, 1), max(dim // squeeze, 1)
        self.convs = nn.Sequential(
            nn.Conv2d(dim, hidden, 3, padding=1), nn.GELU(), nn.Conv2d(hidden, dim, 3, padding=1)
        )
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, units, 1), nn.ReLU(), nn.Conv2d(units, dim, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.convs(x.permute(0, 3, 1, 2))
        return (out * self.gate(out)).permute(0, 2, 3, 1)


@register_op("overlapping_cross")
class OverlappingCrossAttention(nn.Module):
    """The tokens of each window attend to a larger window around it, with a learned bias for each relative position.

    Keys and values are zero-padded around the map; padded tokens are attended to. Windows shrink to the sides of a
    smaller map. Cost is linear in H * W.

    HAT's other block is the case `overlap=0, channel=0.01`: attention inside windows, shifted in every second block,
    plus a branch of convolutions. Windows that reach beyond the map then hold fewer tokens, and a side of the map that
    is not longer than a window has no shift.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The block sets the default of `shift`.
        window: Side of a window in tokens; default 8.
        overlap: Number of tokens by which the keys' window is larger, relative to `window`; default 0.5. The number is
            rounded down and must be even.
        shift: Number of tokens by which windows are shifted, from 0 to window - 1; it must be 0 if windows overlap. By
            default 0, and window // 2 in every second block if `overlap` is 0.
        channel: Factor on the branch of convolutions with a gate for each channel, which is added; default 0, for no
            branch. The paper has 0.01.
        compress: Number of channels divided by that between the branch's convolutions; default 3.
        squeeze: Number of channels divided by the hidden units of the branch's gate; default 30.
    """

    family = "local"
    renames = ((r"^relative_position_index$", None), (r"^conv_block\.", "branch."))

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        window: int = 8,
        overlap: float = 0.5,
        shift: int | None = None,
        channel: float = 0.0,
        compress: int = 3,
        squeeze: int = 30,
    ):
        super().__init__()
        if window < 1 or overlap < 0:
            raise ValueError(f"window must be at least 1 and overlap at least 0, not {window} and {overlap}")
        # A tolerance, because 7 * (4 / 7) is slightly less than 4
        added = int(window * overlap + 1e-6)
        if added % 2:
            raise ValueError(f"window * overlap must be even after rounding down, not {window} * {overlap} = {added}")
        if shift is None:
            shift = 0 if added else window // 2 * (place.block % 2)
        if not 0 <= shift < window or (added and shift):
            raise ValueError(f"shift must be from 0 to window - 1, and 0 if windows overlap, not {shift}")
        if min(compress, squeeze) < 1:
            raise ValueError(f"compress and squeeze must be at least 1, not {compress} and {squeeze}")
        self.num_heads, self.window, self.halo, self.shift, self.channel = num_heads, window, added // 2, shift, channel
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window + added - 1) ** 2, num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.branch = ChannelBranch(dim, compress, squeeze) if channel else None

    def no_weight_decay(self) -> set[str]:
        return {"relative_position_bias_table"}

    def forward(self, x: Tensor) -> Tensor:
        window = (min(self.window, x.shape[1]), min(self.window, x.shape[2]))
        out = self.proj(self.overlapping(x, window) if self.halo else self.inside(x, window))
        return out if self.branch is None else out + self.channel * self.branch(x)

    def inside(self, x: Tensor, window: tuple[int, int]) -> Tensor:
        """Compute attention inside windows before the projection."""
        shift = [self.shift if w < n else 0 for w, n in zip(window, x.shape[1:3], strict=True)]
        qkv = self.qkv(x).unflatten(-1, (3, -1))
        return ragged_window_attention(qkv, self.bias(window), self.num_heads, window, (shift[0], shift[1]))

    def overlapping(self, x: Tensor, window: tuple[int, int]) -> Tensor:
        """Compute attention from windows to the larger windows around them, before the projection."""
        H, W, C = x.shape[1:]
        qkv = pad_to_multiple(self.qkv(x), window)
        size = qkv.shape[1:3]
        grid = (size[0] // window[0], size[1] // window[1])
        q = split_heads(to_windows(qkv[..., :C], grid), self.num_heads)  # (B, P, heads, h * w, D)
        kv = F.pad(qkv[..., C:], (0, 0, *[self.halo] * 4))
        for axis, side in enumerate(window, start=1):
            kv = kv.unfold(axis, side + 2 * self.halo, side)
        kv = kv.flatten(1, 2).flatten(3).transpose(2, 3)  # (B, P, keys, 2C)
        k, v = (split_heads(t, self.num_heads) for t in kv.chunk(2, dim=-1))
        out = biased_scores_attention(q, k, v, self.bias(window), q.shape[-1] ** -0.5)
        return from_windows(merge_heads(out), grid, size)[:, :H, :W]

    def bias(self, window: tuple[int, int]) -> Tensor:
        """Return the bias of the queries of a window (h, w) and the keys of the window around it: (heads, h * w, keys).

        Rows of the table are counted as the authors do: by the offset from query to key, where negative rows count from
        the end of the table; without an overlap, by the offset from key to query, as in Swin.
        """
        table, side = self.relative_position_bias_table, 2 * (self.window + self.halo) - 1
        offsets = []
        for n in window:
            query, key = (torch.arange(m, device=table.device) for m in (n, n + 2 * self.halo))
            # The authors' offset 0 is that of a window's first key and its first query
            offset = key - query[:, None] - 2 * self.halo + 1 if self.halo else query[:, None] - key + self.window - 1
            offsets.append(offset)
        index = offsets[0][:, None, :, None] * side + offsets[1][None, :, None, :]
        return table[index.flatten(2).flatten(0, 1) % len(table)].permute(2, 0, 1)
