"""Comparison of one of our modules with a reference vector."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models import load_weights
from models.reference import make_input, official_state, relative_error
from models.weights import rename_weights
from tests.vectors.blocks import Block
from tests.vectors.kinds import Net, Op, Part
from tests.vectors.method_claims import SimMIMNet

Claim = Net | Op | Part | Block | SimMIMNet

TOLERANCE = 1e-5
# Relative rounding error of float32, and a change of the input that matters as much as rounding inside a deep net.
ROUNDING, CHOICE_NOISE = 2**-24, 2**-21


def assert_reproduces(claim: Claim, vector: Mapping[str, Any]) -> None:
    """Check that a module of ours has the vector's parameters and, with its weights, its outputs.

    The weights are loaded as those of a released checkpoint are.
    """
    model = claim.build(vector).eval()
    state = _kept_as_built(model, vector) | official_state(vector)
    # Dense features drop the weights of the classifier, which the vector's module may have.
    unused_names = load_weights(model, state).dropped if state else ()
    our_state = rename_weights(model, state)
    num_params = getattr(claim, "constants", 0) + sum(parameter.numel() for parameter in model.parameters())
    assert num_params + sum(our_state[name].numel() for name in unused_names) == vector["num_params"]

    x = make_input(vector["input_shape"])
    outputs = _run(claim, model, vector, x)
    assert len(outputs) == len(vector["outputs"])
    errors = [relative_error(*pair) for pair in zip(vector["outputs"].values(), outputs, strict=True)]
    if max(errors) < TOLERANCE:
        return
    model, x = model.double(), x.double()
    # Rounding inside a net decides between choices that are nearly tied, such as a top-k. Then an input that is changed
    # by as much as rounding matters gives the vector's outputs.
    for perturbed in _perturbed(claim, model, vector, x, CHOICE_NOISE):
        if max(relative_error(*pair) for pair in zip(vector["outputs"].values(), perturbed, strict=True)) < TOLERANCE:
            return
    # With these weights the scores of some nets are so large that softmax is nearly a step, which no two
    # implementations compute alike in float32. The bound is then how much float32's rounding of the input matters.
    bounds = [max(TOLERANCE, 20 * change) for change in _sensitivity(claim, model, vector, x)]
    assert all(error < bound for error, bound in zip(errors, bounds, strict=True)), (errors, bounds)


def _kept_as_built(model: nn.Module, vector: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return our own values of weights that the vector's module kept as its constructor computed them."""
    as_built = {name: torch.empty(shape) for name, shape, _, is_built in vector["state"] if is_built}
    names = rename_weights(model, as_built)
    return {name: value for name, value in model.state_dict().items() if name in names}


def _run(claim: Claim, model: nn.Module, vector: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        return claim.run(model, vector, x)


def _perturbed(
    claim: Claim, model: nn.Module, vector: Mapping[str, Any], x: Tensor, noise: float
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the outputs for four inputs that differ from `x` by random relative changes of size `noise`."""
    for seed in range(4):
        changes = noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        yield _run(claim, model, vector, x * (1 + changes))


def _sensitivity(claim: Claim, model: nn.Module, vector: Mapping[str, Any], x: Tensor) -> list[float]:
    """Return the largest relative change of each output when the input changes by float32's rounding error.

    Args:
        claim: runs the model.
        model: in float64.
        vector: the vector that the model reproduces.
        x: the vector's input in float64.
    """
    exact = _run(claim, model, vector, x)
    perturbed = list(_perturbed(claim, model, vector, x, ROUNDING))
    return [max(float((run[i] - y).norm() / y.norm()) for run in perturbed) for i, y in enumerate(exact)]
