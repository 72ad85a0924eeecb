"""The kernels of window attention against plain PyTorch in float64, and their compilation for several GPUs."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ops import Place, backend, create_op
from ops.functional import window_attention
from ops.kernels import launch
from tests.ops.kernels.ahead_of_time import SHARED_MEMORY, Launch, assert_fits, launches_of, written_when_compiled
from tests.ops.kernels.interpreter import run_interpreted
from tests.ops.kernels.numerics import assert_trains_in_half_precision, assert_within_budget, in_two_types, poisoned

interpreted = pytest.mark.interpreted
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Case(NamedTuple):
    """Arguments of a call of `window_attention`; `size` is (H, W) and `D` the head dimension."""

    size: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    pattern: str = "window"
    biased: bool = True
    batch: int = 1
    heads: int = 1
    D: int = 8


CASES = {
    "windows": Case((3, 8), (3, 4), batch=2, heads=2),
    "shifted": Case((6, 8), (3, 4), (1, 2), heads=2, D=24),
    "shifted along one side": Case((7, 14), (7, 7), (0, 3), D=32),
    "no bias": Case((4, 4), (2, 2), biased=False, D=3),
    "shifted, no bias": Case((4, 6), (4, 3), (0, 1), biased=False),
    "grid": Case((6, 4), (3, 2), pattern="grid", heads=2),
    "shifted grid": Case((6, 8), (3, 4), (2, 1), pattern="grid"),
    "wide heads": Case((3, 6), (3, 3), (1, 1), D=33),
    "more than a tile": Case((9, 18), (9, 9), (4, 4)),
    "grid, more than a tile": Case((18, 9), (9, 9), pattern="grid", D=24),
    "stripes, more than a tile": Case((20, 8), (20, 4), biased=False, heads=2, D=16),
}


@pytest.fixture
def kernels(monkeypatch):
    """Run only the kernels, with uninitialised tensors poisoned."""
    monkeypatch.setitem(backend._state, "backend", "triton")
    with poisoned():
        yield


def make(case: str, device: str = "cpu") -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the input (B, H, W, 3, C), the bias and the gradient of the output of a case."""
    c = CASES[case]
    torch.manual_seed(0)
    tokens, C = c.window[0] * c.window[1], c.heads * c.D
    qkv, dout = torch.randn(c.batch, *c.size, 3, C), torch.randn(c.batch, *c.size, C)
    bias = torch.randn(c.heads, tokens, tokens).to(device) if c.biased else None
    return qkv.to(device), bias, dout.to(device)


