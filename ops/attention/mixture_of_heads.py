"""Mixture-of-head attention, MoH (Jin et al., ICML 2025, arXiv:2410.11842).

Paper: MoH: Multi-Head Attention as Mixture-of-Head Attention. Written after the paper and the authors' repository,
SkyworkAI/MoH (Apache-2.0).
"""

from typing import Any

import torch
from torch import Tensor, nn

from ops.functional import merge_heads
from ops.losses import Losses
from ops.registry import FIRST, Place, Spec, create_context, create_op, register_op


@register_op("mixture_of_heads")
class MixtureOfHeads(nn.Module):
    """Each token weights the heads of an attention op: shared heads always count, routed heads if it chooses them.

    The weights multiply the heads' outputs before the projection. Those of the shared heads are a softmax times their
    number. Those of the routed heads are a softmax over the candidates, of which each token keeps the largest, scaled
    to a sum of `routed`. A third softmax, times 2, balances the two groups. Padding and cost are those of the attention
    op: all heads are computed. The loss `load_balance` is `routed` if all candidates are chosen equally often, and
    greater otherwise.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: As in the attention op.
        of: Attention op whose heads are weighted: its name, or a mapping of `name` and arguments. An op with a method
            `attend`: "full" (default, as in the paper's DiT), "pixel_focused", "aggregated", "length_scaled_cosine".
        shared: Number of shared heads; the other heads are candidates for routing. By default a quarter of the heads,
            or all of fewer than four.
        routed: Number of routed heads that each token keeps. By default half of all heads, or none of fewer than four.

    Raises:
        ValueError: `of` has no heads to weight, or does not take the extra tokens of its place, or a number of heads is
            out of its range.
    """

    family = "full"
    takes_extra = True
    # From the authors' names, where the gates stand beside the attention's own weights
    renames = ((r"^(?!wg|attention\.)", "attention."),)
    loss_weights = (("load_balance", 0.01),)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        of: Spec = "full",
        shared: int | None = None,
        routed: int | None = None,
    ):
        super().__init__()
        few = num_heads < 4
        shared = (num_heads if few else num_heads // 4) if shared is None else shared
        candidates = num_heads - shared
        routed = (0 if few else min(num_heads // 2, candidates)) if routed is None else routed
        if not 0 <= shared <= num_heads or not (candidates > 0) <= routed <= candidates:
            raise ValueError(
                f"shared must be from 0 to {num_heads} heads, and routed from 1 to the number of the others (0 if all "
                f"are shared), not {shared} and {routed}"
            )
        self.attention: Any = create_op(of, dim, num_heads, place=place)
        if not hasattr(self.attention, "attend"):
            raise ValueError(f"of must be an attention op whose heads can be weighted, such as full, not {of!r}")
        if place.extra and not getattr(self.attention, "takes_extra", False):
            raise ValueError(f"of must be an op that takes extra tokens, such as full, not {of!r}")
        if getattr(self.attention, "make_context", None) is None:
            self.make_context = None  # pyright: ignore[reportAttributeAccessIssue]
        if not routed:
            self.loss_weights = ()
        self.shared, self.routed = shared, routed
        # The authors' names: gates of the routed heads, of both groups and of the shared heads
        self.wg = nn.Linear(dim, candidates, bias=False) if routed else None
        self.wg_0 = nn.Linear(dim, 2, bias=False) if routed and shared else None
        self.wg_1 = nn.Linear(dim, shared, bias=False) if shared > 1 else None

    @staticmethod
    def make_context(place: Place, dim: int, num_heads: int, of: Spec = "full") -> nn.Module:
        """Return the module that computes the context of the attention op."""
        return create_context(of, dim, num_heads, place=place)

    def forward(self, x: Tensor, extra: Tensor | None = None, losses: Losses | None = None, **context) -> Any:
        tokens = x.flatten(1, 2)
        heads = self.attention.attend(x, **context) if extra is None else self.attention.attend(x, extra, **context)
        gates = self.gates(tokens if extra is None else torch.cat([extra, tokens], dim=1), losses)  # (B, N, heads)
        out = self.attention.proj(merge_heads(heads * gates.transpose(1, 2).unsqueeze(-1).to(heads.dtype)))
        if extra is None:
            return out.view(x.shape)
        return out[:, extra.shape[1] :].view(x.shape), out[:, : extra.shape[1]]

    def gates(self, x: Tensor, losses: Losses | None) -> Tensor:
        """Return the weight of each head for tokens (B, N, C): (B, N, heads), the shared heads first."""
        shared = x.new_ones(*x.shape[:2], self.shared)
        if self.wg_1 is not None:
            shared = self.wg_1(x).softmax(-1) * self.shared
        if self.wg is None:
            return shared
        probabilities = self.wg(x).softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(self.routed, dim=-1).indices, 1)
        if losses is not None:
            mean, share = probabilities.mean((0, 1)), chosen.mean((0, 1))
            losses.add("load_balance", (mean * share).mean() * len(mean) ** 2)
        routed = probabilities * chosen
        routed = routed / routed.sum(-1, keepdim=True).clamp_min(torch.finfo(routed.dtype).eps) * self.routed
        if self.wg_0 is None:
            return routed
        groups = self.wg_0(x).softmax(-1) * 2
        return torch.cat([shared * groups[..., :1], routed * groups[..., 1:]], dim=-1)
