"""Mixture of attention spans, MoA: a window size for every head, which may grow with the map.

Paper: MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression (Fu et al., 2024,
arXiv:2406.14909). Written after the paper and the authors' repository, thu-nics/MoA (MIT). The paper's spans are bands
of a text; here they are neighbourhoods of a map; the mode "band" keeps the paper's pattern. The paper searches a plan
for a trained net; the default plan is ours.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.blocks import Blocks, block_attention, fit_block
from ops.extra import extra_attention, keys_and_values
from ops.functional import merge_heads
from ops.neighborhood import neighborhood_attention, tiled_attention
from ops.registry import FIRST, Place, register_op

MODES = ("neighborhood", "band")
DEFAULT_PLAN = ((3, 0), (7, 0), (0, 0.25), (0, 1))


@register_op("span_mixture")
class SpanMixtureAttention(nn.Module):
    """Each head attends to a neighbourhood of its own size: alpha + beta times the side of the map.

    In the mode "neighborhood" the size along each side is rounded to an odd number and cut to the map; where the map
    ends, the nearest tokens are attended to. In the mode "band" the tokens, row by row, form blocks of `block` tokens:
    a block attends to the blocks at a distance of less than alpha // block + beta * H * W / block (rounded down, at
    least 1) and to the first block, and the first block attends to all. Extra tokens are attended to by all tokens and
    attend to all tokens. Cost is H * W times the mean number of tokens in a neighbourhood.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        plan: Pairs (alpha, beta) in tokens and as a share, one for each head or for each of several equal groups of
            heads. Default: (3, 0), (7, 0), (0, 1/4) and (0, 1), for a quarter of the heads each.
        mode: "neighborhood" (default) or "band".
        block: Number of tokens of a block in the mode "band"; default 64.
        anchors: Side of a pooled map of keys and values that all tokens attend to as well; default 0, for none.
        causal: Attend to no token after the query, in the mode "band" only; default False.
    """

    family = "local"
    takes_extra = True
    # In the mode "band" the pairs of blocks are listed on the CPU, by a function whose result has no fixed size
    fullgraph = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        plan: Sequence[Sequence[float]] | None = None,
        mode: str = "neighborhood",
        block: int = 64,
        anchors: int = 0,
        causal: bool = False,
    ):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
        if block < 1 or anchors < 0:
            raise ValueError(f"block must be at least 1 and anchors at least 0, not {block} and {anchors}")
        if causal and (mode == "neighborhood" or anchors):
            raise ValueError("causal is for mode='band' without anchors only")
        if plan is None:
            # Each head takes the entry at the middle of its share of the plan
            self.plan = [DEFAULT_PLAN[(2 * head + 1) * 4 // (2 * num_heads)] for head in range(num_heads)]
        elif not plan or num_heads % len(plan) or any(len(rule) != 2 for rule in plan):
            raise ValueError(f"plan must hold pairs (alpha, beta), as many as divide {num_heads} heads, not {plan}")
        else:
            self.plan = [tuple(plan[head * len(plan) // num_heads]) for head in range(num_heads)]
        self.num_heads, self.mode, self.block, self.anchors, self.causal = num_heads, mode, block, anchors, causal
        self.fullgraph = mode == "neighborhood"
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        qkv = self.qkv(x)
        extra_qkv = None if extra is None else self.qkv(extra)
        sinks = self.sinks(qkv, extra_qkv)
        out = self.proj(self.neighborhoods(qkv, sinks) if self.mode == "neighborhood" else self.band(qkv, sinks))
        if extra_qkv is None:
            return out
        return out, self.proj(extra_attention(extra_qkv, qkv, self.num_heads))

    def sinks(self, qkv: Tensor, extra_qkv: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Return the keys and values (B, heads, E, D) that all tokens attend to, or None if there are none."""
        tokens = [] if extra_qkv is None else [extra_qkv]
        if self.anchors:
            size = (min(self.anchors, qkv.shape[1]), min(self.anchors, qkv.shape[2]))
            tokens.append(F.adaptive_avg_pool2d(qkv.permute(0, 3, 1, 2), size).flatten(2).transpose(1, 2))
        return keys_and_values(torch.cat(tokens, dim=1), self.num_heads) if tokens else None

    def kernel(self, rule: Sequence[float], size: Sequence[int]) -> tuple[int, int]:
        """Return the size of the neighbourhood of a rule (alpha, beta) on a map of `size` = (H, W)."""
        alpha, beta = rule
        h, w = (min(n, max(1, 2 * math.floor((alpha + beta * n) / 2) + 1)) for n in size)
        return h, w

    def neighborhoods(self, qkv: Tensor, sinks: tuple[Tensor, Tensor] | None) -> Tensor:
        """Compute the attention of all heads, (B, H, W, C), heads with equal neighbourhoods together."""
        size = (qkv.shape[1], qkv.shape[2])
        groups: dict[tuple[int, int], list[int]] = {}
        for head, rule in enumerate(self.plan):
            groups.setdefault(self.kernel(rule, size), []).append(head)
        by_head = qkv.unflatten(-1, (3, self.num_heads, -1))  # (B, H, W, 3, heads, D)
        outputs: dict[int, Tensor] = {}
        for kernel, heads in groups.items():
            part = torch.stack([by_head[..., head, :] for head in heads], dim=-2).flatten(3)
            own_sinks = None if sinks is None else (sinks[0][:, heads], sinks[1][:, heads])
            if kernel == size:
                cut = Blocks(size, size)
                q, k, v = (cut.split(t, len(heads)) for t in part.chunk(3, dim=-1))
                whole = torch.ones(1, 1, dtype=torch.bool, device="cpu")
                out = cut.join(block_attention(q, k, v, whole, count=1, extra=own_sinks))
            elif own_sinks is None:
                out = neighborhood_attention(part, None, len(heads), kernel)
            else:
                shared = torch.cat([merge_heads(t) for t in own_sinks], dim=-1).unsqueeze(1)
                out = tiled_attention(part, None, len(heads), kernel, (1, 1), (1, 1), (False, False), shared)
            outputs.update(zip(heads, out.chunk(len(heads), dim=-1), strict=True))
        return torch.cat([outputs[head] for head in range(self.num_heads)], dim=-1)

    def band(self, qkv: Tensor, sinks: tuple[Tensor, Tensor] | None) -> Tensor:
        """Compute the attention of all heads in bands of blocks, (B, H, W, C)."""
        tokens = qkv.shape[1] * qkv.shape[2]
        cut = fit_block((1, self.block), (1, tokens))
        q, k, v = (cut.split(t.flatten(1, 2).unsqueeze(1), self.num_heads) for t in qkv.chunk(3, dim=-1))
        real = cut.real(qkv.device) if cut.padded else None
        out = block_attention(q, k, v, self.pattern(cut), real, causal=self.causal, extra=sinks)
        return cut.join(out).reshape(*qkv.shape[:3], -1)

    def pattern(self, cut: Blocks) -> Tensor:
        """Return the mask (heads, M, M) of the key blocks that each query block attends to, on the CPU."""
        index = torch.arange(cut.number, device="cpu")
        ahead = index[:, None] - index
        widths = [max(1, int(alpha // self.block + beta * cut.size[1] / self.block)) for alpha, beta in self.plan]
        near = ahead.abs() < torch.tensor(widths, device="cpu").view(-1, 1, 1)
        kept = near | (index == 0) | (index == 0)[:, None]
        return kept & (ahead >= 0) if self.causal else kept
