"""Registry of gates: what a gate must provide, and how gates are found by name and built.

A gate weights the values of a map by channel or place, and stands after a block or inside it; the net keeps its
layers. To add one, write a class in a file of `ops/gates/`, decorated with `@register_gate("<name>")`. The command line
and `--help` find it by themselves, and so do the tests. `scripts/describe_ops.py` adds it to docs/gates.md, and
`models/gates.py` puts gates into nets.

A gate must provide:

- `__init__(dim, **arguments)`: `dim` is the number of channels C. Every further argument has a default.
- `forward(x)`: maps (B, C, H, W) to (B, C, H, W) for any H and W of at least 1.
- A class docstring whose first line says in one sentence how values are weighted, then the paper and `Args:`.

A gate may also provide:

- `at`: a key of `PLACES`, the place in the net that the gate's paper chooses; "branch" if the class has none. Where a
  block has nothing at "conv", the gate stands at "branch".
- `make_context(in_chans) -> nn.Module`: a static method. The returned module reads the images (B, in_chans, h, w) once
  in each forward pass and all gates with the same spec receive its output: `forward(x, context)`. Where `make_context`
  has parameters that are arguments of the gate too, it gets their values.
"""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from ops.registry import per_block
from retinue.utils.registry import Registry, Spec
from retinue.utils.suggestions import nearest

# Name in place of a gate's: the block keeps its output.
NONE = "none"
# Value of `at` -> the values that the gate weights.
PLACES = {
    "branch": "what the block adds to its input, or the block's output if input and output differ in shape",
    "conv": "the map after the spatial convolution inside a residual block of a convolutional net",
    "block": "the block's output",
    "stage": "the output of the stage's last block",
}

_GATES: Registry[type[nn.Module]] = Registry("gate", ("dim",), absence=NONE, more=lambda cls: ("at",))
register_gate, list_gates = _GATES.register, _GATES.names


def create_gate(spec: Spec, dim: int) -> Any:
    """Build a gate.

    Args:
        spec: Name of the gate, or a mapping of `name` and arguments of the gate; its `at` is not read here.
        dim: Number of channels C of the map.

    Raises:
        ValueError: The name or an argument is unknown, or the gate refuses a value.

    Example:
        `create_gate({"name": "ela", "form": "small"}, dim=256)`
    """
    cls, arguments = _resolve(spec)
    return cls(dim, **arguments)


def create_gate_context(spec: Spec, in_chans: int) -> nn.Module | None:
    """Build the module that computes what the gates of a spec share, from images of `in_chans` channels, if any."""
    cls, arguments = _resolve(spec)
    make_context: Any = getattr(cls, "make_context", None)
    if make_context is None:
        return None
    parameters = inspect.signature(make_context).parameters
    return make_context(in_chans, **{key: value for key, value in arguments.items() if key in parameters})


def place_of(spec: Spec) -> str:
    """Return the place of a gate, a key of `PLACES`: that of the spec, else that of the gate's class.

    Raises:
        ValueError: The name or the place is unknown.
    """
    default = getattr(_resolve(spec)[0], "at", "branch")
    at = default if isinstance(spec, str) else spec.get("at", default)
    if at not in PLACES:
        raise ValueError(f"at must be one of {', '.join(PLACES)}, not {at!r}.{nearest(str(at), PLACES)}")
    return at


def parse_gates(gates: Spec | Sequence, depths: Sequence[int]) -> list[list[Spec | None]]:
    """Return the spec of the gate of every block of every stage, None for a block without one.

    Args:
        gates: As the mixers of `ops.parse_mixers`; "none" or null stands for no gate.
        depths: Number of blocks in each stage.

    Raises:
        ValueError: The list is not as long as there are stages, an entry is empty, or a name, an argument or a place is
            unknown.
    """
    stages = per_block(gates, depths, "gates", "gate", lambda spec: spec in (None, NONE) or place_of(spec))
    return [[None if spec == NONE else spec for spec in specs] for specs in stages]


def _resolve(spec: Spec) -> tuple[type[nn.Module], dict[str, Any]]:
    """Return the gate's class and its arguments, without the place."""
    cls, arguments = _GATES.resolve(spec)
    return cls, {key: value for key, value in arguments.items() if key != "at"}
