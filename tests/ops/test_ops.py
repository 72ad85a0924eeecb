"""Properties of every registered op, and the definitions of shifted windows and of bi-level routing.

Tests with the fixture `name` run for every op in `ops/attention/`, a new one included.
"""

import contextlib
import copy
import importlib
import inspect
import math

import pytest
import torch

from ops import Place, create_op, list_ops
from ops.losses import Losses, loss_weights
from ops.registry import _OPS, FAMILIES, family_of
from retinue.utils.arithmetic import ceil_div, round_up

SIZES = ((1, 1), (3, 20), (7, 7), (13, 9), (16, 16))
# Arguments that change the shape of an op's output
OUTPUT_ARGUMENTS = ("out_dim", "conv_stride", "conv_padding")
PLACES = (Place(0, 0, 2, 4), Place(1, 1, 2, 8), Place(3, 1, 2, 32))


@pytest.fixture(params=list_ops())
def name(request):
    return request.param


def run(op, x):
    """Return the op's output; random choices are the same in every call."""
    torch.manual_seed(1)
    return op(x)


def settled(op, x):
    """Return an op that uses statistics of the batch in training in evaluation, after a step; others as they are."""
    if not getattr(op, "batch_statistics", False):
        return op
    op(x).sum().backward()
    return op.eval()


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_bare_name_keeps_any_shape_and_trains_every_parameter(name, place):
    torch.manual_seed(0)
    op = create_op(name, dim=16, num_heads=2, place=place)
    for size in SIZES:
        x = torch.randn(2, *size, 16, requires_grad=True)
        losses = Losses()
        out = op(x, losses=losses) if loss_weights(op) else op(x)
        assert out.shape == x.shape
        assert out.isfinite().all()
    total = out.square().sum() + sum(losses.means().values())
    grads = torch.autograd.grad(total, (x, *op.parameters()), allow_unused=True)
    for key, grad in zip(("input", *(key for key, _ in op.named_parameters())), grads, strict=True):
        assert grad is not None and grad.isfinite().all() and grad.abs().sum() > 0, key


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_float32_and_bfloat16_follow_float64(name, place):
    torch.manual_seed(0)
    op = create_op(name, dim=16, num_heads=2, place=place)
    x = torch.randn(1, 13, 9, 16)
    expected = run(copy.deepcopy(op).double(), x.double())
    assert (run(op, x) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert op.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert op.float()(x).isfinite().all()


def test_gradients_equal_finite_differences(name):
    torch.manual_seed(0)
    op = create_op(name, dim=12, num_heads=2, place=PLACES[1]).double()
    x = torch.randn(1, 9, 6, 12, dtype=torch.float64, requires_grad=True)
    op = settled(op, x)
    assert torch.autograd.gradcheck(lambda x: run(op, x), x, fast_mode=True)


def test_does_not_mix_images(name):
    torch.manual_seed(0)
    op = create_op(name, dim=16, num_heads=2, place=PLACES[1])
    x = torch.randn(2, 13, 9, 16)
    op = settled(op, x)
    assert torch.allclose(run(op, x)[1:], run(op, x[1:]), atol=1e-6)


def test_the_file_has_the_name_of_its_op(name):
    assert _OPS[name] is getattr(importlib.import_module(f"ops.attention.{name}"), _OPS[name].__name__)


def test_every_op_has_a_family(name):
    assert family_of(name) in FAMILIES


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("size", [(8, 12), (9, 14), (3, 10), (4, 4), (2, 3)], ids=str)
def test_window_attends_as_defined(size, block):
    """Compute each token's attention to its shifted window on the padded map; padded tokens are attended to."""
    torch.manual_seed(0)
    op = create_op("window", dim=4, num_heads=1, place=Place(block=block), window=4).double()
    window = tuple(min(4, side) for side in size)
    shift = tuple(2 if block and side > 4 else 0 for side in size)
    padded = tuple(round_up(side, w) for side, w in zip(size, window, strict=True))
    x = torch.randn(1, *size, 4, dtype=torch.float64)
    padded_x = torch.zeros(1, *padded, 4, dtype=torch.float64)
    padded_x[:, : size[0], : size[1]] = x
    q, k, v = op.qkv(padded_x)[0].chunk(3, -1)

    def window_of(token):
        """Return the token's window, and the side of the map where the shift wraps around."""
        shifted = [(t - s) % n for t, s, n in zip(token, shift, padded, strict=True)]
        wrapped = [t < s for t, s in zip(token, shift, strict=True)]
        return tuple(t // w for t, w in zip(shifted, window, strict=True)), tuple(wrapped)

    tokens = [(i, j) for i in range(padded[0]) for j in range(padded[1])]
    out = torch.zeros_like(x)
    for i, j in ((i, j) for i, j in tokens if i < size[0] and j < size[1]):
        keys = [t for t in tokens if window_of(t) == window_of((i, j))]
        bias = [op.relative_position_bias_table[(i - a + 3) * 7 + (j - b + 3), 0] for a, b in keys]
        scores = torch.stack([q[i, j] @ k[a, b] / math.sqrt(4) + c for (a, b), c in zip(keys, bias, strict=True)])
        out[0, i, j] = op.proj(scores.softmax(0) @ torch.stack([v[a, b] for a, b in keys]))
    assert torch.allclose(op(x), out, atol=1e-12)


@pytest.mark.parametrize("form", ["legacy", "nchw"])
@pytest.mark.parametrize("size", [(8, 12), (9, 14), (3, 10)], ids=str)
def test_bilevel_routing_attends_as_defined(size, form):
    torch.manual_seed(0)
    n_win, topk = 4, 3
    op = create_op("bilevel_routing", dim=6, num_heads=2, n_win=n_win, topk=topk, lepe_kernel=3, form=form).double()
    x = torch.randn(1, *size, 6, dtype=torch.float64)
    if form == "legacy":
        # Zeros are added before the projection and count in the means
        side = tuple(ceil_div(n, n_win) for n in size)
        padded = tuple(n_win * s for s in side)
        padded_x = torch.zeros(1, *padded, 6, dtype=torch.float64)
        padded_x[:, : size[0], : size[1]] = x
        q, k, v = op.qkv(padded_x)[0].chunk(3, -1)
        counted = torch.ones(padded, dtype=torch.bool)
        lepe = op.lepe(v.permute(2, 0, 1))
    else:
        # Zeros are added after the projection and do not count in the means
        side = tuple(max(n // n_win, 1) for n in size)
        padded = tuple(round_up(n, s) for n, s in zip(size, side, strict=True))
        q, k, v = (torch.zeros(*padded, 6, dtype=torch.float64) for _ in range(3))
        for t, projected in zip((q, k, v), op.qkv(x)[0].chunk(3, -1), strict=True):
            t[: size[0], : size[1]] = projected
        counted = torch.zeros(padded, dtype=torch.bool)
        counted[: size[0], : size[1]] = True
        lepe = op.lepe(v[: size[0], : size[1]].permute(2, 0, 1))

    tokens = [(i, j) for i in range(padded[0]) for j in range(padded[1])]
    windows: dict[tuple[int, int], list] = {}
    for i, j in tokens:
        windows.setdefault((i // side[0], j // side[1]), []).append((i, j))
    means = {}
    for window, members in windows.items():
        counted_members = [token for token in members if counted[token]]
        means[window] = tuple(torch.stack([t[token] for token in counted_members]).mean(0) for t in (q, k))
    out = torch.zeros_like(x)
    for window, members in windows.items():
        chosen = sorted(windows, key=lambda other: -(means[window][0] @ means[other][1]).item())[:topk]
        keys = [token for other in chosen for token in windows[other]]
        chosen_k, chosen_v = (torch.stack([t[token] for token in keys]) for t in (k, v))
        for i, j in ((i, j) for i, j in members if i < size[0] and j < size[1]):
            heads = []
            for h in (slice(0, 3), slice(3, 6)):
                # The scale is that of all 6 channels, not of one head's 3
                weights = (chosen_k[:, h] @ q[i, j, h] / math.sqrt(6)).softmax(0)
                heads.append(weights @ chosen_v[:, h])
            out[0, i, j] = op.proj(torch.cat(heads) + lepe[:, i, j])
    assert torch.allclose(op(x), out, atol=1e-12)


def test_window_shifts_in_every_second_block():
    shifts = [create_op("window", 8, 2, place=Place(block=block)).shift for block in range(4)]
    assert shifts == [0, 3, 0, 3]


def test_each_stage_routes_to_four_times_as_many_windows():
    topk = [create_op("bilevel_routing", 8, 2, place=Place(stage)).topk for stage in range(4)]
    assert topk == [1, 4, 16, 49]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "bilevel_routing", "topk": 50}, "topk must be from 1 to n_win² = 49, not 50"),
        ({"name": "bilevel_routing", "form": "nhwc"}, "form must be 'legacy' or 'nchw'"),
        ({"name": "full", "lepe_of": "keys"}, "lepe_of must be 'input' or 'values'"),
        ({"name": "window", "window": 4, "shift": 4}, "shift from 0 to window - 1, not 4 and 4"),
    ],
)
def test_wrong_values_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        create_op(spec, 8, 2)


def test_negative_zero_and_even_numbers_are_refused_or_work(name):
    for argument, parameter in inspect.signature(_OPS[name]).parameters.items():
        if parameter.annotation not in (int, int | None) or argument in ("dim", "num_heads", *OUTPUT_ARGUMENTS):
            continue
        for value in (-1, 0, 2):
            with contextlib.suppress(ValueError):
                op = create_op({"name": name, argument: value}, 16, 2, place=PLACES[1])
                assert op(torch.randn(1, 13, 9, 16)).shape == (1, 13, 9, 16), (argument, value)


def test_compiles_as_one_graph_unless_declared_otherwise(name):
    torch.manual_seed(0)
    op = create_op(name, dim=16, num_heads=2, place=PLACES[1])
    x = torch.randn(2, 13, 9, 16)
    compiled = torch.compile(op, backend="eager", fullgraph=getattr(op, "fullgraph", True))
    assert torch.allclose(run(compiled, x), run(op, x), atol=1e-6)
