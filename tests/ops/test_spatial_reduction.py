"""Spatial-reduction attention equals its definition, written as loops."""

import math

import pytest
import torch

from ops import Place, create_op


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 1)], ids=str)
def test_keys_and_values_are_computed_from_patches(size):
    torch.manual_seed(0)
    op = create_op("spatial_reduction", dim=6, num_heads=2, ratio=2).double()
    x = torch.randn(1, *size, 6, dtype=torch.float64)
    padded = torch.zeros(*(side + side % 2 for side in size), 6, dtype=torch.float64)
    padded[: size[0], : size[1]] = x[0]
    patches = []
    for i in range(0, padded.shape[0], 2):
        for j in range(0, padded.shape[1], 2):
            patch = torch.einsum("ijc,ocij->o", padded[i : i + 2, j : j + 2], op.sr.weight) + op.sr.bias
            patches.append(op.kv(op.norm(patch)))
    k, v = torch.stack(patches).chunk(2, -1)
    q = op.q(x[0])
    heads = [(q[..., h] @ k[:, h].T / math.sqrt(3)).softmax(-1) @ v[:, h] for h in (slice(0, 3), slice(3, 6))]
    assert torch.allclose(op(x)[0], op.proj(torch.cat(heads, dim=-1)), atol=1e-12)


def test_ratio_follows_from_the_stage():
    assert [create_op("spatial_reduction", 8, 2, place=Place(stage)).ratio for stage in range(4)] == [8, 4, 2, 1]
    with pytest.raises(ValueError, match="ratio must be at least 1, not 0"):
        create_op("spatial_reduction", 8, 2, ratio=0)
