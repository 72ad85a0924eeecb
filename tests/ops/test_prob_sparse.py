"""ProbSparse attention: definition by loops, special cases, and its samples of keys."""

import math

import pytest
import torch

from ops import create_op
from ops.attention.prob_sparse import spread

X = torch.randn(2, 5, 7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def prob_sparse(**arguments):
    torch.manual_seed(0)
    return create_op("prob_sparse", 12, 3, **{"factor": 2, "lepe_kernel": 0, **arguments}).double()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"measure": "mean"}, {"causal": True}, {"causal": True, "mix": True}])
def test_attends_as_defined(arguments, shared):
    op, (N, u) = prob_sparse(**arguments), (35, 8)
    assert u == 2 * math.ceil(math.log(N))
    sample = torch.randint(N, (1 if shared else N, u))
    out = torch.zeros(2, 3, N, 4, dtype=torch.float64)
    for b, tokens in enumerate(X.flatten(1, 2)):
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            q, k, v = (layer(tokens)[:, part] for layer in (op.q, op.k, op.v))
            measures = []
            for i in range(N):
                scores = [(q[i] @ k[j]).item() for j in sample[0 if shared else i]]
                measures.append(max(scores) - sum(scores) / (u if "measure" in arguments else N))
            peaked = sorted(range(N), key=lambda i: -measures[i])[:u]
            for i in range(N):
                keys = slice(0, i + 1 if op.causal else N)
                if i in peaked:
                    out[b, h, i] = (k[keys] @ q[i] / 2).softmax(0) @ v[keys]
                else:
                    out[b, h, i] = v[keys].sum(0) if op.causal else v.mean(0)
    joined = out.reshape(2, N, 12) if op.mix else out.transpose(1, 2).reshape(2, N, 12)
    assert torch.allclose(op.attend(X, sample).flatten(1, 2), op.proj(joined), atol=1e-12)


def test_as_many_queries_as_tokens_are_full_attention_for_any_sample():
    op, full = prob_sparse(factor=9), create_op("full", 12, 3).double()
    full.proj = op.proj
    with torch.no_grad():
        full.qkv.weight.copy_(torch.cat([op.q.weight, op.k.weight, op.v.weight]))
        full.qkv.bias.copy_(torch.cat([op.q.bias, op.k.bias, op.v.bias]))
    assert torch.allclose(op(X), full(X), atol=1e-12) and torch.allclose(op.eval()(X), full(X), atol=1e-12)


def test_equal_values_come_out_and_most_tokens_get_the_mean():
    op = prob_sparse().eval()
    out = op(X).flatten(1, 2)
    mean = op.proj(op.v(X).mean((1, 2)))[:, None]
    # Each of three heads chooses eight tokens
    lazy = (out - mean).abs().amax(-1) < 1e-12
    assert all(35 - 24 <= n < 35 for n in lazy.sum(1))
    torch.nn.init.zeros_(op.v.weight)
    assert torch.allclose(op(X), op.proj(op.v.bias).expand_as(X), atol=1e-12)


def test_permuting_tokens_and_sample_permutes_the_output():
    op, order = prob_sparse().eval(), torch.randperm(35)
    sample = torch.randint(35, (35, 8))
    shuffled = X.flatten(1, 2)[:, order].view_as(X)
    moved = order.argsort()[sample[order]]
    expected = op.attend(X, sample).flatten(1, 2)[:, order]
    assert torch.allclose(op.attend(shuffled, moved).flatten(1, 2), expected, atol=1e-12)


def test_samples_follow_the_generator_in_training_and_are_fixed_in_evaluation():
    op, outputs = prob_sparse(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(op(X))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    op.eval()
    state = torch.get_rng_state()
    assert torch.equal(op(X), op(X)) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (5, 7), (14, 14), (56, 40)], ids=str)
def test_fixed_samples_are_spread_over_the_map(size):
    H, W = size
    for count in {1, min(7, H * W), min(45, H * W), H * W}:
        tokens = spread(count, size).tolist()
        assert len(set(tokens)) == len(tokens) == count and 0 <= min(tokens) <= max(tokens) < H * W
        # Every token is near one of the sample, on the scale of the cells
        rows, columns = zip(*(divmod(token, W) for token in tokens), strict=True)
        cell = math.sqrt(H * W / count)
        for row, column in ((0, 0), (0, W - 1), (H - 1, 0), (H - 1, W - 1), (H // 2, W // 2)):
            nearest = min(max(abs(row - r), abs(column - c)) for r, c in zip(rows, columns, strict=True))
            assert nearest <= 1.5 * cell or min(H, W) < cell


def test_extra_tokens_attend_to_all_tokens():
    op, extra = prob_sparse(factor=1).eval(), torch.randn(2, 2, 12, dtype=torch.float64)
    tokens = torch.cat([extra, X.flatten(1, 2)], dim=1)
    q, k, v = (layer(tokens).unflatten(-1, (3, 4)).transpose(1, 2) for layer in (op.q, op.k, op.v))
    expected = (q[:, :, :2] @ k.transpose(-2, -1) / 2).softmax(-1) @ v
    assert torch.allclose(op(X, extra)[1], op.proj(expected.transpose(1, 2).flatten(2)), atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 0}, "factor must be at least 1, not 0"),
        ({"measure": "max"}, "measure must be 'sum' or 'mean', not 'max'"),
        ({"lepe_kernel": 4}, "lepe_kernel must be odd or 0, not 4"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        prob_sparse(**arguments)
