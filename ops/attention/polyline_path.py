"""Polyline path masked attention (Zhao et al., 2025, arXiv:2506.15940).

Written after the paper and the authors' repository, zhongchenzhao/PPMA (Apache-2.0).
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed
from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.registry import FIRST, Place, register_op


@register_op("polyline_path")
class PolylinePathAttention(nn.Module):
    """Tokens attend to each other less, the longer the path between them: along a row, then along a column.

    Each token predicts from its features the length of a step along its row and of one along its column; the length of
    a path is the sum of the steps on it, and is subtracted from the score. Queries and keys are rotated by the token's
    index in the map, counted row by row. The form "whole" attends to the whole map, and averages over paths that begin
    along the row and paths that begin along the column; its cost is quadratic in H * W. The form "chunk" attends to the
    row and to the column, one after the other, and averages over both orders; its cost is linear in H * W * (H + W).

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The stage sets the default of `form`.
        form: "chunk" or "whole"; by default chunk in the first two stages, as in the paper's smallest net.
    """

    family = "full"
    renames = (
        (r"^attn\.", ""),
        (r"^relpos\.", None),
        (r"^out_proj\.", "proj."),
        (r"^lepe\.conv\.", "lepe."),
        (r"^path_embed\.", ""),
        (r"^dt_linear\.", "step."),
        (r"^dt_bias$", "step_bias"),
        (r"^A_log$", "log_scale"),
    )

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, form: str | None = None):
        super().__init__()
        form = ("chunk" if place.stage < 2 else "whole") if form is None else form
        if form not in ("chunk", "whole"):
            raise ValueError(f"form must be 'chunk' or 'whole', not {form!r}")
        self.num_heads, self.head_dim, self.form = num_heads, dim // num_heads, form
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        # Steps along the row and along the column; all heads share the weights
        self.step = nn.Linear(self.head_dim, 2, bias=False)
        # The bias is such that softplus gives steps of this length at the start of training
        initial_length = torch.empty(num_heads).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.step_bias = nn.Parameter(initial_length.expm1().log())
        self.log_scale = nn.Parameter(torch.empty(num_heads).uniform_(1, 1.1).log())
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        lepe = self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        q, k = self.rotate(q, k * self.head_dim**-0.5)
        attend = self.chunk if self.form == "chunk" else self.whole
        out = attend(q, k, v, *self.masks(x))
        return self.proj(out + lepe)

    def chunk(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Attend along rows and along columns, one after the other, averaged over both orders.

        Args:
            q: Queries (B, H, W, C).
            k: Keys (B, H, W, C).
            v: Values (B, H, W, C).
            rows: Mask inside rows, (B, H, heads, W, W).
            columns: Mask inside columns, (B, W, heads, H, H).
        """
        rows = (self.scores(q, k) + rows).softmax(-1)  # (B, H, heads, W, W)
        columns = (self.scores(q.transpose(1, 2), k.transpose(1, 2)) + columns).softmax(-1)  # (B, W, heads, H, H)

        def along_rows(v: Tensor) -> Tensor:
            return merge_heads(rows @ split_heads(v, self.num_heads))

        def along_columns(v: Tensor) -> Tensor:
            return merge_heads(columns @ split_heads(v.transpose(1, 2), self.num_heads)).transpose(1, 2)

        return (along_columns(along_rows(v)) + along_rows(along_columns(v))) / 2

    def whole(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Attend to the whole map, averaged over both directions of paths; the arguments are those of `chunk`."""
        # A path from a query runs inside the query's row and then inside the key's column
        rows = rows.transpose(1, 2)[:, :, :, :, None]  # (B, heads, H, W, 1, W)
        columns = columns.permute(0, 2, 3, 4, 1)[:, :, :, None]  # (B, heads, H, 1, H, W)
        mask = (rows + columns).flatten(4).flatten(2, 3)  # (B, heads, H * W, H * W)
        scores = self.scores(q.flatten(1, 2), k.flatten(1, 2))
        weights = ((scores + mask).softmax(-1) + (scores + mask.transpose(-2, -1)).softmax(-1)) / 2
        return merge_heads(weights @ split_heads(v.flatten(1, 2), self.num_heads)).view_as(v)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the products of queries and keys (..., N, C) in each head: (..., heads, N, N)."""
        return split_heads(q, self.num_heads) @ split_heads(k, self.num_heads).transpose(-2, -1)

    def rotate(self, *tensors: Tensor) -> list[Tensor]:
        """Rotate pairs of each head's channels by the token's index; an odd last channel is paired with zeros."""
        H, W = tensors[0].shape[1:3]
        split = [F.pad(t.unflatten(-1, (self.num_heads, -1)), (0, self.head_dim % 2)) for t in tensors]
        # Angles are in float32, because bfloat16 does not distinguish the indices of large maps
        index = torch.arange(H * W, dtype=torch.float32, device=split[0].device).view(H, W, 1, 1)
        frequency = 10000 ** -torch.linspace(0, 1, split[0].shape[-1] // 2, dtype=torch.float32, device=index.device)
        angle = index * frequency.repeat_interleave(2)
        sin, cos = angle.sin(), angle.cos()
        return [apply_rot_embed(t, sin, cos).flatten(-2) for t in split]

    def masks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the negative length of paths inside rows, (B, H, heads, W, W), and columns, (B, W, heads, H, H)."""
        steps = self.step(x.unflatten(-1, (self.num_heads, -1)))  # (B, H, W, heads, 2)
        steps = F.softplus(steps + self.step_bias[:, None]) * self.log_scale.exp()[:, None]
        distances = steps[..., 0].transpose(2, 3).cumsum(-1), steps[..., 1].permute(0, 2, 3, 1).cumsum(-1)
        rows, columns = (-(distance[..., :, None] - distance[..., None, :]).abs() for distance in distances)
        return rows, columns
