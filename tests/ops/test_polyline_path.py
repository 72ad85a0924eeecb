"""Polyline path masked attention equals its definition, token by token."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from ops import Place, create_op


def rotated(head: torch.Tensor, index: int) -> torch.Tensor:
    """Return a head's channels, in pairs as complex numbers, rotated by the token's index in the map."""
    frequency = 10000 ** -torch.linspace(0, 1, len(head) // 2, dtype=torch.float64)
    return torch.view_as_complex(head.view(-1, 2)) * torch.polar(torch.ones_like(frequency), index * frequency)


@pytest.mark.parametrize("form", ["chunk", "whole"])
def test_attends_as_defined(form):
    torch.manual_seed(0)
    H, W, dim, heads = 3, 4, 8, 2
    op = create_op("polyline_path", dim, heads, form=form).double()
    with torch.no_grad():
        # Steps longer than those at the start of training
        op.step_bias.uniform_(-1, 1)
    x = torch.randn(1, H, W, dim, dtype=torch.float64)
    tokens = list(itertools.product(range(H), range(W)))
    q, k, v = (proj(x)[0].unflatten(-1, (heads, -1)) for proj in (op.q_proj, op.k_proj, op.v_proj))
    steps = F.softplus(op.step(x[0].unflatten(-1, (heads, -1))) + op.step_bias[:, None]) * op.log_scale.exp()[:, None]

    def between(a: int, b: int) -> slice:
        return slice(min(a, b) + 1, max(a, b) + 1)

    def score(query, key, h):
        rotated_q, rotated_k = (rotated(t[i, j, h], i * W + j) for t, (i, j) in ((q, query), (k, key)))
        return (rotated_q * rotated_k.conj()).real.sum() / math.sqrt(dim // heads)

    def path(query, key, h, along):
        """Return the length of the path that begins along the row (`along` = 0) or along the column (1)."""
        row, column = (query[0], key[1]) if along == 0 else (key[0], query[1])
        return steps[row, between(query[1], key[1]), h, 0].sum() + steps[between(query[0], key[0]), column, h, 1].sum()

    def weights(h, keys_of, along):
        table = torch.zeros(len(tokens), len(tokens), dtype=torch.float64)
        for n, query in enumerate(tokens):
            keys = [m for m, key in enumerate(tokens) if keys_of(query, key)]
            scores = [score(query, tokens[m], h) - path(query, tokens[m], h, along) for m in keys]
            table[n, keys] = torch.stack(scores).softmax(0)
        return table

    mixed = torch.zeros(H * W, heads, dim // heads, dtype=torch.float64)
    for h in range(heads):
        if form == "whole":
            table = weights(h, lambda *_: True, 0) + weights(h, lambda *_: True, 1)
        else:
            rows = weights(h, lambda query, key: query[0] == key[0], 0)
            columns = weights(h, lambda query, key: query[1] == key[1], 1)
            table = rows @ columns + columns @ rows
        mixed[:, h] = table @ v.flatten(0, 1)[:, h] / 2
    lepe = op.lepe(op.v_proj(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    # The op computes angles in float32
    assert torch.allclose(op(x), op.proj(mixed.view(1, H, W, dim) + lepe), atol=1e-6)


def test_shallow_stages_attend_along_rows_and_columns():
    forms = [create_op("polyline_path", 8, 2, place=Place(stage)).form for stage in range(4)]
    assert forms == ["chunk", "chunk", "whole", "whole"]


def test_heads_may_have_an_odd_number_of_channels():
    op = create_op("polyline_path", 6, 2)
    assert op(torch.randn(1, 5, 4, 6)).shape == (1, 5, 4, 6)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form must be 'chunk' or 'whole', not 'rows'"):
        create_op("polyline_path", 8, 2, form="rows")
