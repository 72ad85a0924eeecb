"""Attention inside clusters of k-means: definition by loops, special cases, and the training of the centroids."""

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ops import create_op
from ops.losses import Losses

X = torch.randn(2, 4, 6, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def cluster_routing(**arguments):
    torch.manual_seed(0)
    arguments = {"cluster_size": 7, "clusters": 3, "local_heads": 0, **arguments}
    return create_op("cluster_routing", 12, 3, **arguments).double().eval()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [7, 9])
def test_routes_as_defined(shared, size):
    op = cluster_routing(shared_qk=shared, cluster_size=size)
    # Fewer than 24 / 3 tokens in a cluster grow to 8
    size = max(size, 8)
    out, squares = torch.zeros(2, 24, 12, dtype=torch.float64), []
    for b, tokens in enumerate(X.flatten(1, 2)):
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            q, v = (layer(tokens)[:, part] for layer in (op.to_q, op.to_v))
            unit_q = q / q.norm(dim=-1, keepdim=True)
            k = unit_q if shared else op.to_k(tokens)[:, part]
            unit_k = k / k.norm(dim=-1, keepdim=True)
            for token in unit_q if shared else torch.cat([unit_q, unit_k]):
                nearest = max(op.kmeans.means[h], key=lambda mean: (token @ mean).item())
                squares.append((token - nearest).square().mean())
            sums, counts = torch.zeros(24, 4, dtype=torch.float64), [0] * 24
            for mean in op.kmeans.means[h]:
                queries = sorted(range(24), key=lambda i: -(unit_q[i] @ mean).item())[:size]
                keys = sorted(range(24), key=lambda i: -(unit_k[i] @ mean).item())[:size]
                for i in queries:
                    scores = q[i] @ k[keys].T / 2
                    if shared:
                        scores[keys.index(i)] = -5e4
                    sums[i] += scores.softmax(0) @ v[keys]
                    counts[i] += 1
            for i in range(24):
                out[b, i, part] = sums[i] / (counts[i] + 1e-5)
    losses = Losses()
    assert torch.allclose(op(X, losses=losses), op.to_out(out).view_as(X), atol=1e-12)
    assert torch.allclose(losses.means()["commitment"], torch.stack(squares).mean())


def test_one_cluster_is_full_attention_and_order_free():
    op, full = cluster_routing(clusters=1), create_op("full", 12, 3).double()
    with torch.no_grad():
        full.qkv.weight.copy_(torch.cat([op.to_q.weight, op.to_k.weight, op.to_v.weight]))
        full.qkv.bias.zero_()
        full.proj.weight.copy_(op.to_out.weight)
        full.proj.bias.zero_()
    assert torch.allclose(op(X) * (1 + 1e-5), full(X), atol=1e-12)
    op, order = cluster_routing(), torch.randperm(24)
    shuffled = X.flatten(1, 2)[:, order].view_as(X)
    assert torch.allclose(op(shuffled).flatten(1, 2), op(X).flatten(1, 2)[:, order], atol=1e-12)


def test_local_heads_attend_to_neighbourhoods():
    op, x = cluster_routing(local_heads=2), torch.randn(1, 9, 20, 12, dtype=torch.float64)
    op.to_out = torch.nn.Identity()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(op(x)[0, 4, 10, :8].sum(), x)
    reached = grad[0].abs().sum(-1) > 0
    assert reached[1:8, 7:14].all() and reached.sum() == 49


def test_training_is_the_same_with_checkpoints_and_moves_the_centroids():
    states = []
    for saves in (False, True):
        op = cluster_routing().train()
        x = X.clone().requires_grad_()
        for step in range(2):
            torch.manual_seed(1)
            batch = x.roll(step, dims=-1)
            out: Any = checkpoint(op, batch, use_reentrant=False) if saves else op(batch)
            before = op.kmeans.means.clone()
            out.square().sum().backward()
            assert step == 0 or not torch.equal(op.kmeans.means, before)
        states.append((op.kmeans.means, x.grad, op.to_q.weight.grad))
        means = op.kmeans.means.clone()
        assert torch.equal(op.eval()(X), op(X)) and torch.equal(op.kmeans.means, means)
    assert all(torch.allclose(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cluster_size": 0}, "cluster_size must be at least 1"),
        ({"local_heads": 3}, "local_heads from 0 to 2"),
        ({"clusters": 0}, "clusters must be at least 1, not 0"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        cluster_routing(**arguments)
