"""Combiner: full attention through summaries of segments (Ren et al., NeurIPS 2021, arXiv:2107.05768).

Paper: Combiner: Full Attention Transformer with Sparse Computation Cost. Written after the paper and the authors'
repository, google-research/google-research, combiner/ (Apache-2.0), without its axial mixture. Windows as segments are
ours, and so is that a token does not attend to the summary of its own segment, which the authors' bidirectional form
counts too. For the axial form, one projection replaces the authors' two layers with a norm.
"""

import torch
from torch import Tensor, nn

from ops.blocks import Blocks, fit_block
from ops.registry import FIRST, Place, register_op
from ops.summaries import attend_with_summaries

FORMS = ("windows", "rows", "axial")
ACTIVATIONS = ("identity", "relu", "deepset")
POOLS = ("max", "mean", "sum")
ROW_SUMMARIES = ("none", "wsum", "proj", "wsum_proj")


@register_op("combiner")
class CombinerAttention(nn.Module):
    """Tokens attend in one softmax to the tokens of their segment and to one summary for each other segment.

    - "windows", "rows": segments are windows or rows of the map. The key of a summary pools the segment's keys; its
      value is the attention of the segment's pooled queries to the segment.
    - "axial": segments are rows. The summary of another row is that of the token in the query's column: the attention
      of this token to its row.

    Windows that do not fit the map hold fewer tokens, so nothing is padded. Cost is H * W * (tokens of a segment +
    number of segments): proportional to (H * W)^1.5 for rows, and for windows that grow with the map.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        form: "windows" (default), "rows" or "axial".
        window: Side of a window in tokens, for "windows"; default 7.
        local_summary: How queries and keys are pooled for "windows" and "rows": "identity", "relu" or "deepset" (a
            learned projection and ReLU), then "max", "mean" or "sum"; default "identity-max", the authors' choice.
        row_summary: The key of a summary for "axial": "none", the token's key; "wsum", the mean of the row's keys by
            the weights of the token's attention; "proj" (default, the authors' choice), a learned projection of
            the attention's output; "wsum_proj", of the mean of keys.
        causal: Attend to no later token of the segment and to no later segment, in row-major order; default False.

    Raises:
        ValueError: A value is unknown or out of its range.
    """

    family = "mixed"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        form: str = "windows",
        window: int = 7,
        local_summary: str = "identity-max",
        row_summary: str = "proj",
        causal: bool = False,
    ):
        super().__init__()
        activation, _, pool = local_summary.partition("-")
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
        if window < 1:
            raise ValueError(f"window must be at least 1, not {window}")
        if activation not in ACTIVATIONS or pool not in POOLS:
            expected = f"{'|'.join(ACTIVATIONS)} and {'|'.join(POOLS)}, joined by '-'"
            raise ValueError(f"local_summary must be {expected}, not {local_summary!r}")
        if row_summary not in ROW_SUMMARIES:
            raise ValueError(f"row_summary must be one of {', '.join(ROW_SUMMARIES)}, not {row_summary!r}")
        self.num_heads, self.form, self.window, self.causal = num_heads, form, window, causal
        self.activation, self.pooling, self.row_summary = activation, pool, row_summary
        head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.summary_q = self.summary_k = self.row_proj = None
        if form == "axial" and "proj" in row_summary:
            self.row_proj = nn.Linear(head_dim, head_dim, bias=False)
        if form != "axial" and activation == "deepset":
            self.summary_q = nn.Linear(head_dim, head_dim, bias=False)
            self.summary_k = nn.Linear(head_dim, head_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        window = (self.window, self.window) if self.form == "windows" else (1, W)
        blocks = fit_block(window, (H, W))
        q, k, v = blocks.split(self.qkv(x), 3 * self.num_heads).chunk(3, dim=1)  # (B, heads, M, L, D)
        out = self.attend_axially(q, k, v) if self.form == "axial" else self.attend_to_segments(q, k, v, blocks)
        return self.proj(blocks.join(out))

    def attend_to_segments(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
        """Return the attention of tokens to their segment and to the summaries of other segments.

        Args:
            q: Queries (B, heads, M, L, D) of the M segments.
            k: Keys, of the same shape.
            v: Values, of the same shape.
            blocks: The cut of the map into segments.
        """
        M, L, scale = q.shape[2], q.shape[3], q.shape[-1] ** -0.5
        real = blocks.real(q.device)
        summary_q = self.pool(q, self.summary_q, blocks).unsqueeze(3)
        weights = (summary_q @ k.transpose(-2, -1) * scale).masked_fill(~real.unsqueeze(1), -torch.inf).softmax(-1)
        summary_k, summary_v = self.pool(k, self.summary_k, blocks), (weights @ v).squeeze(3)

        others = torch.ones(M, M, dtype=torch.bool, device=q.device)
        own = real.unsqueeze(1)
        if self.causal:
            own, others = own & torch.ones(L, L, dtype=torch.bool, device=q.device).tril(), others.tril(-1)
        else:
            others = ~torch.eye(M, dtype=torch.bool, device=q.device)
        mask = torch.cat([own, others.unsqueeze(1).expand(-1, own.shape[1], -1)], dim=-1)
        return attend_with_summaries(q, k, v, summary_k, summary_v, mask)

    def pool(self, x: Tensor, projection: nn.Module | None, blocks: Blocks) -> Tensor:
        """Pool (B, heads, M, L, D) over the tokens of each segment: (B, heads, M, D)."""
        if projection is not None:
            x = projection(x)
        if self.activation != "identity":
            x = x.relu()
        if self.pooling == "mean":
            return blocks.means(x)
        absent = ~blocks.real(x.device).unsqueeze(-1)
        return x.masked_fill(absent, -torch.inf).amax(3) if self.pooling == "max" else x.masked_fill(absent, 0).sum(3)

    def attend_axially(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention of tokens to their row and to the summaries of other rows in their column.

        Args:
            q: Queries (B, heads, H, W, D).
            k: Keys, of the same shape.
            v: Values, of the same shape.
        """
        H, W, D = q.shape[2:]
        q = q * D**-0.5
        in_row = q @ k.transpose(-2, -1)  # (B, heads, H, W, W)
        weights = in_row.softmax(-1)
        summary_v = weights @ v
        summary_k = summary_v if self.row_summary == "proj" else k
        if "wsum" in self.row_summary:
            summary_k = weights @ k
        if self.row_proj is not None:
            summary_k = self.row_proj(summary_k)
        in_column = (q.transpose(2, 3) @ summary_k.permute(0, 1, 3, 4, 2)).transpose(2, 3)  # (B, heads, H, W, H)
        others = ~torch.eye(H, dtype=torch.bool, device=q.device)
        if self.causal:
            others = others.tril()
            later = torch.ones(W, W, dtype=torch.bool, device=q.device).triu(1)
            in_row = in_row.masked_fill(later, -torch.inf)
        in_column = in_column.masked_fill(~others.unsqueeze(1), -torch.inf)
        row_weights, column_weights = torch.cat([in_row, in_column], dim=-1).softmax(-1).split((W, H), dim=-1)
        return row_weights @ v + (column_weights.transpose(2, 3) @ summary_v.transpose(2, 3)).transpose(2, 3)
