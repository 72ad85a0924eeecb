"""Gated attention: a sigmoid gate on the output of any op (Qiu et al., NeurIPS 2025, arXiv:2505.06708).

Paper: Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free. Written after the
authors' repository, qiuzh20/gated_attention (MIT), whose rotary positions and causal mask are left out.
"""

from typing import Any

from torch import Tensor, nn

from ops.registry import FIRST, Place, Spec, create_context, create_op, register_op

GATES = ("elementwise", "headwise")


@register_op("gated")
class GatedAttention(nn.Module):
    """The output of another op is multiplied by a sigmoid gate, a linear function of the input, before its projection.

    The projection is the op's layer `proj`. The output of an op without such a linear layer is gated as it is. Padding
    is that of the op; its cost grows by one linear layer.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: As in the op.
        of: Op that is gated: its name, or a mapping of `name` and arguments. Default "full".
        gate: "elementwise" (default): a gate for each channel. "headwise": a gate for each of `num_heads` equal groups
            of channels.

    Raises:
        ValueError: `gate` is unknown, `of` does not take the extra tokens of its place, or the heads do not divide the
            op's channels.
    """

    family = "full"
    takes_extra = True
    # From a checkpoint of the op without a gate; its projection has the same name here
    renames = ((r"^(?!gate\.|proj\.|attention\.)", "attention."),)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        of: Spec = "full",
        gate: str = "elementwise",
    ):
        super().__init__()
        if gate not in GATES:
            raise ValueError(f"gate must be 'elementwise' or 'headwise', not {gate!r}")
        attention: Any = create_op(of, dim, num_heads, place=place)
        if place.extra and not getattr(attention, "takes_extra", False):
            raise ValueError(f"of must be an op that takes extra tokens, such as full, not {of!r}")
        if getattr(attention, "make_context", None) is None:
            self.make_context = None  # pyright: ignore[reportAttributeAccessIssue]
        self.fullgraph = getattr(attention, "fullgraph", True)
        self.attention, self.proj, width = attention, nn.Identity(), dim
        if isinstance(getattr(attention, "proj", None), nn.Linear):
            self.proj, attention.proj = attention.proj, nn.Identity()
            width = self.proj.in_features
        if width % num_heads:
            raise ValueError(f"{num_heads} heads do not divide the {width} channels of {of!r}")
        self.gate = nn.Linear(dim, width if gate == "elementwise" else num_heads, bias=False)

    @staticmethod
    def make_context(place: Place, dim: int, num_heads: int, of: Spec = "full") -> nn.Module:
        """Return the module that computes the context of the gated op."""
        return create_context(of, dim, num_heads, place=place)

    def forward(self, x: Tensor, extra: Tensor | None = None, **kwargs) -> Any:
        if extra is None:
            return self.apply_gate(x, self.attention(x, **kwargs))
        outputs = self.attention(x, extra, **kwargs)
        return tuple(self.apply_gate(*pair) for pair in zip((x, extra), outputs, strict=True))

    def apply_gate(self, x: Tensor, out: Tensor) -> Tensor:
        """Multiply the op's output (..., width) by the gate of its input x (..., C) and project it."""
        gate = self.gate(x).sigmoid().unsqueeze(-1)
        return self.proj((out.unflatten(-1, (gate.shape[-2], -1)) * gate).flatten(-2))

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the authors' weights under our names; their queries and gates are one layer.

        Its rows hold for each key head first the queries of this head and then their gates.
        """
        if "q_proj.weight" not in state:
            return state
        state = dict(state)
        rows = state.pop("q_proj.weight").unflatten(0, (self.attention.kv_heads, -1))
        queries = self.attention.q.out_features // self.attention.kv_heads
        parts = {"attention.q.weight": rows[:, :queries], "gate.weight": rows[:, queries:]}
        names = {"k_proj": "attention.k", "v_proj": "attention.v", "o_proj": "proj"}
        names |= {"q_norm": "attention.q_norm", "k_norm": "attention.k_norm"}
        renamed = {f"{names[name.removesuffix('.weight')]}.weight": value for name, value in state.items()}
        return renamed | {name: part.flatten(0, 1) for name, part in parts.items()}
