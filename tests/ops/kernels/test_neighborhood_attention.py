"""The kernels of neighbourhood attention against plain PyTorch in float64, and compiled for GPUs that are not there."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ops import backend
from ops.attention.neighborhood import NeighborhoodAttention
from ops.kernels import launch
from ops.neighborhood import neighborhood_attention, tiled_attention
from tests.ops.kernels.ahead_of_time import assert_fits, launches_of
from tests.ops.kernels.interpreter import run_interpreted
from tests.ops.kernels.numerics import assert_trains_in_half_precision, assert_within_budget, poisoned

interpreted = pytest.mark.interpreted
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CASES = {  # batch, size, kernel, dilation, heads, head dim, whether there is a bias
    "sides differ": (1, (9, 11), (5, 3), (1, 1), 1, 24, True),
    "even kernel": (1, (9, 6), (4, 2), (2, 1), 2, 16, True),
    "classes of two lengths": (1, (25, 5), (3, 2), (2, 1), 1, 4, True),
    "of the whole map": (1, (7, 7), (7, 7), (1, 1), 2, 33, True),
    "large": (1, (12, 11), (11, 10), (1, 1), 1, 8, True),
    "without a bias": (1, (10, 9), (3, 3), (1, 3), 2, 8, False),
    "of one token": (2, (3, 4), (1, 1), (1, 2), 2, 1, True),
}


@pytest.fixture
def kernels(monkeypatch):
    """The kernels, and no other form, run, with nothing left by chance in what they write."""
    monkeypatch.setitem(backend._state, "backend", "triton")
    with poisoned():
        yield


def make(case: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None, Tensor]:
    """Input, bias and the output's gradient."""
    B, (H, W), kernel, _, heads, D, biased = CASES[case]
    torch.manual_seed(0)
    qkv, dout = torch.randn(B, H, W, 3 * heads * D), torch.randn(B, H, W, heads * D)
    bias = torch.randn(heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1)
    return qkv.to(device, dtype), bias.to(device, dtype) if biased else None, dout.to(device, dtype)