def run(attend, case: str, qkv: Tensor, bias: Tensor | None, dout: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return the output, and the gradients of the queries, the keys, the values and the bias."""
    c = CASES[case]
    inputs = [t.to(dtype).requires_grad_() for t in (qkv, bias) if t is not None]
    out = attend(inputs[0], inputs[1] if c.biased else None, c.heads, c.window, c.shift, 0.4, c.pattern)
    dqkv, *dbias = torch.autograd.grad(out, inputs, dout.to(dtype))
    return [out.detach(), *dqkv.unbind(3), *dbias]


def plain(*args) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backend._state, "backend", "torch")
        return window_attention(*args)


def by_definition(qkv, bias, num_heads, window, shift, scale, pattern) -> Tensor:
    """Compute window attention from the definition, token by token, in a dense matrix of all pairs.

    Two tokens of the same window attend to each other if, along each side, the shift wraps both of them around the map
    or none of them.
    """
    (H, W), (h, w) = qkv.shape[1:3], window
    steps = (H // h, W // w)
    windows, positions = [], []
    for y in range(H):
        for x in range(W):
            rolled = ((y - shift[0]) % H, (x - shift[1]) % W)
            inner, outer = zip(*(divmod(t, n) for t, n in zip(rolled, steps, strict=True)), strict=True)
            if pattern == "window":
                outer, inner = zip(*(divmod(t, n) for t, n in zip(rolled, window, strict=True)), strict=True)
            windows.append((outer, y < shift[0], x < shift[1]))
            positions.append(inner[0] * w + inner[1])
    same_window = torch.tensor([[a == b for b in windows] for a in windows])
    q, k, v = qkv.flatten(1, 2).unflatten(-1, (num_heads, -1)).unbind(2)  # (B, H * W, heads, D)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if bias is not None:
        scores = scores + bias[:, positions][:, :, positions]
    weights = scores.exp() * same_window
    out = torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v)
    return out.flatten(2).unflatten(1, (H, W))


def assert_exact(case: str, dtype: torch.dtype, device: str = "cpu") -> None:
    qkv, bias, dout = make(case, device)
    inputs = (qkv.to(dtype), None if bias is None else bias.to(dtype), dout.to(dtype))
    actual = run(window_attention, case, *inputs, dtype)
    assert_within_budget(actual, run(plain, case, *inputs, dtype), run(plain, case, *inputs, torch.float64))


@pytest.mark.parametrize("case", CASES)
def test_plain_pytorch_agrees_with_the_definition(case):
    inputs = make(case)
    expected = run(by_definition, case, *inputs, torch.float64)
    for actual, reference in zip(run(plain, case, *inputs, torch.float64), expected, strict=True):
        assert torch.allclose(actual, reference, atol=1e-11)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"window": (4, 4)}, "windows of 4 x 4 do not fit a map of 6 x 8"),
        ({"shift": (0, 8)}, "shift must be at least 0 and less than the map of 6 x 8, not 0 x 8"),
        ({"pattern": "gird"}, "pattern must be window or grid, not 'gird'"),
    ],
)
def test_arguments_that_do_not_fit_raise(change, message):
    with pytest.raises(ValueError, match=message):
        window_attention(torch.zeros(1, 6, 8, 3, 4), None, 1, **({"window": (3, 4)} | change))


def test_kernels_in_the_interpreter(request):
    run_interpreted(request.config, __file__)


@interpreted
@pytest.mark.parametrize("case, dtype", in_two_types(CASES))
def test_output_and_gradients(kernels, case, dtype):
    assert_exact(case, dtype)


@interpreted
@pytest.mark.parametrize("resident, streamed", [(16, 32), (64, 16)])
def test_tile_sizes_do_not_change_the_results(kernels, monkeypatch, resident, streamed):
    config = launch.TileConfig(resident, streamed, 1, 1)
    monkeypatch.setattr("ops.kernels.window_attention.tile_config", lambda *args: config)
    assert_exact("more than a tile", torch.float32)


@interpreted
@pytest.mark.parametrize("case", ["windows", "more than a tile"])
def test_each_program_sums_over_many_windows(kernels, monkeypatch, case):
    monkeypatch.setattr("ops.kernels.window_attention.BIAS_PROGRAMS", 1)
    assert_exact(case, torch.float16)


@interpreted
def test_a_slice_of_channels_is_not_copied(kernels):
    from ops.kernels.window_attention import _as_rows

    qkv, bias, dout = make("windows")
    expected = run(window_attention, "windows", qkv, bias, dout, qkv.dtype)
    wide = torch.full((*qkv.shape[:-1], 3 * qkv.shape[-1]), torch.nan)
    channel_slice = wide[..., 8 : 8 + qkv.shape[-1]].copy_(qkv)
    assert _as_rows(channel_slice).data_ptr() == channel_slice.data_ptr()
    transposed = qkv.permute(0, 2, 1, 3, 4).contiguous().permute(0, 2, 1, 3, 4)
    for strided in (channel_slice, transposed):
        results = run(window_attention, "windows", strided, bias, dout.flip(1).contiguous().flip(1), qkv.dtype)
        for actual, reference in zip(results, expected, strict=True):
            assert torch.equal(actual, reference)
    qkv.requires_grad_()
    # The gradient of a sum is an expanded tensor, whose strides are 0.
    (dqkv,) = torch.autograd.grad(window_attention(qkv, bias, 2, (3, 4)).sum(), qkv)
    (plain_dqkv,) = torch.autograd.grad(plain(qkv, bias, 2, (3, 4)).sum(), qkv)
    assert torch.allclose(dqkv, plain_dqkv, atol=1e-6)


@interpreted
@pytest.mark.parametrize("case", ["no bias", "more than a tile"])
def test_operators_pass_opcheck(case):
    from ops.kernels.window_attention import window_attention_and_lse

    (qkv, bias, _), c = make(case), CASES[case]
    inputs = [None if t is None else t.half().requires_grad_() for t in (qkv, bias)]
    torch.library.opcheck(window_attention_and_lse, (*inputs, c.heads, c.window, c.shift, 0.4, False))


@interpreted
@pytest.mark.parametrize("case", ["windows", "more than a tile"])
def test_gradients_are_contiguous(case):
    """Check the strides that the operator declares, also for the bias, which autocast leaves in float32."""
    from ops.kernels.window_attention import window_attention_and_lse, window_attention_backward

    (qkv, bias, dout), c = make(case), CASES[case]
    settings = (c.heads, c.window, c.shift, 0.4, False)
    out, lse = window_attention_and_lse(qkv.half(), bias, *settings)
    saved = (out, lse) if lse.numel() else (None, None)
    for gradient in window_attention_backward(qkv.half(), bias, dout.half(), *saved, *settings):
        assert gradient.is_contiguous()


@interpreted
@pytest.mark.parametrize(
    "name, arguments",
    [
        ("window", {"window": 3}),
        ("grid", {"grid": 3}),
        ("plain_window", {"window": 3}),
        ("cross_shaped_window", {"split": 3}),
        ("hilo", {"alpha": 0.5}),
    ],
)
def test_ops_in_half_precision_and_with_checkpointing(kernels, name, arguments):
    torch.manual_seed(0)
    op: nn.Module = create_op(name, dim=16, num_heads=2, place=Place(block=1), **arguments)
    assert_trains_in_half_precision(op, torch.randn(1, 5, 6, 16))


@interpreted
def test_second_derivative_raises(kernels):
    qkv, *_ = make("no bias")
    qkv.requires_grad_()
    (dqkv,) = torch.autograd.grad(window_attention(qkv, None, 1, (2, 2)).sum(), qkv, create_graph=True)
    with pytest.raises(ValueError, match=r"no second derivative: choose ops.backend=torch"):
        dqkv.sum().backward()


@interpreted
@pytest.mark.parametrize("case", ["shifted", "no bias"])
def test_flops_equal_those_of_plain_pytorch(kernels, case):
    counts = []
    for attend, device in ((window_attention, "cpu"), (plain, "meta")):
        inputs = make(case, device)
        with FlopCounterMode(display=False) as forward:
            attend(*inputs[:2], CASES[case].heads, CASES[case].window)
        with FlopCounterMode(display=False) as both:
            run(attend, case, *inputs, torch.float32)
        counts.append((forward.get_total_flops(), both.get_total_flops()))
    assert counts[0] == counts[1] and 0 < counts[0][0] < counts[0][1]


def launches(c: Case, dtype: torch.dtype) -> list[Launch]:
    """Return the launches of all kernels, forward and backward, for a case."""
    from ops.kernels import window_attention as module

    new = partial(torch.empty, device="meta", dtype=dtype)
    tokens, dout = c.window[0] * c.window[1], new(c.batch, *c.size, c.heads * c.D)
    qkv = new(c.batch, *c.size, 3, c.heads * c.D)
    bias = new(c.heads, tokens, tokens, dtype=torch.float32) if c.biased else None
    settings = (c.heads, c.window, c.shift, 0.1, c.pattern == "grid")

    def call() -> None:
        out, lse = module.window_attention_and_lse._init_fn(qkv, bias, *settings)
        saved = (out, lse) if lse.numel() else (None, None)
        module.window_attention_backward._init_fn(qkv, bias, dout, *saved, *settings)

    return launches_of(module, call)


NETS = {
    "Swin": Case((56, 56), (7, 7), (3, 3), heads=3, D=32),
    "Swin, 384 pixels": Case((96, 96), (12, 12), (6, 6), heads=3, D=32),
    "CSWin": Case((56, 56), (56, 1), biased=False, heads=2, D=32),
    "CSWin, third stage": Case((14, 14), (14, 7), biased=False, heads=2, D=32),
    "MaxViT": Case((56, 56), (7, 7), pattern="grid", heads=2, D=32),
    "GCViT": Case((14, 14), (14, 14), heads=8, D=32),
    "LITv2": Case((56, 56), (2, 2), biased=False, heads=1, D=32),
    "small windows": Case((20, 20), (5, 5), (2, 2), heads=3, D=24),
}


@pytest.mark.parametrize("capability, net", [(80, "Swin"), (90, "CSWin"), (90, "Swin, 384 pixels"), (100, "Swin")])
def test_kernels_of_nets_fit_the_gpu(capability, net):
    recorded = launches(NETS[net], torch.bfloat16)
    assert len(recorded) == (4 if "384" in net else 2)
    for kernel_launch in recorded:
        assert_fits(capability, kernel_launch)


SIZES = [(net, torch.bfloat16) for net in NETS] + [("Swin", torch.float32), ("Swin, 384 pixels", torch.float32)]


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("D", [16, 32, 64])
@pytest.mark.parametrize("net, dtype", SIZES)
def test_kernels_of_every_size_fit_the_gpu(net, dtype, D, capability):
    for kernel_launch in launches(NETS[net]._replace(D=D), dtype):
        assert_fits(capability, kernel_launch)


def test_torch_compile_sees_the_kernels(monkeypatch):
    from ops.kernels.window_attention import window_attention_backward

    monkeypatch.setitem(backend._state, "backend", "triton")
    half = torch.bfloat16

    def shapes(side: int) -> list:
        out = ((2, 2 * side, 2 * side, 32), half)
        return [((2, 2 * side, 2 * side, 3, 32), half), ((1, side**2, side**2), torch.float), out]

    for side, forward, backward in (
        (7, [["out"]], [["dqkv", "partial_dbias"]]),
        (9, [["out", "lse"]], [["delta", "dqkv"], ["dqkv"], ["partial_dbias"]]),
    ):
        qkv, bias, out = shapes(side)
        saved = [out, ((2, 2 * side, 2 * side, 1), torch.float)] if side == 9 else []
        settings = (1, (side, side), (3, 3), 0.1)
        assert written_when_compiled(lambda q, b, args=settings: window_attention(q, b, *args), qkv, bias) == forward

        def gradients(q, b, dout, out=None, lse=None, args=settings):
            return window_attention_backward(q, b, dout, out, lse, *args, False)

        assert written_when_compiled(gradients, qkv, bias, out, *saved) == backward


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_on_the_gpu(monkeypatch, case, dtype):
    monkeypatch.setitem(backend._state, "backend", "triton")
    assert_exact(case, dtype, "cuda")


@on_gpu
@pytest.mark.parametrize("case", ["shifted", "more than a tile"])
def test_repeated_and_compiled_runs_give_the_same_bits(monkeypatch, case):
    monkeypatch.setitem(backend._state, "backend", "triton")
    inputs = make(case, "cuda")
    expected = run(window_attention, case, *inputs, torch.bfloat16)
    for attend in (window_attention, torch.compile(window_attention, fullgraph=True)):
        for actual, reference in zip(run(attend, case, *inputs, torch.bfloat16), expected, strict=True):
            assert torch.equal(actual, reference)
