"""Gated attention: its definition, the ops that it gates, and checkpoints without a gate."""

import pytest
import torch
from torch import nn

from models import load_weights
from ops import Place, create_op
from ops.registry import take_extra

X = torch.randn(2, 5, 6, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
GATED = ("window", "neighborhood", "full", "plain_window", "agent", "cross_shaped_window", "varied_size_window")


def gated(**arguments):
    torch.manual_seed(0)
    return create_op("gated", dim=12, num_heads=3, **arguments).double()


@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
def test_the_gate_multiplies_the_heads_before_the_projection(gate):
    op = gated(gate=gate)
    expected = torch.zeros_like(X)
    for b, i, j in ((b, i, j) for b in range(2) for i in range(5) for j in range(6)):
        heads = op.attention.attend(X)[b, :, i * 6 + j]  # (heads, D)
        scores = op.gate.weight @ X[b, i, j]
        factors = scores.view(3, 4) if gate == "elementwise" else scores.view(3, 1)
        expected[b, i, j] = op.proj((heads / (1 + (-factors).exp())).flatten())
    assert torch.allclose(op(X), expected, atol=1e-12)


@pytest.mark.parametrize("of", GATED)
def test_a_gate_without_weights_halves_the_output_of_the_op(of):
    op = gated(of=of, gate="headwise", place=Place(1, 1, 2, 8))
    plain = create_op(of, 12, 3, place=Place(1, 1, 2, 8)).double()
    state = {**plain.state_dict(), "gate.weight": torch.zeros(3, 12, dtype=torch.float64)}
    load_weights(nn.ModuleDict({"mixer": op}), {f"mixer.{name}": value for name, value in state.items()})
    assert torch.allclose(op(X), (plain(X) + plain.proj.bias) / 2, atol=1e-12)


def test_an_op_without_projection_is_gated_at_its_output():
    op = gated(of="hilo")
    with torch.no_grad():
        op.gate.weight.zero_()
    assert torch.allclose(op(X), op.attention(X) / 2, atol=1e-12)


def test_context_and_extra_tokens_reach_the_op():
    op, place = gated(of="length_scaled_cosine"), Place()
    context = op.make_context(place, 12, 3, of="length_scaled_cosine").double()
    assert op(X, context=context(X)).shape == X.shape
    assert gated().make_context is None
    assert take_extra(["gated"]) and not take_extra([{"name": "gated", "of": "window"}])
    with pytest.raises(ValueError, match="of must be an op that takes extra tokens"):
        create_op("gated", 12, 3, place=Place(extra=1), of="window")


def test_wrong_values_are_refused():
    for arguments, message in (
        ({"gate": "head"}, "gate must be 'elementwise' or 'headwise', not 'head'"),
        ({"of": "windows"}, "no op is called 'windows'"),
    ):
        with pytest.raises(ValueError, match=message):
            gated(**arguments)