def plain(qkv: Tensor, bias: Tensor | None, heads: int, kernel: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    return tiled_attention(qkv, bias, heads, kernel, dilation, (1, 1), (False, False))


def run(attend, case: str, qkv: Tensor, bias: Tensor | None, dout: Tensor) -> list[Tensor]:
    """Output, and gradients of queries, keys and values, and of the bias."""
    _, _, kernel, dilation, heads, *_ = CASES[case]
    inputs = [t.detach().requires_grad_() for t in (qkv, bias) if t is not None]
    out = attend(inputs[0], None if bias is None else inputs[1], heads, kernel, dilation)
    dqkv, *dbias = torch.autograd.grad(out, inputs, dout)
    return [out.detach(), *dqkv.chunk(3, dim=-1), *dbias]


def assert_exact(case: str, dtype: torch.dtype, device: str = "cpu") -> None:
    inputs = make(case, device, dtype)
    ours, theirs = (run(attend, case, *inputs) for attend in (neighborhood_attention, plain))
    qkv, bias, dout = inputs
    truth = run(plain, case, qkv.double(), None if bias is None else bias.double(), dout.double())
    assert_within_budget(ours, theirs, truth)


def test_in_the_interpreter(request):
    run_interpreted(request.config, __file__)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(kernels, case, dtype):
    assert_exact(case, dtype)


@interpreted
def test_every_tile_means_the_same(kernels, monkeypatch):
    """Small tiles, some empty, as the second class has one row less; each program for the bias has several."""
    monkeypatch.setattr("ops.kernels.neighborhood_attention.tile_config", lambda *args: launch.TileConfig(16, 16, 1, 1))
    monkeypatch.setattr("ops.kernels.neighborhood_attention.BIAS_PROGRAMS", 20)
    assert_exact("classes of two lengths", torch.float32)


@interpreted
def test_strides_change_nothing(kernels):
    qkv, bias, dout = make("of the whole map")
    assert bias is not None
    attend = partial(run, neighborhood_attention, "of the whole map")
    expected = attend(qkv, bias, dout)
    strided = qkv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    bias = bias.transpose(1, 2).contiguous().transpose(1, 2)
    dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
    for ours, theirs in zip(attend(strided, bias, dout), expected, strict=True):
        assert torch.equal(ours, theirs)


@interpreted
@pytest.mark.parametrize("biased", [False, True])
def test_the_operators_keep_their_contracts(biased):
    from ops.kernels.neighborhood_attention import neighborhood_attention_and_lse

    qkv, bias, _ = make("of one token")
    bias = bias.requires_grad_() if bias is not None and biased else None
    torch.library.opcheck(neighborhood_attention_and_lse, (qkv.requires_grad_(), bias, 2, [1, 1], [1, 2]))


@interpreted
def test_the_op_in_half_precision_and_recomputed(kernels):
    """On a map that is padded, and with a bias that stays in float32."""
    torch.manual_seed(0)
    op = NeighborhoodAttention(16, 2, kernel=3, dilation=(2, 1))
    assert_trains_in_half_precision(op, torch.randn(1, 5, 4, 16))


@interpreted
@pytest.mark.parametrize(
    ("stride", "causal", "message"),
    [
        ((2, 1), (False, False), r"it takes strides of 1, not 2 x 1"),
        ((1, 1), (False, True), r"it takes no causal sides"),
    ],
)
def test_what_the_kernels_lack_is_said(kernels, stride, causal, message):
    qkv, bias, _ = make("even kernel")
    with pytest.raises(ValueError, match=f"neighborhood_attention cannot run as a kernel: {message}"):
        neighborhood_attention(qkv, bias, 2, (4, 2), (2, 1), stride, causal)


@interpreted
def test_no_second_derivative(kernels):
    qkv, bias, _ = make("of one token")
    qkv.requires_grad_()
    out = neighborhood_attention(qkv, bias, 2, (1, 1))
    (dqkv,) = torch.autograd.grad(out.sum(), qkv, create_graph=True)
    with pytest.raises(ValueError, match=r"no second derivative: choose ops.backend=torch"):
        dqkv.sum().backward()


@interpreted
def test_flops_are_those_of_the_plain_form(kernels):
    counts = []
    for attend, device in ((neighborhood_attention, "cpu"), (plain, "meta")):
        qkv, bias, dout = make("without a bias", device)
        with FlopCounterMode(display=False) as forward:
            attend(qkv, bias, 2, (3, 3), (1, 3))
        with FlopCounterMode(display=False) as both:
            run(attend, "without a bias", qkv, bias, dout)
        counts.append((forward.get_total_flops(), both.get_total_flops()))
    assert counts[0] == counts[1] and 0 < counts[0][0] < counts[0][1]


def launches(side: int, kernel: int, dilation: int, D: int, dtype: torch.dtype, biased: bool) -> list:
    """Of the kernels, on maps of side x side tokens."""
    from ops.kernels import neighborhood_attention as module

    new = partial(torch.empty, device="meta", dtype=dtype)
    qkv, out = new(2, side, side, 3 * 2 * D), new(2, side, side, 2 * D)
    bias = torch.empty(2, 2 * kernel - 1, 2 * kernel - 1, device="meta") if biased else None
    rule = (2, (kernel, kernel), (dilation, dilation))

    def call() -> None:
        _, lse = module.neighborhood_attention_and_lse._init_fn(qkv, bias, *rule)
        module.neighborhood_attention_backward._init_fn(qkv, bias, out, lse, out, *rule)

    recorded = launches_of(module, call)
    names = ["forward", "backward_queries", "backward_keys", "backward_bias"]
    assert [each.kernel.fn.__name__ for each in recorded] == names[: 4 if biased else 3]
    return recorded


@pytest.mark.parametrize("capability", [80, 90])
def test_nat_fits_the_gpu(capability):
    for each in launches(56, 7, 1, 32, torch.bfloat16, biased=True):
        assert_fits(capability, each)


# Sizes are numbers of the launch: what matters of them is how many tokens a tile holds
SHAPES = [(*shape, D) for shape in ((56, 7, 1), (10, 3, 2), (4, 3, 1)) for D in (16, 24, 32, 64)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("side, kernel, dilation, D", SHAPES)
def test_every_size_fits_the_gpu(side, kernel, dilation, D, biased, capability, dtype):
    for each in launches(side, kernel, dilation, D, dtype, biased):
        assert_fits(capability, each)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_on_the_gpu(monkeypatch, case, dtype):
    monkeypatch.setitem(backend._state, "backend", "triton")
    assert_exact(case, dtype, "cuda")


@on_gpu
def test_the_same_bits_each_time_and_compiled(monkeypatch):
    monkeypatch.setitem(backend._state, "backend", "triton")
    case = "classes of two lengths"
    inputs = make(case, "cuda", torch.bfloat16)
    expected = run(neighborhood_attention, case, *inputs)
    for attend in (neighborhood_attention, torch.compile(neighborhood_attention, fullgraph=True)):
        for ours, theirs in zip(run(attend, case, *inputs), expected, strict=True):
            assert torch.equal(ours, theirs)
