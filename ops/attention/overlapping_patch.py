"""Local-region self-attention of CATANet, in patches that overlap (Liu et al., CVPR 2025, arXiv:2503.06896).

Paper: CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution. Written after the
paper and the authors' repository, EquationWalker/CATANet (Apache-2.0). A token's output is the mean over all patches
that hold it; where more than two patches overlap along a side, the authors' code divides by a power of two instead.
Patches that shrink to a smaller map are ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.registry import FIRST, Place, register_op
from retinue.utils.arithmetic import ceil_div

# Sides of the patches in each of four blocks in turn, as in the paper
PATCHES = (16, 20, 24, 28)


@register_op("overlapping_patch")
class OverlappingPatchAttention(nn.Module):
    """Tokens attend to the tokens of each patch that holds them, and the outputs of the patches are averaged.

    Neighbouring patches overlap by a few tokens. The last patch along a side is moved inside the map, and a patch
    shrinks to a side of the map that is shorter. Cost is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The block sets the default of `patch`.
        patch: Side of a patch in tokens; by default 16, 20, 24 and 28 in the blocks of a stage in turn.
        overlap: Number of tokens that neighbouring patches share along a side, less than `patch`; default 2.
        qk_dim: Channels of queries and keys, a multiple of `num_heads`; by default 0.9 * dim, rounded to one.

    Raises:
        ValueError: A number is out of its range.
    """

    family = "local"
    renames = ((r"^to_", ""),)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        patch: int | None = None,
        overlap: int = 2,
        qk_dim: int | None = None,
    ):
        super().__init__()
        patch = PATCHES[place.block % 4] if patch is None else patch
        if not 0 <= overlap < patch:
            raise ValueError(f"overlap must be from 0 to patch - 1, not {overlap} for a patch of {patch}")
        if qk_dim is None:
            qk_dim = num_heads * max(round(0.9 * dim / num_heads), 1)
        if qk_dim < 1 or qk_dim % num_heads:
            raise ValueError(f"qk_dim must be a multiple of {num_heads}, the number of heads, not {qk_dim}")
        self.num_heads, self.patch, self.overlap = num_heads, patch, overlap
        self.q = nn.Linear(dim, qk_dim, bias=False)
        self.k = nn.Linear(dim, qk_dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        index = self.tokens(x.shape[1], x.shape[2], x.device)
        tokens = x.flatten(1, 2)
        q, k, v = (
            split_heads(t[:, index], self.num_heads).flatten(0, 1)  # (B * P, heads, L, D)
            for t in (self.q(tokens), self.k(tokens), self.v(tokens))
        )
        out = merge_heads(F.scaled_dot_product_attention(q, k, v)).unflatten(0, (x.shape[0], -1))
        sums = torch.zeros_like(tokens, dtype=out.dtype).index_add(1, index.flatten(), out.flatten(1, 2))
        counts = out.new_zeros(tokens.shape[1]).index_add(0, index.flatten(), out.new_ones(index.numel()))
        return self.proj(sums / counts.unsqueeze(1)).view(x.shape)

    def tokens(self, H: int, W: int, device: torch.device) -> Tensor:
        """Return the tokens of each of P patches of L tokens: (P, L)."""
        rows, columns = (self.places(side, device) for side in (H, W))
        return (rows[:, None, :, None] * W + columns[None, :, None, :]).flatten(2).flatten(0, 1)

    def places(self, side: int, device: torch.device) -> Tensor:
        """Return the places of each patch along a side of the map: (patches, tokens)."""
        patch = min(self.patch, side)
        step = self.patch - self.overlap
        starts = torch.arange(ceil_div(side - patch, step) + 1, device=device) * step
        return starts.clamp(max=side - patch)[:, None] + torch.arange(patch, device=device)
