"""Partial visual attention of PATNet (Huang et al., arXiv:2503.03148), and the partial convolution of FasterNet.

Written after the paper and the authors' repository, haiduo/PartialNet (MIT). The position bias is that of iRPE (Wu et
al., ICCV 2021, arXiv:2107.14222); FasterNet is arXiv:2303.03667.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.registry import FIRST, Place, register_op

FORMS = ("channel", "self", "none")
# Distances have a bucket each up to NEAR tokens; from there to 8 * NEAR tokens, NEAR more buckets on a log scale. The
# authors' tables have as many buckets for negative distances, which do not occur.
NEAR = 20


@register_op("partial_visual")
class PartialVisualAttention(nn.Module):
    """The first channels are convolved with their 3 x 3 neighbours, and the others pass an attention.

    Channel attention multiplies each channel by a gate that follows from all channels' means and standard deviations.
    Self-attention, after a norm, is between all tokens, with a learned bias for each distance. Cost is linear in H * W,
    or with self-attention quadratic.

    Args:
        dim: Number of channels.
        num_heads: Number of heads of the self-attention, which has as many as divide its channels too.
        place: The stage sets the default of `attention`.
        attention: "channel", "self" or "none" (partial convolution); by default "channel" in the first three stages,
            and "self" in the last.
        divisor: Number of channels divided by the number of those that are convolved; default 4.
        batch_norm: Give the gate and the gated channels batch norms, as PATNet does. Batch norms mix images in
            training, so the gate has biases by default.
        dropout: Dropout rate of the self-attention's weights and output; default 0.
    """

    family = "mixed"
    renames = (
        (r"^partial_conv3\.", "conv."),
        (r"^attn\.cfc1\.", "gate."),
        (r"^attn\.bn\.", "gate_norm."),
        (r"^attn\.rpe_k\.lookup_table_bias$", "distance_bias"),
        (r"^attn\.", ""),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        attention: str | None = None,
        divisor: int = 4,
        batch_norm: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        attention = FORMS[int(place.stage >= 3)] if attention is None else attention
        if attention not in FORMS:
            raise ValueError(f"attention must be {', '.join(FORMS[:-1])} or {FORMS[-1]}, not {attention!r}")
        if not 2 <= divisor <= dim:
            raise ValueError(f"divisor must be from 2 to the number of channels, {dim}, not {divisor}")
        self.attention, self.dropout = attention, dropout
        self.widths = (dim // divisor, dim - dim // divisor)
        convolved, attended = self.widths
        self.num_heads = math.gcd(num_heads, attended)
        self.conv = nn.Conv2d(convolved, convolved, 3, padding=1, bias=False)
        if attention == "channel":
            self.gate = nn.Conv2d(attended, attended, (1, 2), bias=not batch_norm)
            self.gate_norm = nn.BatchNorm2d(attended) if batch_norm else nn.Identity()
            self.norm = nn.BatchNorm2d(attended) if batch_norm else nn.Identity()
        elif attention == "self":
            self.norm = nn.LayerNorm(attended, eps=1e-6)
            self.qkv = nn.Linear(attended, 3 * attended, bias=False)
            self.proj = nn.Linear(attended, attended)
            self.distance_bias = nn.Parameter(torch.zeros(self.num_heads, 4 * NEAR + 1))

    def forward(self, x: Tensor) -> Tensor:
        convolved, attended = x.split(self.widths, dim=-1)
        convolved = self.conv(convolved.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.attention == "channel":
            attended = self.gated(attended.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        elif self.attention == "self":
            attended = self.mixed(self.norm(attended))
        return torch.cat([convolved, attended.to(convolved.dtype)], dim=-1)

    def gated(self, x: Tensor) -> Tensor:
        """Apply channel attention to (B, C, H, W)."""
        tokens = x.flatten(2)
        # One token has no deviation.
        std = tokens.std(-1, correction=min(1, tokens.shape[2] - 1))
        style = torch.stack([tokens.mean(-1), std], dim=-1)[:, :, None]  # (B, C, 1, 2)
        return self.norm(x * F.hardsigmoid(self.gate_norm(self.gate(style))))

    def mixed(self, x: Tensor) -> Tensor:
        """Apply self-attention to (B, H, W, C)."""
        q, k, v = (split_heads(t.flatten(1, 2), self.num_heads) for t in self.qkv(x).chunk(3, dim=-1))
        bias = self.distance_bias[:, distance_buckets(x.shape[1], x.shape[2], x.device)].to(q.dtype)
        rate = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=rate)
        return F.dropout(self.proj(merge_heads(out)), rate).unflatten(1, x.shape[1:3])


def distance_buckets(H: int, W: int, device: torch.device) -> Tensor:
    """Return the bucket of the rounded distance of each pair of tokens of a map: (H * W, H * W)."""
    rows, columns = (torch.arange(n, device=device, dtype=torch.float32) for n in (H, W))
    squares = (rows[:, None] - rows).square()[:, None, :, None] + (columns[:, None] - columns).square()[None, :, None]
    distance = squares.flatten(2).flatten(0, 1).sqrt().round()
    far = NEAR * (1 + torch.log(distance.clamp(min=NEAR) / NEAR) / math.log(8))
    return torch.where(distance <= NEAR, distance, far.round().clamp(max=2 * NEAR)).long() + 2 * NEAR
