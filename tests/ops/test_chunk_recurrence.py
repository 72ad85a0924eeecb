"""The chunked recurrence of RAT against loops over the tokens, and its special cases."""

import pytest
import torch

from ops import Place, create_op


def build(x_size=(4, 6), **arguments):
    """Return an op of 4 heads and 2 groups in float64, and a map."""
    torch.manual_seed(0)
    op = create_op("chunk_recurrence", 12, 4, **arguments).double()
    for parameter in op.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return op, torch.randn(1, *x_size, 12, dtype=torch.float64)


def rotated(x, chunk):
    """Rotate a head of 3 channels: channels 0 and 1 by the chunk's index, as their wavelength is the first one."""
    angle = torch.tensor(float(chunk), dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([x[0] * cos - x[1] * sin, x[1] * cos + x[0] * sin, x[2]])


def loop(op, tokens, length, causal, backwards=False):
    """Compute the op without its norm for tokens (N, 12) one by one, in whole chunks if backwards."""
    if backwards:
        tokens = tokens.flip(0)
    z, v, f, q, k = (tokens @ op.in_proj.weight.T).split((12, 12, 12, 6, 6), dim=-1)
    gates = (f + op.gate_bias).sigmoid()
    q, k = torch.cat([q, q], dim=-1), torch.cat([k, k], dim=-1)
    keys, values, ends = [], [], {}
    for t in range(len(tokens)):
        start = t % length == 0
        keys.append((1 - gates[t]) * k[t] + (0 if start else gates[t] * keys[-1]))
        values.append((1 - gates[t]) * v[t] + (0 if start else gates[t] * values[-1]))
        ends[t // length] = t
    out = torch.zeros_like(tokens)
    for t in range(len(tokens)):
        chunk = t // length
        entries = [(c, end) for c, end in ends.items() if c < chunk or (c > chunk and not causal)] + [(chunk, t)]
        angle = (lambda c: len(tokens) // length - 1 - c) if backwards else (lambda c: c)
        for h in (slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12)):
            query = rotated(q[t, h], angle(chunk))
            scores = torch.stack([query @ rotated(keys[s][h], angle(c)) for c, s in entries]) * 3**-0.5
            out[t, h] = scores.softmax(0) @ torch.stack([values[s][h] for _, s in entries])
    return out.flip(0) if backwards else out, z.sigmoid()


@pytest.mark.parametrize("length", [1, 4, 5, 6, 24, 30])
def test_mixes_as_defined(length):
    """24 tokens in chunks of 5 are not whole chunks, and 30 are more than there are."""
    op, x = build(length=length, causal=True)
    out, gate = loop(op, x.view(24, 12), length, causal=True)
    assert torch.allclose(op(x).view(24, 12), (gate * out) @ op.proj.weight.T, atol=1e-12)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("join", ["mean", "heads"])
def test_runs_in_both_directions(join, columns):
    op, x = build(columns=columns, join=join)
    tokens = (x.transpose(1, 2) if columns else x).reshape(24, 12)
    length = 4 if columns else 6
    forwards, gate = loop(op, tokens, length, causal=False)
    backwards = loop(op, tokens, length, causal=False, backwards=True)[0]
    mean = (forwards + backwards) / 2
    out = mean if join == "mean" else torch.cat([forwards[:, :6], backwards[:, 6:]], dim=-1)
    out = ((gate * out) @ op.proj.weight.T).view(1, *((6, 4) if columns else (4, 6)), 12)
    assert torch.allclose(op(x), out.transpose(1, 2) if columns else out, atol=1e-12)


def test_causal_form_sees_no_later_token():
    op, x = build(causal=True)
    changed = x.clone()
    changed[:, 2, 1] += 1
    assert (op(changed) == op(x)).flatten(0, 2).all(-1).tolist() == [True] * 13 + [False] * 11


def test_mirrored_map_gives_the_mirrored_output():
    op, x = build()
    assert torch.allclose(op(x.flip(2)).flip(2), op(x), atol=1e-12)


def test_one_chunk_is_the_recurrence_alone():
    op, x = build(length=24, causal=True)
    z, v, f, _, _ = (x.view(24, 12) @ op.in_proj.weight.T).split(op.shares, dim=-1)
    gates, state, out = (f + op.gate_bias).sigmoid(), torch.zeros(12, dtype=torch.float64), []
    for t in range(24):
        state = gates[t] * state + (1 - gates[t]) * v[t]
        out.append(state)
    assert torch.allclose(op(x).view(24, 12), (z.sigmoid() * torch.stack(out)) @ op.proj.weight.T, atol=1e-12)


def test_blocks_alternate_between_rows_and_columns():
    assert [build(place=Place(block=block))[0].columns for block in range(3)] == [False, True, False]


def test_gates_begin_with_the_time_constants_of_a_chunk():
    torch.manual_seed(0)
    bias = create_op("chunk_recurrence", 1024, 4, place=Place(stride=16)).gate_bias.exp()
    assert bias.min() >= 1 and bias.max() <= 13 and abs(bias.mean() - 7) < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 3}, "groups must divide 4 heads"),
        ({"length": 0}, "length be at least 1"),
        ({"join": "sum"}, "join must be 'mean' or 'heads', not 'sum'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_op("chunk_recurrence", 12, 4, **arguments)
