"""The kernels of routed attention against plain PyTorch in float64, and their compilation for several GPUs."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ops import backend
from ops.attention.bilevel_routing import BilevelRoutingAttention
from ops.functional import gathered_attention, routed_attention
from ops.kernels import launch
from tests.ops.kernels.ahead_of_time import SHARED_MEMORY, Launch, assert_fits, launches_of, written_when_compiled
from tests.ops.kernels.interpreter import run_interpreted
from tests.ops.kernels.numerics import assert_trains_in_half_precision, assert_within_budget, poisoned

interpreted = pytest.mark.interpreted
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Batch size, (H, W), grid of windows, topk, heads, head dimension.
CASES = {
    "windows that are not square": (2, (6, 15), (3, 3), 2, 1, 8),
    "one token": (1, (4, 3), (4, 3), 5, 1, 24),
    "one route": (2, (4, 6), (2, 3), 1, 2, 16),
    "many windows and routes": (1, (6, 10), (6, 5), 20, 1, 4),
    "more than a tile": (1, (21, 10), (3, 1), 2, 1, 33),
    "one channel": (1, (6, 4), (3, 2), 2, 2, 1),
}


@pytest.fixture
def kernels(monkeypatch):
    """Run only the kernels, with uninitialised tensors poisoned."""
    monkeypatch.setitem(backend._state, "backend", "triton")
    with poisoned():
        yield


def make(case: str, device: str = "cpu", routes: str = "any") -> tuple[Tensor, Tensor, Tensor]:
    """Return the input, the index and the gradient of the output of a case.

    Args:
        case: key of `CASES`.
        device: device of the tensors.
        routes: "any" for random routes; "few" if every window chooses the first window and none chooses the last.
    """
    B, (H, W), grid, topk, heads, D = CASES[case]
    torch.manual_seed(0)
    windows = grid[0] * grid[1]
    order = torch.rand(B, windows, windows)
    if routes == "few":
        order[..., 0], order[..., -1] = 2, -1
    qkv, dout = torch.randn(B, H, W, 3 * heads * D), torch.randn(B, H, W, heads * D)
    return qkv.to(device), order.topk(topk).indices.to(device), dout.to(device)


def run(attend, case: str, qkv: Tensor, index: Tensor, dout: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return the output, and the gradients of the queries, the keys and the values, for inputs cast to `dtype`."""
    _, _, grid, _, heads, _ = CASES[case]
    qkv = qkv.to(dtype).requires_grad_()
    out = attend(qkv, index, grid, heads, 0.4)
    (dqkv,) = torch.autograd.grad(out, qkv, dout.to(dtype))
    return [out.detach(), *dqkv.chunk(3, dim=-1)]


def assert_exact(case: str, dtype: torch.dtype, device: str = "cpu", routes: str = "any") -> None:
    qkv, index, dout = (t.to(dtype) if t.is_floating_point() else t for t in make(case, device, routes))
    actual = run(routed_attention, case, qkv, index, dout, dtype)
    plain = run(gathered_attention, case, qkv, index, dout, dtype)
    assert_within_budget(actual, plain, run(gathered_attention, case, qkv, index, dout, torch.float64))


