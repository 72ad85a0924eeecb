"""Cascaded group attention of EfficientViT (Liu et al., CVPR 2023, arXiv:2305.07027).

Written after the paper and timm (Apache-2.0), which follows the authors' repository, microsoft/Cream (MIT).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.registry import FIRST, Place, register_op
from ops.windows import from_windows, pad_to_multiple, to_windows


@register_op("cascaded_group")
class CascadedGroupAttention(nn.Module):
    """Inside windows, each head attends on its own part of the channels, to which the output of the head before is
    added. Cost is linear in H * W; heads run one after the other.

    Queries are convolved depthwise inside each window, and scores have a learned bias for each distance along H and
    along W. Zeros pad the map on the right and at the bottom until windows fit, and are attended to. Along a side that
    is not longer than the window, the window is that side. Projections and convolutions have biases in place of
    EfficientViT's batch norms, which would mix images; in evaluation, batch norms fold into them.

    Args:
        dim, num_heads: channels and heads.
        window: side of a window in tokens.
        key_dim: channels of each head's queries and keys.
        kernels: side of the convolution of the queries, for each head; the last for all heads that are left.
    """

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
            raise ValueError(f"kernels must be odd, at least one, not {list(kernels)}")
        self.window, self.widths = window, (key_dim, key_dim, dim // num_heads)
        self.qkvs = nn.ModuleList(nn.Linear(dim // num_heads, sum(self.widths)) for _ in range(num_heads))
        sides = [kernels[min(head, len(kernels) - 1)] for head in range(num_heads)]
        self.dws = nn.ModuleList(nn.Conv2d(key_dim, key_dim, k, padding=k // 2, groups=key_dim) for k in sides)
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
        out = from_windows(F.relu(torch.cat(outs, dim=-1)), grid, size)
        return self.proj(out[:, :H, :W])

    def bias(self, window: tuple[int, int]) -> Tensor:
        """The bias between the tokens of a window: (heads, tokens, tokens)."""
        sides = (torch.arange(n, device=self.attention_biases.device) for n in window)
        down, right = ((side[:, None] - side).abs() for side in sides)
        index = self.window * down[:, None, :, None] + right[None, :, None, :]
        return self.attention_biases[:, index.flatten(2).flatten(0, 1)]
