"""Tests of the checks that precede the timing of a primitive."""

import pytest
import torch

from ops.backend import using
from retinue.benchmarks import primitives
from tests.retinue.benchmarks.examples import LAYERS, runnable


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.describe(2))
def test_all_formulations_have_one_meaning(layer, dtype):
    names = runnable(layer)
    assert len(names) > 2
    errors = primitives.check(layer, names, primitives.make_inputs(layer, 2, dtype, "cpu"))
    assert list(errors) == names and all(0 < error < 2 for error in errors.values())


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.describe(2))
def test_exact_results_head_by_head_equal_those_of_all_heads(layer):
    inputs = primitives.make_inputs(layer, 2, torch.float64, "cpu")
    qkv, bias, index, dout = inputs
    with using("torch"):
        out = layer.attend(primitives.PRIMITIVES[layer.primitive], qkv, bias, index)
    grads = torch.autograd.grad(out, inputs.leaves, dout)
    for actual, expected in zip(primitives.exact_results(layer, inputs), [out, *grads], strict=True):
        assert torch.allclose(actual, expected, atol=1e-12)
