"""Agent attention (Han et al., ECCV 2024, arXiv:2312.08874).

Written after the paper and the authors' repository, LeapLabTHU/Agent-Attention (no licence of its own).
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.registry import FIRST, Place, register_op
from retinue.utils.arithmetic import ceil_div

# Side of the grid of agents in each stage of the paper's nets
AGENTS = (3, 4, 7, 7)
# Side of the coarse bias tables over the map
COARSE_SIDE = 7


@register_op("agent")
class AgentAttention(nn.Module):
    """A few agent tokens, pooled from the queries, attend to all tokens, and all tokens then attend to the agents.

    Both attentions have a learned bias for each pair of an agent and a token of the map: the sum of a coarse table over
    the map, a table over the rows and a table over the columns. The tables are interpolated to the map's size and, for
    another number of agents, over the grid of agents. A depthwise convolution of the values is added to the output of
    the map's tokens. Extra tokens have a bias of their own for each agent. Cost is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The stage sets the default of `agents`, the stride that of `size`; `extra` is the number of extra tokens
            that have biases.
        agents: Side of the grid of agents for which biases are learned; by default 3, 4, 7 and 7 by stage.
        pool: Side of the grid of agents in use; by default `agents`. The authors' dense nets use larger grids.
        size: Size (H, W) of the map for which biases are learned, or one number for both; by default the size at an
            image of 224 pixels.
        qkv_bias: Give the query, key and value projections a bias; default True.
    """

    family = "pooled"
    takes_extra = True
    # From the authors' nets in CSWin's layout
    renames = ((r"^attns\.0\.get_v\.", "dwc."), (r"^attns\.0\.", ""))

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
        H, W = map(int, to_2tuple(ceil_div(224, place.stride) if size is None else size))
        if min(agents, H, W, 1 if pool is None else pool) < 1:
            raise ValueError(f"agents, pool and size must be at least 1, not {agents}, {pool} and {size}")
        self.num_heads, self.agents, self.extra = num_heads, agents, place.extra
        self.pool = agents if pool is None else pool
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = nn.Linear(dim, dim)
        table = lambda *shape: nn.Parameter(trunc_normal_(torch.empty(shape), std=0.02))  # noqa: E731
        # The authors' names, with the queries first: a for agents, n for the map's tokens, h for rows, w for columns,
        # c for extra tokens, such as the class token
        A = agents**2
        self.an_bias, self.na_bias = (
            table(num_heads, A, COARSE_SIDE, COARSE_SIDE),
            table(num_heads, A, COARSE_SIDE, COARSE_SIDE),
        )
        self.ah_bias, self.aw_bias = table(num_heads, A, H, 1), table(num_heads, A, 1, W)
        self.ha_bias, self.wa_bias = table(num_heads, H, 1, A), table(num_heads, 1, W, A)
        if place.extra:
            self.ac_bias = table(num_heads, A, place.extra)
            self.ca_bias = table(num_heads, place.extra, A)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        size, E = x.shape[1:3], 0 if extra is None else extra.shape[1]
        tokens = x.flatten(1, 2) if extra is None else torch.cat([extra, x.flatten(1, 2)], dim=1)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        q_map, v_map = (t[:, E:].unflatten(1, size).permute(0, 3, 1, 2) for t in (q, v))
        agents = F.adaptive_avg_pool2d(q_map, self.pool).flatten(2).transpose(1, 2)  # (B, A, C)

        q, k, v, agents = (split_heads(t, self.num_heads) for t in (q, k, v, agents))
        gather, scatter = self.biases(size, E)
        v = F.scaled_dot_product_attention(agents, k, v, attn_mask=gather.to(q.dtype))
        out = merge_heads(F.scaled_dot_product_attention(q, agents, v, attn_mask=scatter.to(q.dtype)))
        out = out + F.pad(self.dwc(v_map).flatten(2).transpose(1, 2), (0, 0, E, 0))
        out = self.proj(out)
        x = out[:, E:].unflatten(1, size)
        return x if extra is None else (x, out[:, :E])

    def biases(self, size: torch.Size, extra: int) -> tuple[Tensor, Tensor]:
        """Return the biases of both attentions for a map of `size` = (H, W) and `extra` = E extra tokens.

        Returns:
            The bias from agents to all tokens, (1, heads, A, E + H * W), and from all tokens to agents,
            (1, heads, E + H * W, A). Extra tokens for which no biases are learned have a bias of 0.
        """
        rows, columns = (t.permute(0, 3, 1, 2) for t in (self.ha_bias, self.wa_bias))
        gather = self.map_bias(self.an_bias, self.ah_bias, self.aw_bias, size)
        scatter = self.map_bias(self.na_bias, rows, columns, size)
        if extra and self.extra:
            extra_biases = self.regrid(self.ac_bias), self.regrid(self.ca_bias.transpose(1, 2))
            gather, scatter = (torch.cat(pair, dim=-1) for pair in zip(extra_biases, (gather, scatter), strict=True))
        elif extra:
            gather, scatter = (F.pad(t, (extra, 0)) for t in (gather, scatter))
        return gather[None], scatter.transpose(1, 2)[None].contiguous()

    def map_bias(self, table: Tensor, rows: Tensor, columns: Tensor, size: torch.Size) -> Tensor:
        """Sum a coarse table and tables over rows and columns, interpolated to `size` = (H, W): (heads, A, H * W).

        Args:
            table: Coarse table (heads, agents², 7, 7).
            rows: Table over rows (heads, agents², h, 1).
            columns: Table over columns (heads, agents², 1, w).
            size: Size (H, W) of the map.
        """
        H, W = size
        table, rows, columns = (
            F.interpolate(self.regrid(t), s, mode="bilinear")
            for t, s in ((table, (H, W)), (rows, (H, 1)), (columns, (1, W)))
        )
        return (table + rows + columns).flatten(2)

    def regrid(self, table: Tensor) -> Tensor:
        """Interpolate (heads, agents², ...) over the grid of agents to (heads, pool², ...)."""
        if self.pool == self.agents:
            return table
        grid = table.flatten(2).transpose(1, 2).unflatten(2, (self.agents, self.agents))  # (heads, places, a, a)
        grid = F.interpolate(grid, (self.pool, self.pool), mode="bilinear")
        return grid.flatten(2).transpose(1, 2).unflatten(2, table.shape[2:])

    def resize_table(self, name: str, value: Tensor) -> Tensor:
        """Interpolate a checkpoint's bias table over rows or columns to this op's `size`, for `load_weights`.

        Other weights are returned as they are.
        """
        axis = {"ah_bias": 2, "aw_bias": 3, "ha_bias": 1, "wa_bias": 2}.get(name)
        if axis is None:
            return value
        value = value.movedim(axis, -1)
        resized = F.interpolate(value.flatten(1, -2), self.get_parameter(name).shape[axis], mode="linear")
        return resized.unflatten(1, value.shape[1:-1]).movedim(-1, axis)
