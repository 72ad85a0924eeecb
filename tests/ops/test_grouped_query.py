"""Grouped-query attention: its definition, its special cases, and how query heads are shared out."""

from collections.abc import Sequence

import pytest
import torch

from ops import create_op
from ops.attention.grouped_query import noise_like, share_out

X = torch.randn(2, 4, 5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def grouped_query(**arguments):
    torch.manual_seed(0)
    return create_op("grouped_query", dim=12, num_heads=6, **arguments).double()


def numbers(norms: Sequence[float], heads: int) -> list[int]:
    """Return the number of query heads of each key head, as in the authors' loops."""
    weights = [norm - min(norms) for norm in norms]
    counts = [round(weight / sum(weights) * heads) for weight in weights]
    while sum(counts) > heads:
        counts[counts.index(max(counts))] -= 1
    while sum(counts) < heads:
        counts[counts.index(min(counts))] += 1
    return counts


@pytest.mark.parametrize("allocation", ["uniform", "key_norm", "batch_key_norm"])
def test_attends_as_defined(allocation):
    op = grouped_query(kv_heads=3, allocation=allocation)
    tokens = X.flatten(1, 2)
    q, k, v = (layer(tokens).unflatten(-1, (-1, 2)) for layer in (op.q, op.k, op.v))  # (B, N, heads, D)
    norms = [[k[b, :, t].detach().norm().item() for t in range(3)] for b in range(2)]
    if allocation == "batch_key_norm":
        norms = [[a + b for a, b in zip(*norms, strict=True)]] * 2
    out = []
    for b in range(2):
        counts = [2, 2, 2] if allocation == "uniform" else numbers(norms[b], 6)
        owners = [t for t, count in enumerate(counts) for _ in range(count)]
        heads = [(q[b, :, h] @ k[b, :, t].T / 2**0.5).softmax(-1) @ v[b, :, t] for h, t in enumerate(owners)]
        out.append(op.proj(torch.cat(heads, dim=-1)))
    assert torch.allclose(op(X).flatten(1, 2), torch.stack(out), atol=1e-12)


def test_as_many_key_heads_as_query_heads_give_full_attention():
    op = grouped_query(kv_heads=6)
    full = create_op("full", dim=12, num_heads=6).double()
    full.proj = op.proj
    with torch.no_grad():
        full.qkv.weight.copy_(torch.cat([op.q.weight, op.k.weight, op.v.weight]))
        full.qkv.bias.copy_(torch.cat([op.q.bias, op.k.bias, op.v.bias]))
    assert torch.allclose(op(X), full(X), atol=1e-12)


def test_heads_are_shared_out_in_proportion_and_corrected():
    for norms in ([5.0, 1.0, 3.0], [2.0, 2.1, 2.2, 2.3], [1.0, 9.0, 9.0, 9.0], [0.0, 1.0, 1.0, 1.0, 1.0]):
        weights = torch.tensor(norms) - min(norms)
        counts = share_out(weights, 8).bincount(minlength=len(norms)).tolist()
        assert counts == numbers(norms, 8)
    assert share_out(torch.zeros(3), 6).tolist() == [0, 0, 1, 1, 2, 2]


def test_key_norms_of_an_image_do_not_depend_on_its_batch():
    x = torch.cat([X, 5 * X.flip(-1)])
    op = grouped_query(kv_heads=3, allocation="key_norm")
    assert torch.allclose(op(x)[:1], op(x[:1]), atol=1e-12)


@pytest.mark.parametrize("allocation", ["key_change", "key_average"])
def test_a_dynamic_allocation_is_renewed_at_intervals_and_kept_in_evaluation(allocation):
    op = grouped_query(kv_heads=3, allocation=allocation, interval=4)
    assert op.groups.tolist() == [0, 0, 1, 1, 2, 2]
    seen = []
    for step in range(9):
        with torch.no_grad():
            op.k.weight[(step % 3) * 4 : (step % 3) * 4 + 4] *= 8
        op(X)
        seen.append(tuple(op.groups.tolist()))
    assert seen[0] != (0, 0, 1, 1, 2, 2)
    changes = [step for step in range(1, 9) if seen[step] != seen[step - 1]]
    assert changes and set(changes) <= {4, 8}
    op.eval()
    assert torch.equal(op(X)[:1], op(X[:1])) and tuple(op.groups.tolist()) == seen[-1] and op.passes == 9
    compiled = torch.compile(op.train(), backend="eager", fullgraph=True)
    assert compiled(X).isfinite().all() and op.passes == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_heads": 4}, "kv_heads must be positive and a divisor of 6"),
        ({"kv_heads": 7, "allocation": "key_norm"}, "kv_heads must be positive and at most 6"),
        ({"allocation": "norm"}, "allocation must be one of uniform, key_norm"),
        ({"interval": 3}, "interval must be positive and even, not 3"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        grouped_query(**arguments)


def test_noise_has_the_outputs_mean_and_deviation_and_is_the_same_for_all_images():
    out = torch.randn(3, 4, 50, 8, dtype=torch.float64) * torch.rand(3, 4, 1, 1) + 2
    noise, mean = noise_like(out, True), noise_like(out, False)
    assert torch.allclose(noise.mean((2, 3)), out.mean((2, 3))) and torch.equal(mean, out.mean((2, 3), keepdim=True))
    assert torch.allclose(noise.std((2, 3)), out.std((2, 3)))
    scaled = (noise - mean) / noise.std((2, 3), keepdim=True)
    assert torch.allclose(scaled[0], scaled[2]) and not torch.allclose(scaled[0, 0], scaled[0, 1])


def test_evaluation_subtracts_the_mean_of_the_noise():
    op, plain = grouped_query(kv_heads=3, noise=True), grouped_query(kv_heads=3)
    plain.load_state_dict(op.state_dict())
    op.proj, plain.proj = torch.nn.Identity(), torch.nn.Identity()
    heads = plain(X).unflatten(-1, (6, 2))
    expected = heads - heads.mean((1, 2, 4), keepdim=True)
    assert torch.allclose(op.eval()(X), expected.flatten(3), atol=1e-12)
    torch.manual_seed(0)
    first = op.train()(X)
    assert not torch.allclose(first, op(X))
