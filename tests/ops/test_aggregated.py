"""Pixel-focused, aggregated and length-scaled cosine attention equal their definitions, token by token."""

import math

import pytest
import torch
import torch.nn.functional as F

from ops import Place, create_op


def build(name, **arguments):
    """Return the op with random values in all parameters."""
    torch.manual_seed(0)
    op = create_op(name, dim=6, num_heads=2, place=Place(stride=32), **arguments).double()
    for parameter in op.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return op


def position_bias(op, offset, head):
    """Return the bias of a head at an offset (rows, columns), where the map of 224 pixels is 6 tokens across."""
    scaled = [8 * o / 6 for o in offset]
    logs = [math.copysign(math.log2(1 + abs(s)) / math.log2(8), s) for s in scaled]
    hidden = op.cpb.fc1(torch.tensor(logs, dtype=torch.float64)).relu()
    return op.cpb.fc2(hidden)[head]


def unit(x):
    return x / x.norm()


def pooled(op, x, sides):
    """Yield the row, the column and the features of each pooled token, the mean of the tokens in its bin."""
    features = F.gelu(F.linear(x, op.sr.weight[:, :, 0, 0], op.sr.bias))
    bins = [
        [range(i * n // p, math.ceil((i + 1) * n / p)) for i in range(p)]
        for n, p in zip(x.shape[:2], sides, strict=True)
    ]
    for rows in bins[0]:
        for columns in bins[1]:
            mean = torch.stack([features[i, j] for i in rows for j in columns]).mean(0)
            yield (rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2, op.norm(mean)


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 3)], ids=str)
@pytest.mark.parametrize("name", ["pixel_focused", "aggregated"])
def test_attends_to_neighbours_and_pooled_tokens_as_defined(name, size):
    op, is_aggregated = build(name, pool=2, window=3), name == "aggregated"
    x = torch.randn(*size, 6, dtype=torch.float64)
    far = list(pooled(op, x, [max(n // 2, 1) for n in size]))
    out = torch.zeros_like(x)
    for i, j in ((i, j) for i in range(size[0]) for j in range(size[1])):
        near = [(a, b) for a in range(i - 1, i + 2) for b in range(j - 1, j + 2)]
        on_map = [p for p, (a, b) in enumerate(near) if 0 <= a < size[0] and 0 <= b < size[1]]
        tokens = [x[near[p]] for p in on_map] + [token for *_, token in far]
        heads = []
        for h in range(2):
            part = slice(3 * h, 3 * h + 3)
            q, keys = op.q(x[i, j])[part], [op.kv(token)[:6][part] for token in tokens]
            values = torch.stack([op.kv(token)[6:][part] for token in tokens])
            bias = [op.relative_pos_bias_local[h, p] for p in on_map]
            bias += [position_bias(op, (i - a, j - b), h) for a, b, _ in far]
            if is_aggregated:
                scale = F.softplus(op.temperature[h, 0, 0]) * math.log(len(tokens))
                scores = [scale * (unit(q) + op.query_embedding[h, 0]) @ unit(key) for key in keys]
            else:
                scores = [q @ key / math.sqrt(3) for key in keys]
            weights = torch.stack([s + b for s, b in zip(scores, bias, strict=True)]).softmax(0)
            mixed = weights @ values
            if is_aggregated:
                learned = unit(q) @ op.learnable_tokens[h] + op.learnable_bias[h, 0]
                mixed = mixed + learned[on_map] @ values[: len(on_map)]
            heads.append(mixed)
        out[i, j] = op.proj(torch.cat(heads))
    assert torch.allclose(op(x.unsqueeze(0))[0], out, atol=1e-12)


@pytest.mark.parametrize("size", [(2, 3), (1, 1)], ids=str)
def test_length_scaled_cosine_attends_as_defined(size):
    op, x = build("length_scaled_cosine"), torch.randn(*size, 6, dtype=torch.float64)
    tokens = [(i, j) for i in range(size[0]) for j in range(size[1])]
    out = torch.zeros_like(x)
    for i, j in tokens:
        heads = []
        for h in range(2):
            q, k, v = ([t[3 * h : 3 * h + 3] for t in s.reshape(-1, 6)] for s in op.qkv(x).chunk(3, dim=-1))
            scale = F.softplus(op.temperature[h, 0, 0]) * math.log(len(tokens))
            query = scale * (unit(q[i * size[1] + j]) + op.query_embedding[h, 0])
            bias = [position_bias(op, (i - a, j - b), h) for a, b in tokens]
            scores = torch.stack([query @ unit(key) + b for key, b in zip(k, bias, strict=True)])
            heads.append(scores.softmax(0) @ torch.stack(v))
        out[i, j] = op.proj(torch.cat(heads))
    assert torch.allclose(op(x.unsqueeze(0))[0], out, atol=1e-12)


@pytest.mark.parametrize("name", ["pixel_focused", "length_scaled_cosine"])
def test_bias_size_changes_only_maps_of_another_size(name):
    computed, interpolated = build(name), build(name, bias_size=224)
    x = torch.randn(1, 7, 7, 6, dtype=torch.float64)
    assert torch.equal(computed(x), interpolated(x))
    assert not torch.allclose(computed(x[:, :5]), interpolated(x[:, :5]))


def test_window_must_be_odd():
    with pytest.raises(ValueError, match="window must be odd, not 2"):
        create_op({"name": "aggregated", "window": 2}, 8, 2)
