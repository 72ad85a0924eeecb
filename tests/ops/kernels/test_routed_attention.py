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
from tests.ops.kernels.numerics import assert_trains_in_half_precision, assert_within_budget, in_two_types, poisoned

interpreted = pytest.mark.interpreted
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Batch size, (H, W), grid of windows, topk, heads, head dimension.
LARGE_WINDOWS = {
    "windows that are not square": (2, (12, 15), (3, 3), 2, 1, 8),
    "65 windows": (1, (5, 13), (5, 13), 17, 1, 24),
    "one route": (2, (8, 8), (2, 2), 1, 2, 16),
    "more than a tile": (1, (21, 10), (3, 1), 2, 1, 33),
    "one channel": (1, (12, 8), (3, 2), 2, 2, 1),
}
SMALL_WINDOWS = {
    "64 windows of one token": (1, (8, 8), (8, 8), 20, 1, 4),
    "64 windows of 1 x 3": (1, (8, 24), (8, 8), 5, 1, 8),
    "windows of 2 x 2": (1, (14, 10), (7, 5), 6, 1, 33),
    "windows of 3 x 3": (1, (15, 12), (5, 4), 3, 2, 24),
    "windows of 15 tokens": (2, (15, 10), (5, 2), 2, 1, 16),
    "every window": (2, (6, 9), (3, 3), 9, 1, 8),
    "one window": (1, (3, 5), (1, 1), 1, 2, 5),
    "small windows of one channel": (1, (6, 4), (3, 2), 2, 2, 1),
}
CASES = LARGE_WINDOWS | SMALL_WINDOWS


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


def run(
    attend, case: str, qkv: Tensor, index: Tensor, dout: Tensor, dtype: torch.dtype, scale: float = 0.4
) -> list[Tensor]:
    """Return the output, and the gradients of the queries, the keys and the values, for inputs cast to `dtype`."""
    _, _, grid, _, heads, _ = CASES[case]
    qkv = qkv.to(dtype).requires_grad_()
    out = attend(qkv, index, grid, heads, scale)
    (dqkv,) = torch.autograd.grad(out, qkv, dout.to(dtype))
    return [out.detach(), *dqkv.chunk(3, dim=-1)]


def assert_exact(case: str, dtype: torch.dtype, device: str = "cpu", routes: str = "any", scale: float = 0.4) -> None:
    """Check the kernels, also where all windows are chosen, for which `routed_attention` calls SDPA."""
    from ops.kernels.routed_attention import routed_attention as kernels

    qkv, index, dout = (t.to(dtype) if t.is_floating_point() else t for t in make(case, device, routes))
    actual = run(kernels, case, qkv, index, dout, dtype, scale)
    plain = run(gathered_attention, case, qkv, index, dout, dtype, scale)
    assert_within_budget(actual, plain, run(gathered_attention, case, qkv, index, dout, torch.float64, scale))


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
    small = "small_" if windows <= 64 and H * W // windows < 16 else ""
    names = [kernel_launch.kernel.fn.__name__ for kernel_launch in recorded]
    assert names == [small + name for name in ("forward", "backward_queries", "backward_keys")]
    return recorded


def test_kernels_in_the_interpreter(request):
    run_interpreted(request.config, __file__)


@interpreted
@pytest.mark.parametrize("case, dtype", in_two_types(CASES))
def test_output_and_gradients(kernels, case, dtype):
    assert_exact(case, dtype)


@interpreted
@pytest.mark.parametrize("case", ["windows that are not square", "windows of 2 x 2", "64 windows of one token"])
def test_windows_chosen_by_no_window_or_by_every_window(kernels, case):
    B, _, grid, *_ = CASES[case]
    windows = grid[0] * grid[1]
    chosen = make(case, routes="few")[1].flatten().bincount(minlength=windows)
    assert chosen[0] == B * windows and chosen[-1] == 0
    assert_exact(case, torch.float32, routes="few")


@interpreted
@pytest.mark.parametrize("case", ["one route", "windows of 15 tokens"])
@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_a_negative_scale_and_0(kernels, case, scale):
    assert_exact(case, torch.float32, scale=scale)


@interpreted
@pytest.mark.parametrize(
    "case, resident, streamed",
    [
        ("windows that are not square", 32, 64),
        ("more than a tile", 64, 16),
        ("windows of 3 x 3", 16, 16),
        ("64 windows of one token", 16, 64),
    ],
)
def test_tile_sizes_do_not_change_the_results(kernels, monkeypatch, case, resident, streamed):
    """Check tiles of few tokens and of many; the last case's streamed tile has room for more windows than 32 bits."""
    config = launch.TileConfig(resident, streamed, 1, 1)
    monkeypatch.setattr("ops.kernels.routed_attention.tile_config", lambda *args: config)
    recorded = launches(CASES[case], torch.float32)
    assert {(r.arguments["RESIDENT"], r.arguments["STREAMED"]) for r in recorded} == {(resident, streamed)}
    assert_exact(case, torch.float32)


@interpreted
def test_tuned_tiles_replace_the_defaults(kernels, monkeypatch):
    config = launch.TileConfig(16, 16, 1, 1)
    monkeypatch.setitem(launch.TUNED, ("routed_attention.small_backward_keys", (0, 0), 4, 16, 4), config)
    recorded = launches((2, (14, 14), (7, 7), 4, 2, 8), torch.float32)
    sizes = [(r.arguments["RESIDENT"], r.arguments["STREAMED"]) for r in recorded]
    assert sizes[2] == (16, 16) and sizes[0] == sizes[1] != (16, 16)


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


@pytest.mark.parametrize("side, tables", [(28, ["choosers", "chooser_counts"]), (14, ["choosers"])])
def test_torch_compile_sees_the_kernels(monkeypatch, side, tables):
    from ops.kernels.routed_attention import routed_attention_backward

    monkeypatch.setitem(backend._state, "backend", "triton")
    settings, half = ((7, 7), 2, 0.1), torch.bfloat16
    qkv, index, out, lse = (
        ((2, side, side, 96), half),
        ((2, 49, 3), torch.long),
        ((2, side, side, 32), half),
        ((2, 49, 2, side**2 // 49), torch.float),
    )
    assert written_when_compiled(lambda q, i: routed_attention(q, i, *settings), qkv, index) == [["out", "lse"]]
    backward = written_when_compiled(
        lambda *args: routed_attention_backward(*args, *settings), qkv, index, out, lse, out
    )
    assert backward == [["delta", "dqkv", *tables], ["dqkv"]]


SIDES_AND_ROUTES = [(7, 16), (14, 4), (14, 16), (21, 16), (28, 4), (35, 3), (56, 1), (224, 4)]


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
