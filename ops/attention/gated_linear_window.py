"""Gated linear attention plus window attention with sinks, after Lizard (Nguyen et al., arXiv:2507.09025).

Written after the paper; the authors have released no code. The paper's form is causal, for text. The order of the
tokens, the run in both directions and the two-dimensional windows are ours. Where the paper says once that the
features are exponentials and once that they are softmaxes, they are softmaxes here, which are bounded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.functional import biased_scores_attention, merge_heads, split_heads
from ops.precision import at_least_float32, without_autocast
from ops.registry import FIRST, Place, register_op
from ops.scan import gated_linear_attention
from ops.windows import from_windows, pad_to_multiple, to_windows

ORDERS = ("rows", "columns", "both")
# Range of the factors of the heads on their states at the start of training
WEAKEST, STRONGEST = 0.99, 0.95
# Smallest sum that a token's weights are divided by
MIN_SUM = 1e-6


@register_op("gated_linear_window")
class GatedLinearWindow(nn.Module):
    """Tokens attend linearly to all tokens, less to distant ones, and by a softmax to the tokens of their window.

    The linear attention runs over the tokens in both directions, with positive features of queries and keys and a
    learned gate on the state at each token. A learned logit without a value takes a share of the softmax. A factor for
    each head weighs the second attention. The map is padded to whole windows; padded tokens are not attended to. Cost
    is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The block sets the default of `order`.
        window: Side of a window in tokens; default 7. 0 leaves the window attention out.
        sinks: Number of logits without a value for each head; default 4.
        features: Number of features of a head; each is used with both signs. By default dim / num_heads.
        order: Order of the tokens in the linear attention: "rows", "columns", or "both", which takes rows in one half
            of the heads and columns in the other. By default rows, and columns in every second block.
        gated: Use the linear attention; default True.
    """

    family = "mixed"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        window: int = 7,
        sinks: int = 4,
        features: int | None = None,
        order: str | None = None,
        gated: bool = True,
    ):
        super().__init__()
        head_dim = dim // num_heads
        features = head_dim if features is None else features
        order = ORDERS[place.block % 2] if order is None else order
        if window < 0 or sinks < 0 or features < 1:
            values = f"{window}, {sinks} and {features}"
            raise ValueError(f"window and sinks must be at least 0, and features at least 1, not {values}")
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, not {order!r}")
        if order == "both" and num_heads % 2:
            raise ValueError(f"order 'both' needs an even number of heads, not {num_heads}")
        if not (gated or window):
            raise ValueError("gated=False needs windows, not window 0")
        self.num_heads, self.window, self.order, self.gated = num_heads, window, order, gated
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if gated:
            self.q_features, self.k_features = (
                nn.Parameter(torch.eye(head_dim, features).repeat(num_heads, 1, 1)) for _ in range(2)
            )
            self.gate = nn.Linear(dim, num_heads)
            nn.init.trunc_normal_(self.gate.weight, std=0.02)
            with torch.no_grad():
                self.gate.bias.copy_(torch.linspace(WEAKEST, STRONGEST, num_heads).logit())
        if window:
            self.sinks = nn.Parameter(torch.zeros(num_heads, sinks)) if sinks else None
            self.window_weight = nn.Parameter(torch.ones(num_heads))

    def no_weight_decay(self) -> set[str]:
        names = {"q_features", "k_features", "sinks", "window_weight"}
        return {name for name, _ in self.named_parameters(recurse=False)} & names

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        out = self.linear(q, k, v, F.logsigmoid(self.gate(x))) if self.gated else torch.zeros_like(v)
        if self.window:
            weight = self.window_weight.repeat_interleave(v.shape[-1] // self.num_heads)
            out = out + weight * self.windows(q, k, v)
        return self.proj(out.to(x.dtype))

    def linear(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        """Attend linearly to the whole map.

        Args:
            q: Queries (B, H, W, C).
            k: Keys (B, H, W, C).
            v: Values (B, H, W, C).
            log_decay: Logarithms of the gates (B, H, W, heads).
        """
        with without_autocast(q):
            q, k, v = (t.unflatten(-1, (self.num_heads, -1)).permute(0, 3, 1, 2, 4) for t in (q, k, v))
            q, k, v, log_decay = at_least_float32(q, k, v, log_decay.unsqueeze(-1).permute(0, 3, 1, 2, 4))
            q, k = hedgehog(q, self.q_features), hedgehog(k, self.k_features)
            inputs = (q, k, torch.cat([v, torch.ones_like(log_decay)], dim=-1), log_decay)  # (B, heads, H, W, ...)
            if self.order == "both":
                first, second = zip(*(t.chunk(2, dim=1) for t in inputs), strict=True)
                sums = torch.cat([in_rows(*first), in_columns(*second)], dim=1)
            else:
                sums = (in_rows if self.order == "rows" else in_columns)(*inputs)
            out = sums[..., :-1] / sums[..., -1:].clamp(min=MIN_SUM)
        return out.permute(0, 2, 3, 1, 4).flatten(3)

    def windows(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend to the tokens of the window and to the sinks: (B, H, W, C) of queries, keys and values to the same."""
        H, W = q.shape[1:3]
        window = (min(self.window, H), min(self.window, W))
        padded = [pad_to_multiple(t, window) for t in (q, k, v, torch.ones_like(q[:1, ..., :1]))]
        size = padded[0].shape[1:3]
        grid = (size[0] // window[0], size[1] // window[1])
        q, k, v, on_map = (to_windows(t, grid) for t in padded)  # (B, P, N, C)
        q, k, v = (split_heads(t, self.num_heads) for t in (q, k, v))  # (B, P, heads, N, D)
        bias = torch.zeros_like(on_map).masked_fill(on_map == 0, -torch.inf)[0, :, None, None, :, 0]  # (P, 1, 1, N)
        bias = bias.expand(-1, self.num_heads, q.shape[-2], -1)
        if self.sinks is not None:
            # All sinks together are one more key with score 0 and value 0
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            sink = self.sinks.logsumexp(-1).to(bias.dtype)[:, None, None].expand(*bias.shape[:-1], 1)
            bias = torch.cat([bias, sink], dim=-1)
        out = merge_heads(biased_scores_attention(q, k, v, bias, q.shape[-1] ** -0.5))
        return from_windows(out, grid, size)[:, :H, :W]


def hedgehog(x: Tensor, weight: Tensor) -> Tensor:
    """Return the features (B, heads, H, W, 2F) of queries or keys (B, heads, H, W, D) for weights (heads, D, F).

    They are two softmaxes over the features, of both signs (Zhang et al., ICLR 2024, arXiv:2402.04347).
    """
    projected = x @ weight[:, None].to(x.dtype)
    return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], dim=-1)


def in_rows(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Run `gated_linear_attention` both ways over maps (B, heads, H, W, ...), row by row."""
    q, k, tokens, log_decay = (t.flatten(2, 3) for t in (q, k, v, log_decay))
    return gated_linear_attention(q, k, tokens, log_decay.squeeze(-1), both_ways=True).view_as(v)


def in_columns(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Run `gated_linear_attention` both ways over maps (B, heads, H, W, ...), column by column."""
    return in_rows(*(t.transpose(2, 3) for t in (q, k, v, log_decay))).transpose(2, 3)
