"""Head-sharded sparse attention, S2-Attention.

Paper: Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads (Lin et al., 2024,
arXiv:2407.17678). Written after the paper and the authors' repository, linxihui/dkernel (MIT). The paper cuts text into
runs of tokens; here a map is cut into tiles, or into runs of its tokens row by row. Stripes along rows, columns and
diagonals of tiles are ours.
"""

from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from ops.blocks import Blocks, block_attention, fit_block
from ops.registry import FIRST, Place, register_op

ORDERS = ("tiles", "runs")
POSITIONS = ("absolute", "relative")
STRIPES = ("raster", "alternating")


@register_op("head_sharding")
class HeadShardingAttention(nn.Module):
    """Each head attends to blocks near the query's block and to every `stride`-th block, starting at the head's own.

    The heads together attend to all blocks if there are at least `stride` sparse key heads. Padded tokens are not
    attended to. Cost of a head is 1 / `stride` of that of full attention, and that of the near blocks.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The block sets the default of `offset`.
        order: "tiles" (default), or "runs" of consecutive tokens, row by row.
        block: Side of a tile in tokens, or its sides along H and W, or the number of tokens of a run. By default 7, or
            49 for runs.
        local: Blocks are near at a distance of less than `local` blocks, at least 1 (default: the own block alone).
            Between tiles the larger of the distances along H and W counts. For runs also a pair: before and after the
            query's block.
        stride: Distance between the blocks of a head's stripes; a divisor of the number of heads serves best. By
            default 4, 3 or 2, the first that divides the number of heads, else 4, or 2 for a single head.
        stripes: "raster" (default): blocks are counted row by row. "alternating": columns of tiles, rows of tiles and
            diagonals in turn over the heads.
        position: "absolute" (default): a head's blocks are the same for all queries. "relative": every `stride`-th
            block counted from the near blocks, the same for all heads.
        causal: Attend to no token after the query, in the order of the blocks; default False.
        kv_heads: Number of key and value heads, a divisor of `num_heads`, which share a pattern; default `num_heads`.
        dense_heads: Number of key heads, the last ones, that attend to all blocks; default 0.
        homogeneous: Give all heads the pattern of the first one; default False.
        step: Number of blocks between the stripes of adjacent key heads; by default stride // num_heads, at least 1.
        offset: Number of blocks by which all stripes are moved to earlier blocks. By default 0; with fewer sparse key
            heads than `stride` the index of the op's block in its stage, so that the stage attends to all blocks.
    """

    family = "sparse"
    # The pairs of blocks are listed on the CPU, by a function whose result has no fixed size
    fullgraph = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        order: str = "tiles",
        block: int | tuple[int, int] | None = None,
        local: int | tuple[int, int] = 1,
        stride: int | None = None,
        stripes: str = "raster",
        position: str = "absolute",
        causal: bool = False,
        kv_heads: int | None = None,
        dense_heads: int = 0,
        homogeneous: bool = False,
        step: int | None = None,
        offset: int | None = None,
    ):
        super().__init__()
        for name, value, known in (
            ("order", order, ORDERS),
            ("stripes", stripes, STRIPES),
            ("position", position, POSITIONS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        if stride is None:
            stride = next((v for v in (4, 3, 2) if num_heads % v == 0), 4 if num_heads > 1 else 2)
        kv_heads = num_heads if kv_heads is None else kv_heads
        block = (7 if order == "tiles" else 49) if block is None else block
        # Any, because the annotation of to_2tuple does not say that it returns a pair
        pair: Any = to_2tuple
        sides: Any = pair(block) if order == "tiles" else (1, block)
        self.before, self.after = pair(local)
        if min(*pair(block), self.before, self.after, stride, 1 if step is None else step) < 1:
            raise ValueError(
                f"block, local, stride and step must be at least 1, not {block}, {local}, {stride} and {step}"
            )
        if order == "tiles" and self.before != self.after:
            raise ValueError(f"local must be one number for tiles, not {local}")
        if order == "runs" and (not isinstance(block, int) or stripes == "alternating"):
            raise ValueError("runs take a single number as block, and stripes='raster'")
        if kv_heads < 1 or num_heads % kv_heads or not 0 <= dense_heads <= kv_heads:
            raise ValueError(
                f"kv_heads must divide {num_heads} and be at least dense_heads, not {kv_heads} and {dense_heads}"
            )
        if homogeneous and dense_heads:
            raise ValueError("homogeneous heads cannot include dense_heads")
        if offset is None:
            offset = place.block if kv_heads - dense_heads < stride else 0
        self.num_heads, self.kv_heads, self.dense_heads, self.homogeneous = (
            num_heads,
            kv_heads,
            dense_heads,
            homogeneous,
        )
        self.order, self.block, self.stride, self.stripes = order, sides, stride, stripes
        self.position, self.causal, self.offset = position, causal, offset
        self.step = max(1, stride // num_heads) if step is None else step
        self.widths = (dim, dim // num_heads * kv_heads, dim // num_heads * kv_heads)
        self.qkv = nn.Linear(dim, sum(self.widths))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        if self.order == "runs":
            qkv = qkv.flatten(1, 2).unsqueeze(1)
        cut = fit_block(self.block, (qkv.shape[1], qkv.shape[2]))
        q, k, v = qkv.split(self.widths, dim=-1)
        q = cut.split(q, self.num_heads)
        k, v = (cut.split(t, self.kv_heads).repeat_interleave(self.num_heads // self.kv_heads, 1) for t in (k, v))
        real = cut.real(x.device) if cut.padded else None
        pattern = self.pattern(cut)
        count = cut.number if pattern.all() else None
        out = cut.join(block_attention(q, k, v, pattern, real, count, self.causal))
        return self.proj(out.reshape(*x.shape[:3], -1))

    def pattern(self, cut: Blocks) -> Tensor:
        """Return the mask (heads, M, M) of the key blocks that each query block attends to, on the CPU."""
        index = torch.arange(cut.number, device="cpu")
        ahead = index[:, None] - index
        after = 1 if self.causal else self.after
        # Number of blocks beyond the near ones, at most 0 for these
        if self.order == "tiles" and not self.causal:
            beyond = cut.distances("cpu") - self.before + 1
        else:
            beyond = torch.maximum(ahead - self.before + 1, -ahead - after + 1)
        heads = []
        for head in range(self.kv_heads):
            number = 0 if self.homogeneous else head
            if head >= self.kv_heads - self.dense_heads:
                kept = torch.ones_like(beyond, dtype=torch.bool)
            elif self.position == "relative":
                kept = beyond.clamp(min=0) % self.stride == 0
            else:
                # The remainder is one of 0 to stride - 1, and near blocks are at most 0 blocks beyond
                stripe = (self.place_of_block(cut, number) + number * self.step + self.offset) % self.stride == 0
                kept = stripe | (beyond <= 0)
            heads.append(kept & (ahead >= 0) if self.causal else kept)
        return torch.stack(heads).repeat_interleave(self.num_heads // self.kv_heads, 0)

    def place_of_block(self, cut: Blocks, head: int) -> Tensor:
        """Return the number of each block along the direction that a head's stripes are counted in, (M,)."""
        index = torch.arange(cut.number, device="cpu")
        if self.stripes == "raster":
            return index
        rows, columns = index // cut.grid[1], index % cut.grid[1]
        return (columns, rows, rows + columns)[head % 3]
