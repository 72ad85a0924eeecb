"""Relative convolutional multi-head attention, RCMHA (Sanjaya et al., 2023, arXiv:2308.03429).

Written after the paper and the authors' repository, hermansh-id/rcmha (Apache-2.0), which mixes sequences: modes
"causal1d" and "1d". Mode "2d" is our form for maps, with convolutions over both sides and offsets in two dimensions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.functional import biased_scores_attention, merge_heads, split_heads
from ops.registry import FIRST, Place, register_op
from ops.weighting import Values
from ops.windows import from_windows, pad_to_multiple, to_windows
from retinue.utils.arithmetic import ceil_div

MODES = ("2d", "causal1d", "1d")


@register_op("relative_conv")
class RelativeConvolutionalAttention(nn.Module):
    """Tokens attend to the tokens of their window; queries, keys and values are convolved depthwise before.

    All heads share the convolutions' kernels, which cross the borders of windows. Each head has a learned vector and a
    learned bias for each offset from the query to the key, which add to the scores; the vector is multiplied with the
    query. The map is zero-padded on the right and at the bottom to a multiple of the window; padded tokens are attended
    to. Cost is linear in H * W, or quadratic if the window is the whole map.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The stride sets the size of the tables of a whole map.
        mode: "2d" (default). "causal1d": the map is a sequence in row-major order and tokens attend to no later ones.
            "1d": they attend to later ones too, for which the authors' code reads the offsets with the next query.
        window: Side of a window of mode "2d" in tokens, default 7; a shorter side of a map is one window. With None all
            tokens attend to all: the tables are learned for the map of an image of 224 pixels, and interpolated to the
            map at hand.
        kernel: Size of the convolutions in tokens, odd in mode "2d"; default 3.
        reach: Largest distance in tokens with a row of its own in the tables of the modes "causal1d" and "1d"; default
            4096, as in the authors' code. Greater distances share the last row.
    """

    family = "local"
    renames = ((r"^attn\.", ""), (r"^(query|key|value)\.0\.linear\.", r"\1."), (r"\.1\.conv\.", "_conv."))

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        mode: str = "2d",
        window: int | None = 7,
        kernel: int = 3,
        reach: int = 4096,
    ):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
        if kernel < 1 or (mode == "2d" and kernel % 2 == 0):
            raise ValueError(f"kernel must be at least 1, and odd in mode 2d, not {kernel}")
        if min(reach, 1 if window is None else window) < 1:
            raise ValueError(f"window and reach must be at least 1, not {window} and {reach}")
        self.num_heads, self.mode, self.window, self.kernel, self.reach = num_heads, mode, window, kernel, reach
        head_dim = dim // num_heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim)
        conv: Any = nn.Conv2d if mode == "2d" else nn.Conv1d
        padding = kernel // 2 if mode == "2d" else 0
        self.query_conv, self.key_conv, self.value_conv = (
            conv(head_dim, head_dim, kernel, padding=padding, groups=head_dim) for _ in range(3)
        )
        # Side of the map or window that the tables are learned for
        self.side = ceil_div(224, place.stride) if window is None else window
        rows = (2 * self.side - 1) ** 2 if mode == "2d" else 2 * reach
        std = 0.02 if mode == "2d" else 0.0
        self.key_pos_embeddings = nn.Parameter(std * torch.randn(rows, num_heads, head_dim))
        self.key_pos_bias = nn.Parameter(std * torch.randn(rows, num_heads))
        self.query_pos_bias = nn.Parameter(torch.zeros(num_heads, head_dim))
        self.values = Values()
        self.output = nn.Linear(dim, dim)

    def no_weight_decay(self) -> set[str]:
        return {"key_pos_embeddings", "key_pos_bias", "query_pos_bias"}

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "2d":
            return self.attend_map(x)
        return self.attend_sequence(x.flatten(1, 2)).view(x.shape)

    def attend_map(self, x: Tensor) -> Tensor:
        """Return the output for maps (B, H, W, C), in windows."""
        size = (x.shape[1], x.shape[2])
        window = size if self.window is None else (min(self.window, size[0]), min(self.window, size[1]))
        heads = []
        for layer, conv in self.projections():
            maps = layer(x).unflatten(-1, (self.num_heads, -1)).permute(0, 3, 4, 1, 2)  # (B, heads, D, H, W)
            convolved = conv(maps.flatten(0, 1)).unflatten(0, maps.shape[:2]).flatten(1, 2)
            heads.append(convolved.permute(0, 2, 3, 1))
        heads[2] = self.values(heads[2], heads[2])
        heads = [pad_to_multiple(t, window) for t in heads]
        padded = heads[0].shape[1:3]
        grid = (padded[0] // window[0], padded[1] // window[1])
        q, k, v = (split_heads(to_windows(t, grid), self.num_heads) for t in heads)  # (B, P, heads, N, D)
        vectors, bias = self.tables(window)
        index = offsets(window, vectors.device).expand(*q.shape[:3], -1, -1)
        relative = (q @ vectors.permute(1, 2, 0) + bias.T.unsqueeze(1)).gather(-1, index)
        out = merge_heads(self.attend(q, k, v, relative))
        return self.output(from_windows(out, grid, padded)[:, : size[0], : size[1]])

    def tables(self, window: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the vectors (offsets, heads, D) and biases (offsets, heads) for the offsets in a window (h, w)."""
        rows, columns = (2 * n - 1 for n in window)
        side = 2 * self.side - 1
        tables = torch.cat([self.key_pos_embeddings, self.key_pos_bias.unsqueeze(-1)], dim=-1)
        tables = tables.unflatten(0, (side, side))
        if self.window is None and (rows, columns) != (side, side):
            flat = tables.flatten(2).permute(2, 0, 1).unsqueeze(0)
            flat = F.interpolate(flat, (rows, columns), mode="bilinear").squeeze(0)
            tables = flat.permute(1, 2, 0).unflatten(-1, tables.shape[2:])
        else:
            top, left = self.side - window[0], self.side - window[1]
            tables = tables[top : top + rows, left : left + columns]
        tables = tables.flatten(0, 1)
        return tables[..., :-1], tables[..., -1]

    def attend_sequence(self, x: Tensor, memory: int = 0) -> Tensor:
        """Return the output for sequences (B, M, C), in which the first `memory` tokens are keys but not queries.

        Returns:
            Tensor (B, M - memory, C).
        """
        sources, heads = (x[:, memory:], x, x), []
        for source, (layer, conv) in zip(sources, self.projections(), strict=True):
            tokens = split_heads(layer(source), self.num_heads).transpose(-2, -1)  # (B, heads, D, N)
            convolved = conv(F.pad(tokens.flatten(0, 1), (self.kernel - 1, 0)))
            heads.append(convolved.unflatten(0, tokens.shape[:2]).transpose(-2, -1))
        q, k, v = heads
        N, M = q.shape[2], k.shape[2]
        rows = torch.arange(-M, N, device=x.device).add(self.reach).clamp(0, 2 * self.reach - 1)
        relative = q @ self.key_pos_embeddings[rows].permute(1, 2, 0) + self.key_pos_bias[rows].T.unsqueeze(1)
        relative = skew(relative)[..., -M:]
        if self.mode == "causal1d":
            later = torch.ones(N, M, dtype=torch.bool, device=x.device).triu(memory + 1)
            relative = relative.masked_fill(later, -torch.inf)
        return self.output(merge_heads(self.attend(*(t.unsqueeze(1) for t in (q, k, v, relative))).squeeze(1)))

    def projections(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        """Return the linear layer and the convolution of the queries, of the keys and of the values."""
        return (self.query, self.query_conv), (self.key, self.key_conv), (self.value, self.value_conv)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, relative: Tensor) -> Tensor:
        """Compute attention with the terms of the offsets: q (B, P, heads, N, D), relative (B, P, heads, N, M)."""
        scale = q.shape[-1] ** -0.5
        queries = (q + self.query_pos_bias.unsqueeze(1)).to(v.dtype)
        return biased_scores_attention(queries, k, v, scale * relative, scale)


def offsets(window: tuple[int, int], device: torch.device) -> Tensor:
    """Return the row of the tables for each query and key of a window (h, w): (h * w, h * w)."""
    rows, columns = (
        torch.arange(n, device=device) - torch.arange(n, device=device)[:, None] + n - 1 for n in window
    )  # Query, key
    return (rows[:, None, :, None] * (2 * window[1] - 1) + columns[None, :, None, :]).flatten(2).flatten(0, 1)


def skew(x: Tensor) -> Tensor:
    """Shift row i of (..., N, R) by i to the left, with a zero between each row's end and the next row's start."""
    N, R = x.shape[-2:]
    return F.pad(x, (0, 1)).flatten(-2)[..., : N * R].unflatten(-1, (N, R))