def launches(shape: tuple, dtype: torch.dtype) -> list[Launch]:
    """Return the launches of the three kernels for a shape as in `CASES`."""
    from ops.kernels import routed_attention as module

    B, (H, W), grid, topk, heads, D = shape
    windows = grid[0] * grid[1]
    new = partial(torch.empty, device="meta", dtype=dtype)
    qkv, out = new(B, H, W, 3 * heads * D), new(B, H, W, heads * D)
    index = torch.empty(B, windows, topk, dtype=torch.long, device="meta")
    lse = torch.empty(B, windows, heads, H * W // windows, device="meta")

    def call() -> None:
        module.routed_attention_and_lse._init_fn(qkv, index, grid, heads, 0.1)
        module.routed_attention_backward._init_fn(qkv, index, out, lse, out, grid, heads, 0.1)

    recorded = launches_of(module, call)
    assert [kernel_launch.kernel.fn.__name__ for kernel_launch in recorded] == [
        "forward",
        "backward_queries",
        "backward_keys",
    ]
    return recorded


def test_kernels_in_the_interpreter(request):
    run_interpreted(request.config, __file__)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(kernels, case, dtype):
    assert_exact(case, dtype)


@interpreted
def test_windows_chosen_by_no_window_or_by_every_window(kernels):
    _, index, _ = make("windows that are not square", routes="few")
    chosen = index.flatten().bincount(minlength=9)
    assert chosen[0] == 2 * 9 and chosen[-1] == 0
    assert_exact("windows that are not square", torch.float32, routes="few")


@interpreted
@pytest.mark.parametrize("resident, streamed", [(16, 16), (32, 64)])
def test_tile_sizes_do_not_change_the_results(kernels, monkeypatch, resident, streamed):
    from ops.kernels.routed_attention import BACKWARD_KEYS, BACKWARD_QUERIES, FORWARD

    config = launch.TileConfig(resident, streamed, 1, 1)
    for kernel in (FORWARD, BACKWARD_QUERIES, BACKWARD_KEYS):
        monkeypatch.setitem(launch.TUNED, (kernel, (0, 0), 4, 16, 10), config)
    recorded = launches(CASES["windows that are not square"], torch.float32)
    assert {(r.arguments["RESIDENT"], r.arguments["STREAMED"]) for r in recorded} == {(resident, streamed)}
    assert_exact("windows that are not square", torch.float32)


@interpreted
def test_strides_and_int32_indices_do_not_change_the_results(kernels):
    qkv, index, dout = make("windows that are not square")
    expected = run(routed_attention, "windows that are not square", qkv, index, dout, qkv.dtype)
    strided = qkv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    index = index.transpose(1, 2).contiguous().transpose(1, 2).int()
    dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
    results = run(routed_attention, "windows that are not square", strided, index, dout, qkv.dtype)
    for actual, reference in zip(results, expected, strict=True):
        assert torch.equal(actual, reference)


@interpreted
def test_operators_pass_opcheck():
    from ops.kernels.routed_attention import routed_attention_and_lse

    qkv, index, _ = make("one channel")
    torch.library.opcheck(routed_attention_and_lse, (qkv.requires_grad_(), index, [3, 2], 2, 0.4))


@interpreted
@pytest.mark.parametrize("form", ["legacy", "nchw"])
def test_bilevel_routing_in_half_precision_and_with_checkpointing(kernels, form):
    torch.manual_seed(0)
    op: nn.Module = BilevelRoutingAttention(16, 2, n_win=3, topk=2, form=form)
    assert_trains_in_half_precision(op, torch.randn(1, 7, 8, 16))


@interpreted
def test_second_derivative_raises(kernels):
    qkv, index, _ = make("one channel")
    qkv.requires_grad_()
    (dqkv,) = torch.autograd.grad(routed_attention(qkv, index, (3, 2), 2, 1.0).sum(), qkv, create_graph=True)
    with pytest.raises(ValueError, match=r"no second derivative: choose ops.backend=torch"):
        dqkv.sum().backward()


@interpreted
def test_flops_equal_those_of_plain_pytorch(kernels):
    counts = []
    for attend, device in ((routed_attention, "cpu"), (gathered_attention, "meta")):
        qkv, index, dout = make("one channel", device)
        with FlopCounterMode(display=False) as forward:
            attend(qkv, index, (3, 2), 2, 1.0)
        with FlopCounterMode(display=False) as both:
            run(attend, "one channel", qkv, index, dout, qkv.dtype)
        counts.append((forward.get_total_flops(), both.get_total_flops()))
    assert counts[0] == counts[1] and 0 < counts[0][0] < counts[0][1]


@pytest.mark.parametrize("capability, side, topk, heads", [(80, 28, 4, 4), (90, 56, 1, 2), (100, 14, 16, 4)])
def test_kernels_of_biformer_fit_the_gpu(capability, side, topk, heads):
    for kernel_launch in launches((2, (side, side), (7, 7), topk, heads, 32), torch.bfloat16):
        assert_fits(capability, kernel_launch)


def test_torch_compile_sees_the_kernels(monkeypatch):
    from ops.kernels.routed_attention import routed_attention_backward

    monkeypatch.setitem(backend._state, "backend", "triton")
    settings, half = ((7, 7), 2, 0.1), torch.bfloat16
    qkv, index, out, lse = (
        ((2, 14, 14, 96), half),
        ((2, 49, 3), torch.long),
        ((2, 14, 14, 32), half),
        ((2, 49, 2, 4), torch.float),
    )
    assert written_when_compiled(lambda q, i: routed_attention(q, i, *settings), qkv, index) == [["out", "lse"]]
    backward = written_when_compiled(
        lambda *args: routed_attention_backward(*args, *settings), qkv, index, out, lse, out
    )
    assert backward == [["delta", "dqkv", "choosers", "chooser_counts"], ["dqkv"]]


SIDES_AND_ROUTES = [(14, 4), (14, 16), (28, 4), (35, 3), (56, 1), (224, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("D", [16, 24, 32, 64])
@pytest.mark.parametrize("side, topk", SIDES_AND_ROUTES)
def test_kernels_of_every_size_fit_the_gpu(side, topk, D, capability, dtype):
    for kernel_launch in launches((2, (side, side), (7, 7), topk, 2, D), dtype):
        assert_fits(capability, kernel_launch)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_the_gpu(monkeypatch, dtype):
    monkeypatch.setitem(backend._state, "backend", "triton")
    for case in CASES:
        assert_exact(case, dtype, "cuda")


@on_gpu
def test_repeated_and_compiled_runs_give_the_same_bits(monkeypatch):
    monkeypatch.setitem(backend._state, "backend", "triton")
    case = "more than a tile"
    inputs = make(case, "cuda")
    expected = run(routed_attention, case, *inputs, torch.bfloat16)
    for attend in (routed_attention, torch.compile(routed_attention, fullgraph=True)):
        for actual, reference in zip(run(attend, case, *inputs, torch.bfloat16), expected, strict=True):
            assert torch.equal(actual, reference)
