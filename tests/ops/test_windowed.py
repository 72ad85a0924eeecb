"""Ops that take the tokens of a window or of the whole map for a set: definitions, special cases, windows."""

import math

import pytest
import torch
import torch.nn.functional as F

from ops import Place, create_op
from ops.attention.local_linear import local_linear
from ops.attention.softplus import sharpen, softplus_weights

X = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = X.flatten(1, 2)
NAMES = ("grouped_differential", "local_linear", "selective", "softplus")


def build(name, heads=2, **arguments):
    torch.manual_seed(0)
    op = create_op({"name": name, "window": 0, **arguments}, 8, heads).double()
    for parameter in op.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return op


def heads_of(op):
    """Return queries, keys and values (B, heads, N, D) of the tokens."""
    return (t.unflatten(-1, (op.num_heads, -1)).transpose(1, 2) for t in op.qkv(TOKENS).chunk(3, -1))


def plain_attention(op):
    """Return full attention with the weights of `op`."""
    full = create_op("full", 8, 2).double()
    full.qkv, full.proj = op.qkv, op.proj
    return full


@pytest.mark.parametrize("name", NAMES)
def test_windows_are_maps_of_their_own(name):
    op = build(name, window=2)
    whole = build(name)
    for window in [(slice(i, i + 2), slice(j, j + 2)) for i in (0, 2) for j in (0, 2)]:
        part = F.pad(X, (0, 0, 0, 0, 0, 1))[:, window[0], window[1]]
        shown = op(X)[:, window[0], window[1]]
        assert torch.allclose(shown, whole(part)[:, : shown.shape[1]], atol=1e-10)


def test_windows_are_the_default_of_large_maps_without_extra_tokens():
    windows = [create_op("selective", 8, 2, place=Place(stride=stride)).window for stride in (4, 8, 16, 32)]
    assert windows == [7, 7, 0, 0]
    assert create_op("selective", 8, 2, place=Place(extra=1)).window == 0
    with pytest.raises(
        ValueError, match="window must be at least 1, or 0 for the whole map and for extra tokens, not 7"
    ):
        create_op("selective", 8, 2, place=Place(extra=1), window=7)


