"""CFSR's edge-preserving MLP: its fixed filters, its merged form, and the size of the net."""

from typing import Any

import pytest
import torch

from models.layers.edge_ffn import EdgeFFN
from models.super_resolution import CFSR


def edge_ffn(**arguments) -> Any:
    torch.manual_seed(0)
    mlp: Any = EdgeFFN(4, **arguments).double()
    for part in mlp.filters:
        torch.nn.init.normal_(part.scale)
    return mlp


@pytest.mark.parametrize("masks", ["true", "authors"])
def test_edges_add_as_defined(masks):
    mlp, x = edge_ffn(masks=masks), torch.randn(5, 4, 4, dtype=torch.float64)
    hidden = torch.nn.functional.gelu(mlp.fc1(x))
    padded = torch.zeros(7, 6, 8, dtype=torch.float64)
    padded[1:6, 1:5] = hidden
    for i, j in ((i, j) for i in range(5) for j in range(4)):
        patch = padded[i : i + 3, j : j + 3]  # (3, 3, hidden)
        edges = (patch * mlp.pos.weight[:, 0].permute(1, 2, 0)).sum((0, 1)) + mlp.pos.bias
        for part in mlp.filters:
            edges = edges + part.scale.flatten() * (patch * part.mask[:, 0].permute(1, 2, 0)).sum((0, 1)) + part.bias
        out = mlp.fc2(hidden[i, j] + torch.nn.functional.gelu(edges))
        assert torch.allclose(mlp(x[None])[0, i, j], out, atol=1e-12)


@pytest.mark.parametrize("masks", ["true", "authors"])
def test_fixed_filters_ignore_constants(masks):
    mlp = edge_ffn(masks=masks)
    assert [float(part.mask.sum((2, 3)).abs().max()) for part in mlp.filters] == [0, 0, 0]
    assert mlp.filters[2].mask[0, 0].tolist()[0] == ([0, 1, 0] if masks == "true" else [1, 0, 0])


def test_merging_changes_nothing():
    mlp, x = edge_ffn(), torch.randn(1, 5, 6, 4, dtype=torch.float64)
    expected = mlp(x)
    mlp.merge()
    assert torch.allclose(mlp(x), expected, atol=1e-12)
    merged = edge_ffn(merged=True)
    assert merged.load_state_dict(mlp.state_dict())


@pytest.mark.parametrize(("scale", "millions"), [(2, 0.291), (3, 0.298), (4, 0.307)])
def test_counts_as_many_parameters_as_the_paper(scale, millions):
    net = CFSR(scale, merged=True)
    assert round(sum(parameter.numel() for parameter in net.parameters()) / 1e6, 3) == millions


def test_every_parameter_trains_and_any_op_fits():
    net = CFSR(2, dim=8, depths=(2, 1), mixers=["large_kernel", "window"])
    out = net(torch.rand(1, 3, 9, 7))
    assert out.shape == (1, 3, 18, 14)
    grads = torch.autograd.grad(out.square().sum(), list(net.parameters()))
    assert all(grad.abs().max() > 0 for grad in grads)


def test_unknown_masks_are_refused():
    with pytest.raises(ValueError, match="masks must be 'true' or 'authors', not 'false'"):
        EdgeFFN(4, masks="false")
