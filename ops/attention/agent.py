"""Agent attention (Han et al., ECCV 2024, arXiv:2312.08874)."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.registry import FIRST, Place, register_op

AGENTS = (3, 4, 7, 7)  # of the paper's stages
TABLE = 7  # side of the coarse tables of biases


@register_op("agent")
class AgentAttention(nn.Module):
    """A few agent tokens, means of the queries, attend to all tokens; all tokens then attend to the agents.

    Both have biases for each pair of an agent and a place on the map: a coarse table, and one for rows and one for
    columns, interpolated to the map's size and, for another number of agents, over the grid of agents. A depthwise
    convolution of the values is added to the map. Tokens beside the map have a bias of their own for each agent.
    Cost is linear in H * W.

    Args:
        dim, num_heads: channels and heads.
        agents: side of the grid of agents that the biases are learned for; by default 3, 4, 7 and 7 by stage.
        pool: side of the grid of agents, if another: the authors' dense nets take more.
        size: sides of the map that the biases are learned for; by default those of an image of 224 pixels.
        qkv_bias: give the query, key and value projections a bias.
    """

    takes_extra = True
    renames = ((r"^attns\.0\.get_v\.", "dwc."), (r"^attns\.0\.", ""))  # in CSWin's layout

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        agents: int | None = None,
        pool: int | None = None,
        size: int | tuple[int, int] | None = None,
        qkv_bias: bool = True,
    ):
        super().__init__()
        agents = AGENTS[min(place.stage, 3)] if agents is None else agents
        H, W = map(int, to_2tuple(-(-224 // place.stride) if size is None else size))
        if min(agents, H, W, 1 if pool is None else pool) < 1:
            raise ValueError(f"agents, pool and size must be at least 1, not {agents}, {pool} and {size}")
        self.num_heads, self.agents, self.pool, self.extra = num_heads, agents, pool or agents, place.extra
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = nn.Linear(dim, dim)
        table = lambda *shape: nn.Parameter(trunc_normal_(torch.empty(shape), std=0.02))  # noqa: E731
        # The authors' names: a is agents, n tokens, h rows, w columns, c tokens beside the map; queries first.
        A = agents**2
        self.an_bias, self.na_bias = table(num_heads, A, TABLE, TABLE), table(num_heads, A, TABLE, TABLE)
        self.ah_bias, self.aw_bias = table(num_heads, A, H, 1), table(num_heads, A, 1, W)
        self.ha_bias, self.wa_bias = table(num_heads, H, 1, A), table(num_heads, 1, W, A)
        if place.extra:
            self.ac_bias = table(num_heads, A, place.extra)
            self.ca_bias = table(num_heads, place.extra, A)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        size, E = x.shape[1:3], 0 if extra is None else extra.shape[1]
        tokens = x.flatten(1, 2) if extra is None else torch.cat([extra, x.flatten(1, 2)], dim=1)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        on_map = [t[:, E:].unflatten(1, size).permute(0, 3, 1, 2) for t in (q, v)]
        agents = F.adaptive_avg_pool2d(on_map[0], self.pool).flatten(2).transpose(1, 2)  # (B, A, C)

        q, k, v, agents = (split_heads(t, self.num_heads) for t in (q, k, v, agents))
        gather, scatter = self.biases(size, E)
        v = F.scaled_dot_product_attention(agents, k, v, attn_mask=gather.to(q.dtype))
        out = merge_heads(F.scaled_dot_product_attention(q, agents, v, attn_mask=scatter.to(q.dtype)))
        out = out + F.pad(self.dwc(on_map[1]).flatten(2).transpose(1, 2), (0, 0, E, 0))
        out = self.proj(out)
        x = out[:, E:].unflatten(1, size)
        return x if extra is None else (x, out[:, :E])

    def biases(self, size: torch.Size, extra: int) -> tuple[Tensor, Tensor]:
        """Of agents to all tokens (1, heads, A, E + H * W), and of all tokens to agents, the other way round."""
        rows, columns = (t.permute(0, 3, 1, 2) for t in (self.ha_bias, self.wa_bias))
        gather = self.on_map(self.an_bias, self.ah_bias, self.aw_bias, size)
        scatter = self.on_map(self.na_bias, rows, columns, size)
        if extra and self.extra:
            beside = self.regrid(self.ac_bias), self.regrid(self.ca_bias.transpose(1, 2))
            gather, scatter = (torch.cat(pair, dim=-1) for pair in zip(beside, (gather, scatter), strict=True))
        elif extra:
            gather, scatter = (F.pad(t, (extra, 0)) for t in (gather, scatter))
        return gather[None], scatter.transpose(1, 2)[None].contiguous()

    def on_map(self, table: Tensor, rows: Tensor, columns: Tensor, size: torch.Size) -> Tensor:
        """(heads, A, H * W) from tables (heads, A, 7, 7), (heads, A, rows, 1) and (heads, A, 1, columns)."""
        H, W = size
        table, rows, columns = (
            F.interpolate(self.regrid(t), s, mode="bilinear")
            for t, s in ((table, (H, W)), (rows, (H, 1)), (columns, (1, W)))
        )
        return (table + rows + columns).flatten(2)

    def regrid(self, table: Tensor) -> Tensor:
        """(heads, agents², ...) interpolated over the grid of agents to (heads, pool², ...)."""
        if self.pool == self.agents:
            return table
        grid = table.flatten(2).transpose(1, 2).unflatten(2, (self.agents, self.agents))  # (heads, places, a, a)
        grid = F.interpolate(grid, (self.pool, self.pool), mode="bilinear")
        return grid.flatten(2).transpose(1, 2).unflatten(2, table.shape[2:])

    def resize_table(self, name: str, value: Tensor) -> Tensor:
        """A table of biases for rows or columns, learned for another size of the map; any other weight as it is."""
        along = {"ah_bias": 2, "aw_bias": 3, "ha_bias": 1, "wa_bias": 2}.get(name)
        if along is None:
            return value
        value = value.movedim(along, -1)
        resized = F.interpolate(value.flatten(1, -2), getattr(self, name).shape[along], mode="linear")
        return resized.unflatten(1, value.shape[1:-1]).movedim(-1, along)
