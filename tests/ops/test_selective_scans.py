"""Definitions and special cases of the ops that run selective scans over a map."""

import copy

import pytest
import torch
import torch.nn.functional as F

from ops import Place, create_op


def loop_scan(scan, u, orders, first=lambda k, previous, token: False):
    """Run the K selective scans of a `SelectiveScan` over a map token by token, with the way past the states.

    Args:
        scan: the module.
        u: map (H, W, E).
        orders: lists of tokens (row, column).
        first: tells whether the state starts anew between two tokens of order k.

    Returns:
        Maps (K, H, W, E).
    """
    out = torch.zeros(len(orders), *u.shape, dtype=u.dtype)
    A = -scan.A_logs.exp().unflatten(0, (len(orders), -1))
    for k, order in enumerate(orders):
        state, previous = torch.zeros_like(A[k]), None
        for token in order:
            low_rank, B, C = (scan.x_proj_weight[k] @ u[token]).split((scan.rank, scan.states, scan.states))
            delta = F.softplus(scan.dt_projs_weight[k] @ low_rank + scan.dt_projs_bias[k])
            if previous is not None and first(k, previous, token):
                state = torch.zeros_like(state)
            state = (delta[:, None] * A[k]).exp() * state + (delta * u[token])[:, None] * B
            out[k][token] = state @ C + scan.Ds.unflatten(0, (len(orders), -1))[k] * u[token]
            previous = token
    return out


def loop_ss2d(mixer, x, orders, **options):
    """Compute `SS2D` for a map (1, H, W, C) token by token."""
    u, z = mixer.in_proj(x).chunk(2, dim=-1)
    if mixer.conv2d is not None:
        u = F.conv2d(u.permute(0, 3, 1, 2), mixer.conv2d.weight, padding=1, groups=u.shape[-1]).permute(0, 2, 3, 1)
    y = loop_scan(mixer.scan, F.silu(u[0]), orders, **options).sum(0)
    return mixer.out_proj(mixer.out_norm(y) * F.silu(z))


def build(name, **arguments):
    """Return an op in float64 and a map of 5 x 7 tokens."""
    torch.manual_seed(0)
    op = create_op(name, 12, 2, **arguments).double()
    for parameter in op.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return op, torch.randn(1, 5, 7, 12, dtype=torch.float64)


def snakes(H, W):
    """Return the four orders of LaMamba."""
    rows = [(i, j if i % 2 == 0 else W - 1 - j) for i in range(H) for j in range(W)]
    columns = [(H - 1 - i if j % 2 == 0 else i, j) for j in range(W) for i in range(H)]
    return [rows, rows[::-1], columns, columns[::-1]]


def crosses(H, W):
    """Return the four orders of VMamba."""
    rows = [(i, j) for i in range(H) for j in range(W)]
    columns = [(i, j) for j in range(W) for i in range(H)]
    return [rows, columns, rows[::-1], columns[::-1]]


@pytest.mark.parametrize(("scan", "orders"), [("snake", snakes), ("cross", crosses)])
def test_local_scan_runs_and_attends_as_defined(scan, orders):
    op, x = build("local_scan", scan=scan, states=2, window=4, shift=1)
    scanned = loop_ss2d(op.scan, x, orders(5, 7))
    assert torch.allclose(op(x), scanned + op.attn(op.norm(x + scanned)), atol=1e-10)


@pytest.mark.parametrize("shift", [0, 1])
def test_windows_of_local_scan_at_the_border_hold_fewer_tokens(shift):
    """A window at the border gives what it would give as a map of its own."""
    op, x = build("local_scan", window=4, shift=shift)
    out = op.attn(x)
    op.attn.shift = 0
    window = slice(4 - 3 * shift, 8 - 3 * shift), slice(4 + shift, 8)
    assert torch.allclose(out[:, *window], op.attn(x[:, *window]), atol=1e-12)


def test_local_scan_shifts_windows_in_every_second_block():
    assert [create_op("local_scan", 8, 2, place=Place(block=block)).attn.shift for block in range(3)] == [0, 4, 0]


def test_a_cross_scan_turns_with_the_map():
    """With equal weights in all orders, turning the map by 180 degrees exchanges each order with its reverse."""
    op, x = build("local_scan", window=0, kernel=1, scan="cross")
    with torch.no_grad():
        for value in op.scan.scan.parameters():
            orders = value.unflatten(0, (4, -1))
            orders.copy_(orders[:1].expand_as(orders).clone())
    assert torch.allclose(op(x.flip(1, 2)).flip(1, 2), op(x), atol=1e-12)


