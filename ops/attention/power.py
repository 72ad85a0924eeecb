"""PowerAttention: keys at distances that are powers of two.

Paper: PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention (Chen et al., 2025,
arXiv:2503.03588). Written after the paper, which is about causal attention in text. The forms for maps, in both
directions, are ours; extra tokens take the place of the paper's first tokens, which everything attends to.
"""

import itertools
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ops.blocks import Blocks, block_attention, fit_block
from ops.extra import extra_attention, keys_and_values
from ops.offsets import offset_attention
from ops.registry import FIRST, Place, register_op
from retinue.utils.arithmetic import ceil_div

FORMS = ("cross", "product")


@register_op("power")
class PowerAttention(nn.Module):
    """Tokens attend to tokens at distances of 0, 1, 2, 4, 8, ... along H, along W, or both.

    The form "cross" holds the tokens of the same row or the same column at such distances. The form "product" holds the
    tokens whose distances along H and along W are both 0 or powers of two: as many blocks as the side of the map has
    binary digits carry a value from any token to any other. Tokens outside the map are left out. Extra tokens are
    attended to by all tokens and attend to all tokens. Cost is H * W times log(H) + log(W), or log(H) * log(W).

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The stage sets the default of `form`; the stride sets the size of the table of `bias`.
        form: "cross" or "product"; by default cross in the first two stages and product in later ones.
        local: Side of a window around the token that is attended to as well, odd; default 1, the token itself.
        block: Side of a tile in tokens; default 1. Distances and `local` are counted in tiles, and all tokens of a tile
            attend to all tokens of another tile, padded tokens excepted.
        bias: Learn a bias for each pair of distances along H and W, for a `block` of 1; default False.
    """

    family = "sparse"
    takes_extra = True
    # With tiles, their pairs are listed on the CPU, by a function whose result has no fixed size
    fullgraph = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        form: str | None = None,
        local: int = 1,
        block: int = 1,
        bias: bool = False,
    ):
        super().__init__()
        form = ("cross" if place.stage < 2 else "product") if form is None else form
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
        if local < 1 or local % 2 == 0 or block < 1:
            raise ValueError(f"local must be odd and block at least 1, not {local} and {block}")
        if bias and block > 1:
            raise ValueError(f"bias is for a block of 1, not {block}")
        self.num_heads, self.form, self.local, self.block = num_heads, form, local, block
        self.fullgraph = block == 1
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias_table = None
        if bias:
            # Steps of the distances 0, 1, 2, 4, ... on the stage's map of images of 224 pixels, in both directions
            self.steps = ceil_div(224, place.stride).bit_length()
            self.bias_table = nn.Parameter(torch.empty(num_heads, 2 * self.steps + 1, 2 * self.steps + 1))
            trunc_normal_(self.bias_table, std=0.02)

    def no_weight_decay(self) -> set[str]:
        return {"bias_table"}

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        qkv = self.qkv(x)
        extra_qkv = None if extra is None else self.qkv(extra)
        sinks = None if extra_qkv is None else keys_and_values(extra_qkv, self.num_heads)
        size = (x.shape[1], x.shape[2])
        if self.block == 1:
            offsets = self.offsets(size)
            q, k, v = (t.unflatten(-1, (self.num_heads, -1)).movedim(3, 1) for t in qkv.chunk(3, dim=-1))
            out = offset_attention(q, k, v, offsets, self.bias(offsets), sinks).movedim(1, 3).flatten(3)
        else:
            cut = fit_block((self.block, self.block), size)
            q, k, v = (cut.split(t, self.num_heads) for t in qkv.chunk(3, dim=-1))
            real = cut.real(x.device) if cut.padded else None
            out = cut.join(block_attention(q, k, v, self.pattern(cut), real, extra=sinks))
        out = self.proj(out)
        if extra_qkv is None:
            return out
        return out, self.proj(extra_attention(extra_qkv, qkv, self.num_heads))

    def offsets(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the offsets (dy, dx) that are attended to on a map, or on a grid of tiles, of `size` = (H, W)."""
        rows, columns = (
            [0, *(sign * 2**n for n in range((side - 1).bit_length()) for sign in (1, -1))] for side in size
        )
        pairs = itertools.product(rows, columns)
        offsets = [(dy, dx) for dy, dx in pairs if self.form == "product" or 0 in (dy, dx)]
        near_y, near_x = (min(self.local // 2, side - 1) for side in size)
        window = itertools.product(range(-near_y, near_y + 1), range(-near_x, near_x + 1))
        return list(dict.fromkeys([*offsets, *window]))

    def pattern(self, cut: Blocks) -> Tensor:
        """Return the mask (M, M) of the tiles that each tile attends to, on the CPU."""
        H, W = cut.grid
        pattern = torch.zeros(H, W, H, W, dtype=torch.bool, device="cpu")
        for dy, dx in self.offsets(cut.grid):
            y = torch.arange(max(0, -dy), H - max(0, dy), device="cpu")[:, None]
            x = torch.arange(max(0, -dx), W - max(0, dx), device="cpu")
            pattern[y, x, y + dy, x + dx] = True
        return pattern.flatten(2).flatten(0, 1)

    def bias(self, offsets: list[tuple[int, int]]) -> Tensor | None:
        """Return the bias of each offset, (heads, number of offsets), or None; far distances share the last entry."""
        if self.bias_table is None:
            return None
        rows, columns = ([self.steps + step_of(pair[axis], self.steps) for pair in offsets] for axis in (0, 1))
        device = self.bias_table.device
        return self.bias_table[:, torch.tensor(rows, device=device), torch.tensor(columns, device=device)]


def step_of(distance: int, steps: int) -> int:
    """Return the signed index of a distance among 0, 1, 2, 4, ...: at most `steps`, between two powers the smaller."""
    step = min(abs(distance).bit_length(), steps)
    return step if distance > 0 else -step
