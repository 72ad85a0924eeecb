"""Lightning attention against its definition as a matrix of weights."""

import pytest
import torch
import torch.nn.functional as F

from ops import Place, create_op
from ops.attention.lightning import slopes_of_heads

FORMS = ("all", "causal", "both_ways", "four_ways", "axial")
SECOND_OF_FOUR = Place(0, 1, 4)


def distances(order):
    """Return for each pair of tokens how many steps the second one comes before the first one in an order."""
    place = torch.tensor([order.index(token) for token in sorted(order)])
    return (place[:, None] - place[None]).double()


def build(form, place=SECOND_OF_FOUR, **arguments):
    """Return an op in float64 and a map of 3 x 4 tokens."""
    torch.manual_seed(0)
    op = create_op("lightning", 6, 3, place=place, form=form, **arguments).double()
    return op, torch.randn(2, 3, 4, 6, dtype=torch.float64)


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_attends_as_defined(form, decay):
    op, x = build(form, decay=decay)
    tokens = [(i, j) for i in range(3) for j in range(4)]
    in_rows, in_columns = distances(tokens), distances(sorted(tokens, key=lambda token: token[::-1]))
    same_row, same_column = (torch.tensor([[a[axis] == b[axis] for b in tokens] for a in tokens]) for axis in (0, 1))
    q, k, v = (F.silu(x.flatten(1, 2) @ w.weight.T).unflatten(-1, (3, 2)) for w in (op.q_proj, op.k_proj, op.v_proj))
    # For three heads: the slopes of two heads, then the first one of four heads
    slopes = torch.tensor([2**-4, 2**-8, 2**-2], dtype=torch.float64) * (1 - 1 / 3 + 1e-5) * decay
    out = torch.zeros_like(v)
    for h, slope in enumerate(slopes):
        scores = q[:, :, h] @ k[:, :, h].transpose(1, 2)
        weights = {
            "all": torch.ones_like(in_rows),
            "causal": (in_rows >= 0) * (-slope * in_rows.abs()).exp(),
            "both_ways": (-slope * in_rows.abs()).exp(),
            "four_ways": (-slope * in_rows.abs()).exp() + (-slope * in_columns.abs()).exp(),
            "axial": same_row * (-slope * in_rows.abs()).exp(),
        }[form]
        values = v[:, :, h]
        if form == "axial":
            values = (scores * (same_column * (-slope * in_columns.abs()).exp())) @ values
        out[:, :, h] = (scores * weights) @ values
    out = F.layer_norm(out.flatten(2), (6,), op.norm.weight, op.norm.bias)
    gate = (x.flatten(1, 2) @ op.output_gate[0].weight.T @ op.output_gate[1].weight.T).sigmoid()
    expected = ((out * gate) @ op.proj.weight.T).view_as(x)
    assert torch.allclose(op(x), expected, atol=1e-10)


def test_without_decay_both_ways_are_all_tokens():
    op, x = build("both_ways", decay=False)
    other, _ = build("all")
    other.load_state_dict(op.state_dict())
    assert torch.allclose(op(x), other(x), atol=1e-10)


def test_causal_form_sees_no_later_token():
    op, x = build("causal")
    changed = x.clone()
    changed[:, 2, 1] += 1
    assert (op(changed) == op(x)).flatten(1, 2).all(-1).tolist() == [[True] * 9 + [False] * 3] * 2


def test_decay_weakens_from_block_to_block():
    decays = [build("causal", Place(0, block, 3))[0].log_decay[0].item() for block in range(3)]
    assert decays == pytest.approx([-1.00001 * 2**-4, -0.50001 * 2**-4, -1e-5 * 2**-4])
    assert build("causal", Place())[0].log_decay[0].item() == pytest.approx(-1.00001 * 2**-4)


@pytest.mark.parametrize("form", FORMS)
def test_large_sums_stay_in_the_range_of_half_precision(form):
    op, x = build(form)
    large = 300 * x.abs()
    q, k, v = (F.silu(project(large)) for project in (op.q_proj, op.k_proj, op.v_proj))
    assert op.attend(q, k, v).abs().max() > 65504
    with torch.autocast("cpu", torch.float16):
        assert op.float()(large.float()).isfinite().all()


def test_slopes_of_heads():
    assert slopes_of_heads(8) == [2.0**-t for t in range(1, 9)]
    assert slopes_of_heads(6) == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form must be one of all, causal, both_ways, four_ways, axial, not 'snake'"):
        create_op("lightning", 8, 2, form="snake")
