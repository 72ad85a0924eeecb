"""Scans along a sequence against loops over the tokens, and the orders of a map against hand-written lists."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ops import create_op
from ops.scan import CHUNK, gated_linear_attention, linear_recurrence, selective_scan
from ops.scan_orders import (
    atrous_windows,
    diagonals,
    gather_orders,
    positions,
    raster,
    scatter_orders,
    snake,
    spiral,
    to_orders,
)

LENGTHS = (1, 2, 3, 7, 64, 65, 130)


def loop_selective_scan(u, delta, A, B, C, first=None):
    """Compute `selective_scan` token by token."""
    state = torch.zeros(*u.shape[:2], u.shape[-1], A.shape[-1], dtype=u.dtype)
    outputs = []
    for t in range(u.shape[2]):
        if first is not None:
            state = torch.where(first[:, t, None, None], 0.0, state)
        state = (delta[:, :, t, :, None] * A).exp() * state
        state = state + (delta[:, :, t] * u[:, :, t])[..., None] * B[:, :, t, None]
        outputs.append((state * C[:, :, t, None]).sum(-1))
    return torch.stack(outputs, dim=2)


def make_scan(n, dtype=torch.float64, states=3, requires_grad=False):
    """Return random arguments of `selective_scan` for 2 images, 2 orders and 5 channels."""
    torch.manual_seed(n)
    u, delta = torch.randn(2, 2, n, 5, dtype=dtype), torch.rand(2, 2, n, 5, dtype=dtype)
    A = -torch.rand(2, 5, states, dtype=dtype) * 3
    B, C = torch.randn(2, 2, 2, n, states, dtype=dtype)
    return [x.requires_grad_(requires_grad) for x in (u, delta, A, B, C)]


@pytest.mark.parametrize("n", LENGTHS)
def test_selective_scan_equals_the_loop(n):
    arguments = make_scan(n)
    assert torch.allclose(selective_scan(*arguments), loop_selective_scan(*arguments), atol=1e-12)
    first = torch.rand(2, n) < 0.2
    restarted = selective_scan(*arguments, first=first)
    assert torch.allclose(restarted, loop_selective_scan(*arguments, first=first), atol=1e-12)


def test_selective_scan_of_quickly_forgotten_states_sees_each_token_alone():
    u, delta, A, B, C = make_scan(40, torch.float32)
    out = selective_scan(u, delta + 0.1, A - 1e6, B, C)
    assert torch.allclose(out, (delta + 0.1) * u * (B * C).sum(-1, keepdim=True), atol=1e-6)


def test_selective_scan_has_its_gradients():
    assert torch.autograd.gradcheck(selective_scan, make_scan(7, requires_grad=True), fast_mode=True)


def test_selective_scan_in_half_precision_keeps_its_states_in_float32():
    arguments = [x.half() for x in make_scan(130)]
    out = selective_scan(*arguments)
    assert out.dtype == torch.float32
    assert torch.allclose(out.double(), loop_selective_scan(*(x.double() for x in arguments)), atol=1e-4)


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("n", LENGTHS)
def test_gated_linear_attention_equals_its_matrix(n, both_ways):
    torch.manual_seed(n)
    q, k, v = torch.randn(3, 2, 3, n, 4, dtype=torch.float64)
    # Some decays are so strong that exp of a sum over a chunk is 0
    log_decay = -torch.rand(2, 3, n, dtype=torch.float64) * torch.tensor([0.01, 1.0, 40.0])[:, None]
    total = log_decay.cumsum(-1)
    before = total - log_decay
    weights = torch.tril((total[..., :, None] - total[..., None, :]).clamp(max=0).exp())
    if both_ways:
        weights = weights + torch.triu((before[..., None, :] - before[..., :, None]).clamp(max=0).exp(), 1)
    expected = (q @ k.transpose(-2, -1) * weights) @ v
    assert torch.allclose(gated_linear_attention(q, k, v, log_decay, both_ways), expected, atol=1e-10)


def test_gated_linear_attention_is_stable_in_float32():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 4 * CHUNK, 8).unbind()
    q.requires_grad_()
    log_decay = torch.full((1, 4 * CHUNK), -30.0, requires_grad=True)
    out = gated_linear_attention(q, k, v, log_decay)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, log_decay)))
    assert torch.allclose(out, (q * k).sum(-1, keepdim=True) * v, atol=1e-5)


@pytest.mark.parametrize("n", LENGTHS)
def test_linear_recurrence_broadcasts_its_decay(n):
    torch.manual_seed(0)
    decay, x = torch.rand(1, n, 1, dtype=torch.float64), torch.randn(3, n, 2, dtype=torch.float64)
    h, state = linear_recurrence(decay, x), torch.zeros(3, 2, dtype=torch.float64)
    for t in range(n):
        state = decay[:, t] * state + x[:, t]
        assert torch.allclose(h[:, t], state)


# Ops with windows and chunks that fit maps of 16 x 16 and 32 x 32 tokens
LINEAR = (
    "atrous_scan",
    {"name": "gated_linear_window", "window": 8},
    {"name": "lightning", "form": "four_ways"},
    "local_scan",
    "multi_head_scan",
    "recurrent_softmax",
)


@pytest.mark.parametrize("spec", LINEAR, ids=str)
def test_cost_of_the_ops_is_linear(spec):
    counts = []
    with torch.device("meta"):
        op = create_op(spec, 8, 2)
        for side in (16, 32):
            with FlopCounterMode(display=False) as counter:
                op(torch.empty(1, side, side, 8))
            counts.append(counter.get_total_flops())
    assert counts[1] == 4 * counts[0]


ORDERS = {
    "raster": (raster, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
    "snake": (snake, [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11]),
    "diagonals": (diagonals, [0, 1, 4, 8, 5, 2, 3, 6, 9, 10, 7, 11]),
    "spiral": (spiral, [0, 1, 2, 3, 7, 11, 10, 9, 8, 4, 5, 6]),
    "atrous": (lambda i, j: atrous_windows(i, j, 1, 2), [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11]),
    "dilated": (lambda i, j: atrous_windows(i, j, 2, 2), [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 5, 7]),
}


@pytest.mark.parametrize("name", ORDERS)
def test_orders_visit_the_tokens_as_listed(name):
    """The map has 3 rows and 4 columns."""
    keys, expected = ORDERS[name]
    assert to_orders([keys(*positions((3, 4), torch.device("cpu")))])[0].tolist() == expected


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (2, 5), (4, 4), (5, 5), (9, 7)], ids=str)
def test_orders_are_permutations(name, size):
    i, j = positions(size, torch.device("cpu"))
    orders = to_orders([ORDERS[name][0](i, j), -ORDERS[name][0](j, i)])
    assert (orders.sort(-1).values == torch.arange(size[0] * size[1])).all()
    if name in ("snake", "spiral"):
        steps = (orders // size[1]).diff().abs() + (orders % size[1]).diff().abs()
        assert (steps == 1).all()


def test_maps_come_back_from_their_orders():
    x = torch.randn(2, 3, 5, 4)
    i, j = positions((3, 5), x.device)
    orders = to_orders([snake(i, j), spiral(j, i)])
    tokens = gather_orders(x, orders)
    assert torch.equal(tokens[:, 0, 6], x[:, 1, 3])
    assert torch.equal(scatter_orders(tokens, orders, (3, 5)), x.unsqueeze(1).expand(-1, 2, -1, -1, -1))


@pytest.mark.parametrize("n", [1, 5])
def test_linear_recurrence_is_a_sound_operator(n):
    torch.manual_seed(0)
    decay = torch.rand(2, n, 1, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(linear_recurrence, (decay, x), test_utils=checks)
    assert torch.autograd.gradcheck(linear_recurrence, (decay, x), fast_mode=True)
    assert torch.autograd.gradgradcheck(linear_recurrence, (decay, x), fast_mode=True)
