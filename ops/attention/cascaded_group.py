"""Cascaded group attention of EfficientViT (Liu et al., CVPR 2023, arXiv:2305.07027).

Written after the paper and timm (Apache-2.0), which follows the authors' repository, microsoft/Cream (MIT).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.registry import FIRST, Place, register_op
from ops.weighting import WeightedSums
from ops.windows import from_windows, pad_to_multiple, to_windows


@register_op("cascaded_group")
class CascadedGroupAttention(nn.Module):
    """Heads attend inside windows one after another, each on its own channels plus the previous head's output.

    Queries are convolved depthwise inside each window, and scores have a learned bias for each distance along H and W.
    The map is zero-padded on the right and at the bottom to a multiple of the window; padded tokens are attended to. If
    a side of the map is shorter than the window, the window shrinks to that side. Projections and convolutions have
    biases instead of EfficientViT's batch norms, because batch norms would mix images; in evaluation, batch norms fold
    into the biases and weights. Cost is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        window: Side of a window in tokens; default 7.
        key_dim: Number of channels of each head's queries and keys; default 16.
        kernels: Side of each head's convolution of the queries, odd; the last value is used for all further heads.
            Default (7, 5, 3).
    """

    family = "local"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        window: int = 7,
        key_dim: int = 16,
        kernels: Sequence[int] = (7, 5, 3),
    ):
        super().__init__()
        if min(window, key_dim) < 1:
            raise ValueError(f"window and key_dim must be at least 1, not {window} and {key_dim}")
        if not kernels or any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
            raise ValueError(f"kernels must be one or more odd numbers, not {list(kernels)}")
        self.num_heads, self.window, self.widths = num_heads, window, (key_dim, key_dim, dim // num_heads)
        self.qkvs = nn.ModuleList(nn.Linear(dim // num_heads, sum(self.widths)) for _ in range(num_heads))
        head_kernels = [kernels[min(head, len(kernels) - 1)] for head in range(num_heads)]
        self.dws = nn.ModuleList(nn.Conv2d(key_dim, key_dim, k, padding=k // 2, groups=key_dim) for k in head_kernels)
        self.sums = WeightedSums()
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window**2))

    def no_weight_decay(self) -> set[str]:
        return {"attention_biases"}

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        window = (min(self.window, H), min(self.window, W))
        x = pad_to_multiple(x, window)
        size = x.shape[1:3]
        grid = (size[0] // window[0], size[1] // window[1])

        parts = to_windows(x, grid).chunk(len(self.qkvs), dim=-1)  # (B, windows, tokens, C / heads) each
        outs = []
        for part, qkv, dw, bias in zip(parts, self.qkvs, self.dws, self.bias(window), strict=True):
            q, k, v = qkv(part + outs[-1] if outs else part).split(self.widths, dim=-1)
            q = dw(q.flatten(0, 1).unflatten(1, window).permute(0, 3, 1, 2))  # (B * windows, key_dim, h, w)
            q = q.flatten(2).transpose(1, 2).view_as(k)
            outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)))
        out = from_windows(F.relu(self.sums(torch.cat(outs, dim=-1))), grid, size)
        return self.proj(out[:, :H, :W])

    def bias(self, window: tuple[int, int]) -> Tensor:
        """Return the bias between the tokens of a window of (h, w) tokens: (heads, h * w, h * w)."""
        positions = (torch.arange(n, device=self.attention_biases.device) for n in window)
        down, right = ((position[:, None] - position).abs() for position in positions)
        index = self.window * down[:, None, :, None] + right[None, :, None, :]
        return self.attention_biases[:, index.flatten(2).flatten(0, 1)]