def atrous_order(H, W, window, rate):
    """Return the tokens sorted by window, dilated grid and place in the grid."""

    def key(token):
        place, phase = [t // rate for t in token], [t % rate for t in token]
        return [p // window for p in place], phase, [p % window for p in place]

    return sorted(((i, j) for i in range(H) for j in range(W)), key=key)


@pytest.mark.parametrize("reset", [False, True])
def test_atrous_scan_runs_as_defined(reset):
    rates = (1, 2, 2, 3)
    op, x = build("atrous_scan", window=2, rate=list(rates), reset=reset, states=2)
    sizes = ((5, 7), (7, 5))
    orders = [atrous_order(*sizes[k % 2], 2, rate) for k, rate in enumerate(rates)]
    orders = [[token[::-1] for token in order] if k % 2 else order for k, order in enumerate(orders)]
    orders[2:] = [order[::-1] for order in orders[2:]]

    def first(k, previous, token):
        side = 2 * rates[k]
        return reset and [t // side for t in previous] != [t // side for t in token]

    assert torch.allclose(op(x), loop_ss2d(op.mixer, x, orders, first=first), atol=1e-10)


def test_atrous_scan_with_one_large_window_is_the_cross_scan():
    op, x = build("atrous_scan", window=7, rate=1)
    other, _ = build("local_scan", window=0, scan="cross")
    other.scan.load_state_dict(op.mixer.state_dict())
    assert torch.allclose(op(x), other(x), atol=1e-12)
    reset = copy.copy(op)
    reset.reset = True
    assert torch.equal(reset(x), op(x))


def test_atrous_scan_with_reset_stays_inside_its_windows():
    op, _ = build("atrous_scan", window=2, rate=2, reset=True, kernel=1)
    x = torch.randn(1, 6, 9, 12, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(op(x)[0, 4:, :4].square().sum(), x)
    seen = grad[0].abs().sum(-1) > 0
    assert seen[4:, :4].all() and seen.sum() == 8


def test_atrous_scan_dilates_more_from_block_to_block():
    ops = [create_op("atrous_scan", 8, 2, place=Place(block=block)) for block in range(4)]
    assert [op.rates for op in ops] == [(1,) * 4, (2,) * 4, (3,) * 4, (1,) * 4]


def routes(H, W):
    """Return the two routes of each of the four heads of MHS-VM, walked step by step."""
    rows, columns = snakes(H, W)[0], [token[::-1] for token in snakes(W, H)[0]]
    diagonals = []
    for m in range(H + W - 1):
        line = [(i, m - i) for i in range(H) if 0 <= m - i < W]
        diagonals += line[::-1] if m % 2 == 0 else line
    spiral, (i, j), (di, dj) = [(0, 0)], (0, 0), (0, 1)
    for _ in range(H * W - 1):
        if not (0 <= i + di < H and 0 <= j + dj < W) or (i + di, j + dj) in spiral:
            di, dj = dj, -di
        i, j = i + di, j + dj
        spiral.append((i, j))
    return [
        (rows, columns),
        (diagonals, [(i, W - 1 - j) for i, j in diagonals]),
        (spiral, [(H - 1 - i, j) for i, j in spiral]),
        tuple(crosses(H, W)[:2]),
    ]


@pytest.mark.parametrize(
    "arguments",
    [{"patterns": 4, "form": "ungated"}, {"threshold": 0.8}, {"form": "plain", "project": False}],
    ids=str,
)
def test_multi_head_scan_runs_as_defined(arguments):
    op, x = build("multi_head_scan", states=2, **arguments)
    u, z = x, None
    if op.form == "gated":
        u, z = (x @ op.in_proj.weight.T).chunk(2, dim=-1)
    if op.form != "plain":
        convolved = F.conv2d(u.permute(0, 3, 1, 2), op.conv2d.weight, op.conv2d.bias, padding=1, groups=12)
        u = F.silu(convolved).permute(0, 2, 3, 1)
    fused = []
    heads = (u @ op.x_proj.weight.T).chunk(len(op.heads), dim=-1)
    for head, part, (a, b) in zip(op.heads, heads, routes(5, 7), strict=False):
        y = loop_scan(head, part[0], [a, a[::-1], b, b[::-1]])
        variation = y.std(0) / ((y - y.min(0).values).mean(0) + 1e-5)
        fused.append(y.sum(0) * (variation - op.threshold).relu())
    y = torch.cat(fused, dim=-1)
    if arguments.get("project", True):
        y = F.layer_norm(y, y.shape[-1:], op.cat_norm.weight, op.cat_norm.bias) @ op.y_proj.weight.T
    if op.form != "plain":
        y = F.layer_norm(y, y.shape[-1:], op.out_norm.weight, op.out_norm.bias)
    y = y if z is None else y[None] * F.silu(z)
    assert torch.allclose(op(x), y, atol=1e-10)


def test_multi_head_scan_with_a_high_threshold_gives_nothing():
    op, x = build("multi_head_scan", form="plain", project=False, threshold=100.0)
    assert (op(x) == 0).all()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "local_scan", "scan": "zigzag"}, "scan must be 'snake' or 'cross', not 'zigzag'"),
        ({"name": "local_scan", "kernel": 2}, "kernel must be odd and at least 1, not 2"),
        ({"name": "local_scan", "states": 0}, "states and expansion"),
        ({"name": "atrous_scan", "rate": [1, 2]}, "rate a number or four numbers"),
        ({"name": "multi_head_scan", "patterns": 5}, "patterns must be 3 or 4"),
        ({"name": "multi_head_scan", "form": "bare"}, "form must be one of gated, ungated, plain, not 'bare'"),
        ({"name": "multi_head_scan", "project": False}, "project=False needs a dim that patterns divides"),
    ],
)
def test_wrong_arguments_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        create_op(spec, 8, 2)
