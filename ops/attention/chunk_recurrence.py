"""Chunked recurrence of RAT (Wei et al., arXiv:2507.04416): gated means inside chunks, attention between chunks.

Written after the paper and the authors' repository, CLAIRE-Labo/RAT (MIT). The authors' form is causal, for text; rows
or columns as chunks and both directions are ours.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.norm import RMSNorm
from ops.precision import at_least_float32, without_autocast
from ops.registry import FIRST, Place, register_op
from ops.scan import linear_recurrence
from ops.weighting import Values, WeightedSums
from retinue.utils.arithmetic import ceil_div, padding

# Base of the wavelengths of the rotations of queries and keys
BASE = 10000.0


@register_op("chunk_recurrence")
class ChunkRecurrence(nn.Module):
    """Gated means run over the tokens of a chunk, and each token attends to its own mean and to those of other chunks.

    Keys and values are running means with the same learned gates, which start anew in each chunk. A token attends to
    the last mean of every other chunk, and to its chunk's mean up to itself. Queries and keys are rotated by the index
    of the chunk. The map is padded at the end to whole chunks, which leaves the means unchanged. For N tokens in chunks
    of L, the cost is N * (1 + N / L).

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: In every second block the chunks are columns instead of rows; the stride sets the first gates.
        length: Number of tokens of a chunk; by default the whole row or column.
        groups: Number of different groups of query and key channels, of dim / num_heads channels each, which the heads
            take in turn; must divide `num_heads`. By default 2, or 1 if the number of heads is odd.
        columns: Put the tokens in the order of columns; by default in every second block.
        causal: Attend to earlier chunks only, as the authors do; default False. Otherwise the op also runs on the
            reversed tokens.
        join: How the two directions are joined. "mean" (default): their outputs are averaged. "heads": the first half
            of the heads runs forwards, and the other half backwards; then `num_heads` must be even.
        norm: Apply an RMSNorm to the input, as the authors' layer does, which has no norm before it; default False.
    """

    family = "recurrent"
    renames = (
        (r"^rat\.", ""),
        (r"^input_norm\.", "norm."),
        (r"^out_proj\.", "proj."),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        length: int | None = None,
        groups: int | None = None,
        columns: bool | None = None,
        causal: bool = False,
        join: str = "mean",
        norm: bool = False,
    ):
        super().__init__()
        groups = math.gcd(2, num_heads) if groups is None else groups
        if groups < 1 or num_heads % groups or (length is not None and length < 1):
            raise ValueError(
                f"groups must divide {num_heads} heads, and length be at least 1, not {groups} and {length}"
            )
        if join not in ("mean", "heads"):
            raise ValueError(f"join must be 'mean' or 'heads', not {join!r}")
        if join == "heads" and not causal and num_heads % 2:
            raise ValueError(f"join 'heads' needs an even number of heads, not {num_heads}")
        self.num_heads, self.groups, self.length, self.causal, self.join = num_heads, groups, length, causal, join
        self.columns = place.block % 2 == 1 if columns is None else columns
        self.head_dim = dim // num_heads
        self.shares = (dim, dim, dim, groups * self.head_dim, groups * self.head_dim)
        self.norm = RMSNorm(dim, 1e-6) if norm else nn.Identity()
        self.in_proj = nn.Linear(dim, sum(self.shares), bias=False)
        self.values, self.sums = Values(), WeightedSums(by_channel=True)
        self.proj = nn.Linear(dim, dim, bias=False)
        for layer in (self.in_proj, self.proj):
            nn.init.normal_(layer.weight, std=0.02)
        # The time constants of the gates cover a chunk
        first_length = ceil_div(224, place.stride) if length is None else length
        self.gate_bias = nn.Parameter(torch.empty(dim).uniform_(1, max(first_length - 1, 1)).log())

    def no_weight_decay(self) -> set[str]:
        return {"gate_bias"}

    def forward(self, x: Tensor) -> Tensor:
        if self.columns:
            x = x.transpose(1, 2)
        length = x.shape[2] if self.length is None else self.length
        z, v, f, q, k = self.in_proj(self.norm(x).flatten(1, 2)).split(self.shares, dim=-1)
        q, k = (t.repeat(1, 1, self.num_heads // self.groups) for t in (q, k))
        with without_autocast(x):
            q, k, v, f = at_least_float32(q, k, self.values(v), f + self.gate_bias)
            out = self.sums(self.mix(torch.stack([q, k, v, f.sigmoid()]), min(length, v.shape[1])))
        out = self.proj(z.sigmoid() * out.to(z.dtype)).view_as(x)
        return out.transpose(1, 2) if self.columns else out

    def mix(self, inputs: Tensor, length: int) -> Tensor:
        """Mix sequences in chunks of `length` tokens.

        Args:
            inputs: Queries, keys, values and gates (4, B, N, C).
            length: Number of tokens of a chunk.

        Returns:
            Tensor (B, N, C).
        """
        n, pad = inputs.shape[2], padding(inputs.shape[2], length)
        if pad:
            # Gates of 1 leave the means as they are
            qkv, gates = (F.pad(t, (0, 0, 0, pad), value=value) for t, value in ((inputs[:3], 0.0), (inputs[3:], 1.0)))
            inputs = torch.cat([qkv, gates])
        if self.causal:
            out = self.one_way(inputs, length)
        elif self.join == "mean":
            out = (self.one_way(inputs, length) + self.one_way(inputs, length, backwards=True)) / 2
        else:
            first, second = inputs.chunk(2, dim=-1)
            out = torch.cat([self.one_way(first, length), self.one_way(second, length, backwards=True)], dim=-1)
        return out[:, :n]

    def one_way(self, inputs: Tensor, length: int, backwards: bool = False) -> Tensor:
        """Run the recurrence in one direction and attend; the arguments are those of `mix`, in whole chunks.

        Chunks have the same index in both directions, so that a mirrored map gives the mirrored output.
        """
        if backwards:
            inputs = inputs.flip(2)
        q, k, v, gates = inputs.unflatten(2, (-1, length)).unbind()  # (B, chunks, L, C)
        k, v = linear_recurrence(gates, (1 - gates) * torch.stack([k, v])).unbind()
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(2, 3) for t in (q, k, v))  # (B, chunks, heads, L, D)
        chunk = torch.arange(q.shape[1], device=q.device)
        index = chunk.flip(0) if backwards else chunk
        q, k = rotate(q, index), rotate(k, index)
        last_k, last_v = (t[..., -1, :].transpose(1, 2).unsqueeze(1) for t in (k, v))  # (B, 1, heads, chunks, D)
        others = q @ last_k.transpose(-2, -1)  # (B, chunks, heads, L, chunks)
        hidden = chunk >= chunk[:, None] if self.causal else chunk == chunk[:, None]
        others = others.masked_fill(hidden[:, None, None], -torch.inf)
        own = (q * k).sum(-1, keepdim=True)
        weights = (torch.cat([others, own], dim=-1) * self.head_dim**-0.5).softmax(-1)
        out = weights[..., :-1] @ last_v + weights[..., -1:] * v
        out = out.transpose(2, 3).flatten(3).flatten(1, 2)
        return out.flip(1) if backwards else out


def rotate(x: Tensor, index: Tensor) -> Tensor:
    """Rotate pairs of channels of (B, chunks, heads, L, D) by the chunks' `index` (chunks,); an odd last channel stays.

    Channel i is paired with channel i + D // 2.
    """
    half = x.shape[-1] // 2
    angle = index.to(x.dtype).view(-1, 1, 1, 1) * BASE ** -(
        torch.arange(half, dtype=x.dtype, device=x.device) / max(half, 1)
    )
    cos, sin = angle.cos(), angle.sin()
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
