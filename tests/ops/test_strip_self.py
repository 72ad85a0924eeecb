"""Strip self-attention equals its definition, written as loops."""

import math

import pytest
import torch

from ops import Place, create_op


@pytest.mark.parametrize(("qk_dim", "ratio"), [(1, 2), (3, 1)])
@pytest.mark.parametrize("size", [(4, 6), (5, 3)], ids=str)
def test_each_token_attends_to_reduced_tokens(size, qk_dim, ratio):
    torch.manual_seed(0)
    op = create_op("strip_self", dim=6, num_heads=2, ratio=ratio, qk_dim=qk_dim).double()
    x = torch.randn(1, *size, 6, dtype=torch.float64)
    padded = torch.zeros(*(side + side % ratio for side in size), 6, dtype=torch.float64)
    padded[: size[0], : size[1]] = x[0]
    sources = []
    for i in range(0, padded.shape[0], ratio):
        for j in range(0, padded.shape[1], ratio):
            patch = padded[i : i + ratio, j : j + ratio]
            if ratio == 1:
                sources.append(patch[0, 0])
            else:
                sources.append(op.norm(torch.einsum("ijc,ocij->o", patch, op.reduce.weight) + op.reduce.bias))
    out = torch.zeros_like(x)
    for i in range(size[0]):
        for j in range(size[1]):
            heads = []
            for h in range(2):
                qk, own = slice(h * qk_dim, (h + 1) * qk_dim), slice(3 * h, 3 * h + 3)
                q = op.q(x[0, i, j])[qk]
                scores = torch.stack([q @ op.k(source)[qk] / math.sqrt(qk_dim) for source in sources])
                values = torch.stack([op.v(source)[own] for source in sources])
                heads.append(scores.softmax(0) @ values)
            out[0, i, j] = op.proj(torch.cat(heads))
    assert torch.allclose(op(x), out, atol=1e-12)


def test_queries_of_zero_give_the_mean_of_the_values():
    torch.manual_seed(0)
    op = create_op("strip_self", dim=6, num_heads=2, ratio=1)
    torch.nn.init.zeros_(op.q.weight)
    torch.nn.init.zeros_(op.q.bias)
    x = torch.randn(1, 3, 4, 6)
    assert torch.allclose(op(x), op.proj(op.v(x).mean((1, 2), keepdim=True)).expand_as(x), atol=1e-6)


def test_ratio_follows_from_the_stage():
    assert [create_op("strip_self", 8, 2, place=Place(stage)).ratio for stage in range(4)] == [8, 4, 2, 1]
    with pytest.raises(ValueError, match="ratio and qk_dim must be at least 1, not 0 and 1"):
        create_op("strip_self", 8, 2, ratio=0)
