"""Merge the weights of several nets of one kind: their mean, and task arithmetic.

- Mean: model soups (Wortsman et al., arXiv:2203.05482); the mean of the last or best checkpoints of one training.
- Task arithmetic: a base plus scaled differences from the base (Ilharco et al., arXiv:2212.04089).

A state is a mapping of names to tensors. Floating-point values are computed in float64 and returned in their type;
other values, such as counters and indices, are those of the first state.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from models.unpickling import read_weights
from models.weights import PREFIXES, unwrap

State = Mapping[str, Tensor]


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Return the weights in a safetensors or torch file, without prefixes that all names have.

    Raises:
        ValueError: The file cannot be read, or holds no weights.
    """
    state, _ = unwrap(read_weights(path), (), PREFIXES)
    if not state:
        raise ValueError(f"{path} holds no tensors by name, as a state dict does")
    return state


def check_same_net(state: State, other: State, name: str, other_name: str) -> None:
    """Check that two states are of one net: the same names, with the same shapes.

    Args:
        state: The first state.
        other: The second state.
        name: What the message calls the first state, such as its path.
        other_name: What the message calls the second state.

    Raises:
        ValueError: The states differ; the message names the first difference.
    """
    for key in [*state, *(key for key in other if key not in state)]:
        shapes = [tuple(weights[key].shape) if key in weights else None for weights in (state, other)]
        if shapes[0] != shapes[1]:
            theirs, ours = ("no such weight" if shape is None else f"shape {shape}" for shape in reversed(shapes))
            raise ValueError(f"{other_name} is of another net than {name}: {key} has {theirs} there, and {ours} here")


def mean(states: Iterable[State]) -> dict[str, Tensor]:
    """Return the mean of one or more states, which are taken one after another."""
    iterator = iter(states)
    first = next(iterator)
    sums, count = {key: value.double() for key, value in first.items() if value.is_floating_point()}, 1
    for state in iterator:
        count += 1
        for key in sums:
            sums[key] += state[key]
    return {key: (sums[key] / count).to(value.dtype) if key in sums else value for key, value in first.items()}


def add_differences(base: State, states: Sequence[State], scales: Sequence[float]) -> dict[str, Tensor]:
    """Return base + sum of scale * (state - base).

    Args:
        base: State that the others were trained from.
        states: The trained states.
        scales: A factor for each state; a negative one makes the net forget what the state learned.
    """
    merged = {}
    for key, value in base.items():
        if value.is_floating_point():
            total = value.double()
            for state, scale in zip(states, scales, strict=True):
                total = total + scale * (state[key].double() - value.double())
            merged[key] = total.to(value.dtype)
        else:
            merged[key] = value
    return merged


def contiguous(state: State) -> dict[str, Tensor]:
    """Return copies of the weights that a safetensors file takes: contiguous, and with no memory in common."""
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()}
