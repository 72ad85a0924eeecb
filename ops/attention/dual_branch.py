"""Local, coarse and global attention of UltraGen, mixed by learned gates.

Paper: UltraGen: High-Resolution Video Generation with Hierarchical Attention (arXiv:2510.18775). By the paper's text;
the authors' repository, sjtuplayer/UltraGen, has no code yet. The gates of the paper follow the time step of diffusion.
These choices are ours: gates without a time step, one output projection for all branches, windows of equal size, a
decompression by a depthwise 3 x 3 and a 1 x 1 convolution, and one attention alone in the last stage.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.functional import map_attention
from ops.lora import low_rank
from ops.registry import FIRST, Place, register_op
from ops.tiles import ragged_window_attention
from ops.windows import weighted_sums
from retinue.utils.arithmetic import ceil_div

# Number of windows along each side of the map by stage
WINDOWS = (4, 4, 2, 1)


class CompressedBranch(nn.Module):
    """Attention on a compressed map, decompressed to the size of the map (B, H, W, C).

    A depthwise convolution, which begins as a mean, reduces each cell of factor x factor tokens to one. The output is
    interpolated bilinearly and smoothed by convolutions.

    Args:
        dim: Number of channels C.
        factor: Side of a cell in tokens.
        rank: Rank of the change of the query, key and value projections; 0 for none, or "full" for projections of the
            branch's own.
    """

    def __init__(self, dim: int, factor: int, rank: int | str):
        super().__init__()
        self.compress = nn.Parameter(torch.full((factor, factor, dim), factor**-2.0))
        self.qkv = nn.Linear(dim, 3 * dim) if rank == "full" else None
        self.change = None
        if isinstance(rank, int) and rank:
            self.change = nn.ModuleList([low_rank(dim, dim, rank) for _ in range(3)])
        self.smooth = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.Conv2d(dim, dim, 1))

    def forward(self, x: Tensor, qkv: nn.Module, attention: Callable[[Tensor], Tensor], proj: nn.Module) -> Tensor:
        compressed = weighted_sums(x, self.compress)
        projected = qkv(compressed) if self.qkv is None else self.qkv(compressed)
        if self.change is not None:
            projected = projected + torch.cat([change(compressed) for change in self.change], dim=-1)
        out = proj(attention(projected)).permute(0, 3, 1, 2)
        if out.shape[2:] != x.shape[1:3]:
            out = F.interpolate(out, x.shape[1:3], mode="bilinear")
        return self.smooth(out).permute(0, 2, 3, 1)


@register_op("dual_branch")
class DualBranchAttention(nn.Module):
    """Tokens attend inside windows, inside larger windows of a compressed map, and to a strongly compressed map.

    The windows of every second block are more and smaller, so that they cover the borders of the other block's windows.
    Windows that reach beyond the map hold fewer tokens. The larger windows are twice as wide and high, on a map of half
    the size. A gate for each channel mixes their branch with the local one, a second gate the result with the global
    branch. With one window and no compression, the op is full attention alone. Cost is quadratic in H * W, divided by
    about windows²; with `window` the local branch's cost is linear.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The stage sets the default of `windows`, the block whether the windows are those of every second block.
        windows: Number of windows along each side of the map, one more in every second block. By default 4, 4, 2 and 1
            by stage; the paper has 4.
        window: Side of a window in tokens, instead of `windows`.
        compress: Side of a cell of the compressed map of the global branch, in tokens; by default `windows`, or 4 with
            `window`.
        rank: Rank of the change of the query, key and value projections in the coarse and the global branch; 0 for
            none, or "full" for projections of their own. Default 64.
        coarse: Use the branch of larger windows; default True. It needs at least two windows.
        gate: "learned" (default) for gates that are weights, or "pooled" for gates computed from the mean of the map.
    """

    family = "mixed"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        windows: int | None = None,
        window: int | None = None,
        compress: int | None = None,
        rank: int | str = 64,
        coarse: bool = True,
        gate: str = "learned",
    ):
        super().__init__()
        if windows is not None and window is not None:
            raise ValueError(f"windows and window cannot both be given, not {windows} and {window}")
        if windows is None and window is None:
            windows = WINDOWS[min(place.stage, 3)]
        if compress is None:
            compress = 4 if windows is None else windows
        if min(value for value in (windows, window, compress) if value is not None) < 1:
            raise ValueError(f"windows, window and compress must be at least 1, not {windows}, {window} and {compress}")
        if rank != "full" and (isinstance(rank, str) or rank < 0):
            raise ValueError(f"rank must be at least 0 or 'full', not {rank!r}")
        if gate not in ("learned", "pooled"):
            raise ValueError(f"gate must be 'learned' or 'pooled', not {gate!r}")
        # The number of windows is 0 where it follows from `window`
        self.windows: int = 0 if windows is None else windows
        self.num_heads, self.window, self.odd = num_heads, window, place.block % 2
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.alone = windows == 1 and compress == 1
        if self.alone:
            return
        self.global_branch = CompressedBranch(dim, compress, rank)
        self.coarse_branch = CompressedBranch(dim, 2, rank) if coarse and windows != 1 else None
        gates = 1 if self.coarse_branch is None else 2
        self.gate = nn.Linear(dim, gates * dim) if gate == "pooled" else nn.Parameter(torch.zeros(gates, dim))

    def no_weight_decay(self) -> set[str]:
        return {"gate", "global_branch.compress", "coarse_branch.compress"} & {n for n, _ in self.named_parameters()}

    def forward(self, x: Tensor) -> Tensor:
        if self.alone:
            return self.proj(self.attend_to_all(self.qkv(x)))
        H, W = x.shape[1:3]
        windows = (self.windows_of_side(H), self.windows_of_side(W))
        out = self.proj(self.attend_in_windows(self.qkv(x), windows[0] + self.odd, windows[1] + self.odd))
        gates = self.gates(x)
        if self.coarse_branch is not None:
            larger = [max(number // 2, 1) + self.odd for number in windows]
            coarse = self.coarse_branch(x, self.qkv, lambda qkv: self.attend_in_windows(qkv, *larger), self.proj)
            out = out + gates[1] * (coarse - out)
        return out + gates[0] * (self.global_branch(x, self.qkv, self.attend_to_all, self.proj) - out)

    def windows_of_side(self, n: int) -> int:
        """Return the number of windows, in every first block of two, along a side of n tokens."""
        return self.windows if self.window is None else ceil_div(n, self.window)

    def gates(self, x: Tensor) -> list[Tensor]:
        """Return the gates of the global and the coarse branch for a map (B, H, W, C), which broadcast to it."""
        if isinstance(self.gate, nn.Linear):
            pooled = self.gate(x.mean((1, 2), keepdim=True)).sigmoid()
            return list(pooled.split(x.shape[3], dim=-1))
        return list(self.gate.sigmoid())

    def attend_to_all(self, qkv: Tensor) -> Tensor:
        """Compute attention between all tokens for queries, keys and values (B, h, w, 3C)."""
        q, k, v = qkv.chunk(3, dim=-1)
        return map_attention(q, k, v, self.num_heads)

    def attend_in_windows(self, qkv: Tensor, rows: int, columns: int) -> Tensor:
        """Compute attention inside `rows` x `columns` windows for queries, keys and values (B, h, w, 3C)."""
        window = (ceil_div(qkv.shape[1], rows), ceil_div(qkv.shape[2], columns))
        return ragged_window_attention(qkv.unflatten(-1, (3, -1)), None, self.num_heads, window)
