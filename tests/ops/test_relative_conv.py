"""Relative convolutional attention: its definitions as loops in one and two dimensions, and its special cases."""

import pytest
import torch
import torch.nn.functional as F

from ops import Place, create_op


def relative_conv(**arguments):
    torch.manual_seed(0)
    op = create_op("relative_conv", 8, 2, **arguments).double()
    for parameter in op.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return op


def image(H, W):
    return torch.randn(1, H, W, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("window", [3, None])
@pytest.mark.parametrize("size", [(5, 4), (2, 7)], ids=str)
def test_attends_on_a_map_as_defined(size, window):
    op, (H, W), x = relative_conv(window=window, place=Place(stride=56)), size, image(*size)
    h, w = size if window is None else (min(3, H), min(3, W))
    rows, columns = -(-H // h) * h, -(-W // w) * w
    tensors = []
    for layer, conv in ((op.query, op.query_conv), (op.key, op.key_conv), (op.value, op.value_conv)):
        heads = [conv(part.permute(0, 3, 1, 2))[0] for part in layer(x).chunk(2, dim=-1)]
        padded = torch.zeros(2, 4, rows, columns, dtype=torch.float64)
        padded[:, :, :H, :W] = torch.stack(heads)
        tensors.append(padded)
    q, k, v = tensors
    vectors, biases = (
        t.view(2 * op.side - 1, 2 * op.side - 1, 2, -1) for t in (op.key_pos_embeddings, op.key_pos_bias)
    )
    if window is None:
        # The tables are those of a map of 4 x 4 tokens
        vectors, biases = (
            F.interpolate(t.flatten(2).permute(2, 0, 1)[None], (2 * H - 1, 2 * W - 1), mode="bilinear")[0]
            .permute(1, 2, 0)
            .unflatten(-1, (2, -1))
            for t in (vectors, biases)
        )
    middle = (vectors.shape[0] // 2, vectors.shape[1] // 2)
    for i, j in ((i, j) for i in range(H) for j in range(W)):
        keys = [(a, b) for a in range(rows) for b in range(columns) if (a // h, b // w) == (i // h, j // w)]
        out = []
        for n in range(2):
            scores = []
            for a, b in keys:
                r = (middle[0] + a - i, middle[1] + b - j)
                relative = q[n, :, i, j] @ vectors[r][n] + biases[r][n, 0]
                scores.append(((q[n, :, i, j] + op.query_pos_bias[n]) @ k[n, :, a, b] + relative) / 2)
            weights = torch.stack(scores).softmax(0)
            out.append(sum(weight * v[n, :, a, b] for weight, (a, b) in zip(weights, keys, strict=True)))
        assert torch.allclose(op(x)[0, i, j], op.output(torch.cat(out)), atol=1e-12)


@pytest.mark.parametrize("reach", [5, 12])
def test_attends_in_a_sequence_as_defined(reach):
    """A distance of `reach` or more takes the first row of the tables."""
    op, memory, tokens = relative_conv(mode="causal1d", reach=reach), 3, image(2, 6).flatten(1, 2)[0]
    actual = op.attend_sequence(tokens[None], memory)[0]

    def convolved(layer, conv, source):
        t = layer(source).view(-1, 2, 4)
        zero = torch.zeros(2, 4, dtype=torch.float64)
        past = [[t[i - n] if i >= n else zero for n in range(3)] for i in range(len(t))]
        return [conv.bias + sum(conv.weight[:, 0, 2 - n] * p[n] for n in range(3)) for p in past]

    q = convolved(op.query, op.query_conv, tokens[memory:])
    k, v = convolved(op.key, op.key_conv, tokens), convolved(op.value, op.value_conv, tokens)
    for i in range(9):
        out = []
        for n in range(2):
            scores = []
            for j in range(i + memory + 1):
                r = max(reach - (i + memory - j), 0)
                relative = q[i][n] @ op.key_pos_embeddings[r, n] + op.key_pos_bias[r, n]
                scores.append(((q[i][n] + op.query_pos_bias[n]) @ k[j][n] + relative) / 2)
            weights = torch.stack(scores).softmax(0)
            out.append(sum(weight * v[j][n] for j, weight in enumerate(weights)))
        assert torch.allclose(actual[i], op.output(torch.cat(out)), atol=1e-12)


def test_later_tokens_do_not_change_a_causal_output():
    x, op = image(4, 5), relative_conv(mode="causal1d", reach=20)
    changed = x.clone()
    changed[0, 2, 1:] += 1
    difference = (op(x) - op(changed)).flatten(1, 2).abs().amax((0, 2))
    assert difference[:11].max() < 1e-12 and difference[11:].min() > 0


@pytest.mark.parametrize("mode", ["2d", "1d"])
def test_without_convolution_and_tables_it_is_full_attention(mode):
    op, x = relative_conv(mode=mode, window=None, reach=20), image(4, 5)
    full = create_op("full", 8, 2).double()
    with torch.no_grad():
        for conv in (op.query_conv, op.key_conv, op.value_conv):
            conv.bias.zero_()
            conv.weight.zero_()
            conv.weight[(slice(None), 0, -1) if mode == "1d" else (slice(None), 0, 1, 1)] = 1
        for table in (op.key_pos_embeddings, op.key_pos_bias, op.query_pos_bias):
            table.zero_()
        full.qkv.weight.copy_(torch.cat([op.query.weight, op.key.weight, op.value.weight]))
        full.qkv.bias.copy_(torch.cat([torch.zeros(16), op.value.bias]))
    full.proj = op.output
    assert torch.allclose(op(x), full(x), atol=1e-12)


def test_windows_do_not_depend_on_where_they_are():
    op, x = relative_conv(window=3, kernel=1), image(9, 6)
    assert torch.allclose(op(x.roll((3, 3), dims=(1, 2))), op(x).roll((3, 3), dims=(1, 2)), atol=1e-12)


def test_wrong_values_are_refused():
    for arguments, message in (
        ({"mode": "3d"}, "mode must be one of 2d, causal1d, 1d, not '3d'"),
        ({"kernel": 2}, "kernel must be at least 1, and odd in mode 2d, not 2"),
        ({"window": 0}, "window and reach must be at least 1, not 0 and 4096"),
    ):
        with pytest.raises(ValueError, match=message):
            relative_conv(**arguments)
