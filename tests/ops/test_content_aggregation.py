"""Content-aware token aggregation: definition by loops, special cases, and the training of the centres."""

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from ops import Place, create_op

X = torch.randn(2, 5, 7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def aggregation(**arguments):
    torch.manual_seed(0)
    return create_op("content_aggregation", 12, 3, **{"centers": 4, "group": 8, "qk_dim": 6, **arguments}).double()


def by_loops(op, tokens, centers, group):
    """Return the output for the tokens of one image and the centres that they are sorted by and attend to."""
    N = len(tokens)
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    cosines = unit @ (centers / centers.norm(dim=-1, keepdim=True)).T
    order = sorted(range(N), key=lambda i: int(cosines[i].argmax()))
    group = min(group, N)
    # Mirror images of the sequence follow its end
    endless = (order + order[::-1]) * 10
    out = torch.zeros(N, 12, dtype=torch.float64)
    for rank, i in enumerate(order):
        start = rank // group * group
        keys = endless[start : start + 2 * group]
        for h in range(3):
            qk, v = slice(2 * h, 2 * h + 2), slice(4 * h, 4 * h + 4)
            q = op.q(tokens[i])[qk] / 2**0.5
            weights = (op.k(tokens[keys])[:, qk] @ q).softmax(0)
            out[i, v] = weights @ op.v(tokens[keys])[:, v]
            weights = (op.center_k(centers)[:, qk] @ q).softmax(0)
            out[i, v] += weights @ op.center_v(centers)[:, v]
    return op.out(op.proj(out))


@pytest.mark.parametrize("group", [1, 8, 24, 35, 100])
def test_aggregates_as_defined(group):
    op = aggregation(group=group).eval()
    op.centers.initted.fill_(True)
    expected = torch.stack([by_loops(op, tokens, op.centers.means, group) for tokens in X.flatten(1, 2)])
    assert torch.allclose(op(X).flatten(1, 2), expected, atol=1e-12)


@pytest.mark.parametrize("centers", [4, 5, 50])
def test_first_centres_are_means_of_parts_of_the_sequence(centers):
    op = aggregation(centers=centers).eval()
    tokens = list(X.flatten(1, 2).unbind(1))
    # 35 is a multiple of 5, and one more token for each part follows nevertheless
    sequence = (tokens + tokens[::-1])[: 35 + centers - 35 % centers]
    length = len(sequence) // centers
    means = [torch.stack(sequence[m * length : (m + 1) * length]).mean((0, 1)) for m in range(centers)]
    expected = by_loops(op, X[1].flatten(0, 1), torch.stack(means), 8)
    assert torch.allclose(op(X)[1].flatten(0, 1), expected, atol=1e-12)


def test_one_group_without_centres_is_full_attention():
    op, full = aggregation(group=35, qk_dim=12).eval(), create_op("full", 12, 3).double()
    with torch.no_grad():
        op.center_v.weight.zero_()
        full.qkv.weight.copy_(torch.cat([op.q.weight, op.k.weight, op.v.weight]))
        full.qkv.bias.zero_()
        full.proj.weight.copy_(op.out.weight @ op.proj.weight)
        full.proj.bias.zero_()
    assert torch.allclose(op(X), full(X), atol=1e-12)


def test_training_refines_the_centres_and_averages_them_after_the_backward_pass():
    op, tokens = aggregation(steps=3, decay=0.9).train(), X.flatten(1, 2)
    unit, average = normalize(tokens, dim=-1).flatten(0, 1), None
    for step in range(2):
        x = X.clone().requires_grad_()
        if average is None:
            sequence = torch.cat([tokens, tokens.flip(1)[:, :1]], dim=1)
            means = sequence.unflatten(1, (4, 9)).mean((0, 2))
        else:
            means = average
        for _ in range(3):
            nearest = (unit @ normalize(means, dim=-1).T).argmax(-1)
            sums = torch.stack([unit[nearest == m].sum(0) for m in range(4)])
            means = torch.where(sums.any(-1, keepdim=True), normalize(sums, dim=-1), normalize(means, dim=-1))
        out = op(x)
        expected = torch.stack([by_loops(op, image, means, 8) for image in tokens])
        assert torch.allclose(out.flatten(1, 2), expected, atol=1e-12)
        assert bool(op.centers.initted) == (step > 0)
        out.sum().backward()
        average = means if average is None else 0.9 * average + 0.1 * means
        assert torch.allclose(op.centers.means, average)
        # The last step of k-means passes a gradient to the tokens
        grad = op.center_k.weight.grad
        assert x.grad is not None and grad is not None and grad.abs().max() > 0


def test_checkpoints_change_nothing():
    results = []
    for saves in (False, True):
        op, x = aggregation().train(), X.clone().requires_grad_()
        for step in range(2):
            batch = x.roll(step, dims=-1)
            out = checkpoint(op, batch, use_reentrant=False) if saves else op(batch)
            assert isinstance(out, torch.Tensor)
            out.square().sum().backward()
        results.append((op.centers.means, x.grad, op.k.weight.grad))
    assert all(torch.allclose(a, b) for a, b in zip(*results, strict=True))


def test_defaults_are_the_papers():
    ops = [create_op("content_aggregation", 40, 4, place=Place(block=block)) for block in range(5)]
    assert [len(op.centers.means) for op in ops] == [16, 32, 64, 128, 16]
    assert [op.group for op in ops] == [256, 128, 64, 32, 256]
    assert ops[0].q.out_features == 36


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group": 0}, "centers, group and steps must be at least 1"),
        ({"decay": 1.5}, "decay from 0 to 1, not 4, 8, 5 and 1.5"),
        ({"qk_dim": 7}, "qk_dim must be a multiple of 3, the number of heads, not 7"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        aggregation(**arguments)
