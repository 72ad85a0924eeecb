"""Running softmax means against the softmax over the tokens before each token."""

import pytest
import torch

from ops import create_op
from ops.attention.recurrent_softmax import DIRECTIONS, running_mean

SIZE = (3, 5)
TOKENS = [(i, j) for i in range(3) for j in range(5)]
# True if the first token is before the second one or is the same, for each direction
BEFORE = {
    "lines": (
        lambda a, b: a[0] == b[0] and a[1] <= b[1],
        lambda a, b: a[0] == b[0] and a[1] >= b[1],
        lambda a, b: a[1] == b[1] and a[0] <= b[0],
        lambda a, b: a[1] == b[1] and a[0] >= b[0],
    ),
    "raster": (lambda a, b: a <= b, lambda a, b: a >= b),
    "quadrants": (
        lambda a, b: a[0] <= b[0] and a[1] <= b[1],
        lambda a, b: a[0] <= b[0] and a[1] >= b[1],
        lambda a, b: a[0] >= b[0] and a[1] <= b[1],
        lambda a, b: a[0] >= b[0] and a[1] >= b[1],
    ),
    "causal": (lambda a, b: a <= b,),
}


def softmax_mean(scores, v, before):
    """Average values (H, W, D) by a softmax of scores (H, W) over the tokens before each one."""
    out = torch.zeros_like(v)
    for token in TOKENS:
        seen = [other for other in TOKENS if before(other, token)]
        weights = torch.stack([scores[other] for other in seen]).softmax(0)
        out[token] = weights @ torch.stack([v[other] for other in seen])
    return out


@pytest.mark.parametrize("large", [1.0, 50.0])
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_running_means_equal_the_softmax(directions, large):
    torch.manual_seed(0)
    scores = large * torch.randn(*SIZE, dtype=torch.float64)
    v = torch.randn(*SIZE, 2, dtype=torch.float64)
    for way, before in zip(DIRECTIONS[directions], BEFORE[directions], strict=True):
        assert torch.allclose(running_mean(scores[..., None], v, *way), softmax_mean(scores, v, before), atol=1e-14)


def test_running_means_have_their_gradients():
    torch.manual_seed(0)
    scores = torch.randn(2, *SIZE, 1, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, *SIZE, 2, dtype=torch.float64, requires_grad=True)
    for ways in DIRECTIONS.values():
        assert torch.autograd.gradcheck(
            lambda s, v, way=ways[-1]: running_mean(s, v, *way), (scores, v), fast_mode=True
        )


@pytest.mark.parametrize(("directions", "join"), [(d, j) for d in DIRECTIONS for j in ("mean", "heads")])
def test_attends_as_defined(directions, join):
    torch.manual_seed(0)
    op = create_op("recurrent_softmax", 15, 5, directions=directions, join=join, scale=0.7).double()
    torch.nn.init.normal_(op.q)
    x = torch.randn(1, *SIZE, 15, dtype=torch.float64)
    k, v = (t.unflatten(-1, (5, 3)) for t in (x[0] @ op.kv.weight.T).chunk(2, dim=-1))
    ways = BEFORE[directions]
    shares = [share.tolist() for share in torch.arange(5).tensor_split(len(ways))]
    out = torch.zeros_like(v)
    for h in range(5):
        for d, before in enumerate(ways):
            if join == "mean":
                scores = 0.7 * k[..., h, :] @ op.q[d, h]
                out[..., h, :] += softmax_mean(scores, v[..., h, :], before) / len(ways)
            elif h in shares[d]:
                out[..., h, :] = softmax_mean(0.7 * k[..., h, :] @ op.q[0, h], v[..., h, :], before)
    assert torch.allclose(op(x)[0], op.proj(out.flatten(2)), atol=1e-12)


def test_without_queries_it_is_a_running_mean():
    op = create_op("recurrent_softmax", 4, 2, directions="causal").double()
    torch.nn.init.zeros_(op.q)
    x = torch.randn(1, *SIZE, 4, dtype=torch.float64)
    v = op.kv(x).flatten(1, 2)[..., 4:]
    means = v.cumsum(1) / torch.arange(1, 16)[:, None]
    assert torch.allclose(op(x).flatten(1, 2), op.proj(means), atol=1e-12)


def test_order_of_the_past_does_not_matter():
    torch.manual_seed(0)
    op = create_op("recurrent_softmax", 4, 2, directions="causal").double()
    x = torch.randn(1, 1, 12, 4, dtype=torch.float64)
    permuted = torch.cat([x[:, :, torch.randperm(8)], x[:, :, 8:]], dim=2)
    assert torch.allclose(op(permuted)[:, :, 7:], op(x)[:, :, 7:], atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"directions": "snake"}, "directions must be one of lines, raster, quadrants, causal, not 'snake'"),
        ({"join": "sum"}, "join must be 'mean' or 'heads', not 'sum'"),
        ({"join": "heads"}, "join 'heads' needs at least 4 heads, not 2"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_op("recurrent_softmax", 8, 2, **arguments)
