"""Network-in-network gating: its definition on the learned grid and on other maps."""

import pytest
import torch
import torch.nn.functional as F

from ops import Place, create_op


def network_in_network(**arguments):
    torch.manual_seed(0)
    return create_op("network_in_network", dim=6, num_heads=1, hidden=5, **arguments).double()


def test_gates_as_defined():
    op = network_in_network(size=(3, 4))
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    out = torch.empty_like(x)
    for b in range(2):
        tokens = x[b].flatten(0, 1)
        normed = op.token_norm(tokens)
        mixed = torch.stack([op.token_mlp(normed[:, c]) for c in range(6)], dim=1)
        gate = tokens + mixed
        gate = torch.stack([token + op.channel_mlp(op.channel_norm(token)) for token in gate])
        out[b] = (op.proj(tokens) * gate).unflatten(0, (3, 4))
    assert torch.allclose(op(x), out, atol=1e-12)


def test_an_enlarged_map_gives_the_enlarged_result():
    """Twice as many equal tokens gather the same sum if the weights are constant over the grid."""
    op = network_in_network(size=2)
    with torch.no_grad():
        for weight in (op.token_mlp.fc1.weight, op.token_mlp.fc2.weight.T, op.token_mlp.fc2.bias[None]):
            weight[:] = weight[:, :1]
    x = torch.randn(1, 2, 2, 6, dtype=torch.float64)
    enlarge = lambda t: F.interpolate(t.permute(0, 3, 1, 2), scale_factor=(2, 3)).permute(0, 2, 3, 1)  # noqa: E731
    assert torch.allclose(op(enlarge(x)), enlarge(op(x)), atol=1e-12)


def test_the_default_grid_is_that_of_224_pixels_and_at_most_14():
    sides = [create_op("network_in_network", 4, 1, place=Place(stride=stride)).grid for stride in (4, 16, 32)]
    assert sides == [(14, 14), (14, 14), (7, 7)]


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match="size and hidden must be at least 1, not 0 and 5"):
        network_in_network(size=0)