@pytest.mark.parametrize("factor", ["layer", "token"])
@pytest.mark.parametrize(("heads", "ratio"), [(2, 2), (4, 2), (2, 1)])
def test_grouped_differential_attends_as_defined(heads, ratio, factor):
    op, D = build("grouped_differential", heads, ratio=ratio, factor=factor, layer=3), 4 // heads
    initial = 0.8 - 0.6 * math.exp(-0.6)
    assert op.q.out_features == (ratio + 1) * heads // ratio * D
    for x, actual in zip(TOKENS, op(X).flatten(1, 2), strict=True):
        q, k, v = op.q(x).view(12, -1, ratio + 1, D), op.k(x).view(12, -1, 2, D), op.v(x).view(12, -1, 2 * D)
        out = []
        for g in range(heads // ratio):
            if factor == "layer":
                (q1, k1), (q2, k2) = op.lambdas
                multiple = (q1 @ k1).exp() - (q2 @ k2).exp() + initial
            else:
                multiple = op.token_factor(x)[:, g, None].sigmoid()
            noise = (q[:, g, ratio] @ k[:, g, 1].T / D**0.5).softmax(-1)
            for a in range(ratio):
                signal = (q[:, g, a] @ k[:, g, 0].T / D**0.5).softmax(-1)
                head = (signal - multiple * noise) @ v[:, g]
                if factor == "layer":
                    size = (head.square().mean(-1, keepdim=True) + 1e-5).sqrt()
                    head = head / size * op.norm.weight * (1 - initial)
                out.append(head)
        assert torch.allclose(actual, op.proj(torch.cat(out, dim=-1)), atol=1e-12)


def test_grouped_differential_takes_defaults_that_fit():
    ratios = [create_op("grouped_differential", 24 * heads, heads).ratio for heads in (1, 2, 3, 5, 6, 12)]
    assert ratios == [1, 2, 3, 1, 3, 4]
    initial = [create_op("grouped_differential", 8, 2, place=Place(block=i)).initial_factor for i in (0, 100)]
    assert initial == pytest.approx([0.2, 0.8])


@pytest.mark.parametrize("scale_keys", [False, True])
def test_selective_attends_as_defined(scale_keys):
    op = build("selective", scale_keys=scale_keys)
    q, k, v = heads_of(op)

    def scale(module, t, h):
        # Temperature of one token of one head
        return math.tanh((t @ module.weight[h, :, 0]).item()) + 1 + module.alpha[h].sigmoid().item() * math.log(12)

    for b, i in ((b, i) for b in range(2) for i in range(12)):
        out = []
        for h in range(2):
            scores = []
            for j in range(12):
                key = k[b, h, j] * (scale(op.k_scale, k[b, h, j], h) if scale_keys else 1)
                scores.append(scale(op.q_scale, q[b, h, i], h) * (q[b, h, i] @ key) / 2)
            weights = torch.stack(scores).softmax(0)
            out.append(sum(weights[j] * scale(op.v_scale, v[b, h, j], h) * v[b, h, j] for j in range(12)))
        assert torch.allclose(op(X).flatten(1, 2)[b, i], op.proj(torch.cat(out)), atol=1e-12)


def test_selective_with_constant_scales_is_full_attention():
    op = build("selective")
    with torch.no_grad():
        for scale in (op.q_scale, op.v_scale):
            scale.weight.zero_()
            scale.alpha.fill_(-math.inf)
    assert torch.allclose(op(X), plain_attention(op)(X), atol=1e-12)


@pytest.mark.parametrize("learned", [False, True])
def test_softplus_attends_as_defined(learned):
    op = build("softplus", power=3, offset=0.9, learned=learned)
    if learned:
        torch.nn.init.constant_(op.power, 3.0)
        torch.nn.init.constant_(op.offset, 0.9)
    q, k, v = heads_of(op)
    for b, i in ((b, i) for b in range(2) for i in range(12)):
        out = []
        for h in range(2):
            cosines = F.cosine_similarity(q[b, h, i], k[b, h], dim=-1)
            weights = [math.log1p(math.exp(math.log(4) * math.log(12) * cosine)) for cosine in cosines.tolist()]
            sharpened = [max(12 * w / sum(weights) - 0.9, 0) ** 3 for w in weights]
            out.append(sum(w / sum(sharpened) * v[b, h, j] for j, w in enumerate(sharpened)))
        assert torch.allclose(op(X).flatten(1, 2)[b, i], op.proj(torch.cat(out)), atol=1e-12)


def test_softplus_weights_sum_to_one_and_are_finite():
    q, k = F.normalize(torch.randn(5, 7, 8), dim=-1), F.normalize(torch.randn(5, 9, 8), dim=-1)
    for weights in (softplus_weights(q, k), sharpen(softplus_weights(q, k), 15, 1)):
        assert torch.allclose(weights.sum(-1), torch.ones(5, 7))
    assert torch.allclose(sharpen(softplus_weights(q, k), 1, 0), softplus_weights(q, k))
    # Equal keys have no excess over uniform weights
    uniform = torch.full((1, 4), 0.25, requires_grad=True)
    sharpened = sharpen(uniform, 15, 1)
    assert torch.equal(sharpened, uniform)
    sharpened.sum().backward()
    assert uniform.grad is not None and uniform.grad.isfinite().all()


def test_local_linear_solves_weighted_least_squares():
    """Fit v ≈ b + A (k - q) with a penalty on A alone; the output is b."""
    q, k, v = torch.randn(3, 5, 4, dtype=torch.float64).unbind(0)
    ridge = 0.3
    out = local_linear(q, k, v, ridge)
    for i in range(5):
        weights = (k @ q[i] / 2).softmax(0)
        offsets = k - q[i]
        penalty = ridge * (weights[:, None] * offsets.square()).sum() / 4
        inputs = torch.cat([torch.ones(5, 1, dtype=torch.float64), offsets], dim=1)
        penalties = torch.diag(torch.cat([torch.zeros(1, dtype=torch.float64), penalty.expand(4)]))
        normal = inputs.T @ (weights[:, None] * inputs) + penalties
        assert torch.allclose(torch.linalg.solve(normal, inputs.T @ (weights[:, None] * v))[0], out[i], atol=1e-10)


def test_local_linear_goes_from_softmax_attention_to_exact_lines():
    op = build("local_linear")
    with torch.no_grad():
        op.ridge.fill_(1e9)
    assert torch.allclose(op(X), plain_attention(op)(X), atol=1e-7)
    # Values that are linear in the keys are found at any query with hardly any penalty
    q, k = torch.randn(2, 9, 4, dtype=torch.float64).unbind(0)
    matrix = torch.randn(4, 3, dtype=torch.float64)
    assert torch.allclose(local_linear(q, k, k @ matrix + 2, 1e-9), q @ matrix + 2, atol=1e-5)


def test_wrong_values_are_refused():
    for name, arguments, message in (
        ("grouped_differential", {"ratio": 3}, "ratio must be positive and a divisor of 2"),
        ("grouped_differential", {"factor": "head"}, "factor must be 'layer' or 'token', not 'head'"),
        ("grouped_differential", {"layer": 0}, "layer must be at least 1, not 0"),
        ("softplus", {"power": 0.5}, "power must be at least 1 and offset at least 0, not 0.5 and 1"),
        ("local_linear", {"ridge": 0.0}, "ridge must be above 0.001, not 0.0"),
        ("selective", {"window": -1}, "window must be at least 1, or 0 for the whole map"),
    ):
        with pytest.raises(ValueError, match=message):
            create_op({"name": name, **arguments}, 8, 2)
    with pytest.raises(ValueError, match="twice the number of heads, 4, must divide 6 channels"):
        create_op("grouped_differential", 6, 2)
