"""The kernels of neighbourhood attention against plain PyTorch in float64, and their compilation for several GPUs."""

from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ops import backend
from ops.attention.neighborhood import NeighborhoodAttention
from ops.kernels import launch
from ops.neighborhood import neighborhood_attention, tiled_attention
from tests.ops.kernels.ahead_of_time import SHARED_MEMORY, Launch, assert_fits, launches_of
from tests.ops.kernels.interpreter import run_interpreted
from tests.ops.kernels.numerics import assert_trains_in_half_precision, assert_within_budget, in_two_types, poisoned

interpreted = pytest.mark.interpreted
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Batch size, (H, W), size of the neighbourhood, dilation, heads, head dimension, whether there is a bias.
CASES = {
    "different sides": (1, (9, 11), (5, 3), (1, 1), 1, 24, True),
    "even size": (1, (9, 6), (4, 2), (2, 1), 2, 16, True),
    "groups of two lengths": (1, (25, 5), (3, 2), (2, 1), 1, 4, True),
    "size of the whole map": (1, (7, 7), (7, 7), (1, 1), 2, 33, True),
    "large size": (1, (11, 11), (11, 10), (1, 1), 1, 8, True),
    "without a bias": (1, (10, 9), (3, 3), (1, 3), 2, 8, False),
    "size of one token": (2, (3, 4), (1, 1), (1, 2), 2, 1, True),
}


@pytest.fixture
def kernels(monkeypatch):
    """Run only the kernels, with uninitialised tensors poisoned."""
    monkeypatch.setitem(backend._state, "backend", "triton")
    with poisoned():
        yield


def make(case: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the input, the bias and the gradient of the output of a case."""
    B, (H, W), size, _, heads, D, biased = CASES[case]
    torch.manual_seed(0)
    qkv, dout = torch.randn(B, H, W, 3 * heads * D), torch.randn(B, H, W, heads * D)
    bias = torch.randn(heads, 2 * size[0] - 1, 2 * size[1] - 1)
    return qkv.to(device, dtype), bias.to(device, dtype) if biased else None, dout.to(device, dtype)


def plain(qkv: Tensor, bias: Tensor | None, heads: int, size: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    return tiled_attention(qkv, bias, heads, size, dilation, (1, 1), (False, False))


def run(attend, case: str, qkv: Tensor, bias: Tensor | None, dout: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of the queries, the keys, the values and the bias."""
    _, _, size, dilation, heads, *_ = CASES[case]
    inputs = [t.detach().requires_grad_() for t in (qkv, bias) if t is not None]
    out = attend(inputs[0], None if bias is None else inputs[1], heads, size, dilation)
    dqkv, *dbias = torch.autograd.grad(out, inputs, dout)
    return [out.detach(), *dqkv.chunk(3, dim=-1), *dbias]


def assert_exact(case: str, dtype: torch.dtype, device: str = "cpu") -> None:
    inputs = make(case, device, dtype)
    qkv, bias, dout = inputs
    exact = run(plain, case, qkv.double(), None if bias is None else bias.double(), dout.double())
    assert_within_budget(run(neighborhood_attention, case, *inputs), run(plain, case, *inputs), exact)


def test_kernels_in_the_interpreter(request):
    run_interpreted(request.config, __file__)


@interpreted
@pytest.mark.parametrize("case, dtype", in_two_types(CASES))
def test_output_and_gradients(kernels, case, dtype):
    assert_exact(case, dtype)


@interpreted
@pytest.mark.parametrize(
    "case, resident, streamed, programs",
    [
        # Some tiles are empty, since the second dilation group has one row less.
        ("groups of two lengths", 16, 16, 4),
        ("even size", 32, 64, 1),
        ("large size", 16, 64, 2),
    ],
)
def test_tiles_and_strips_do_not_change_the_results(kernels, monkeypatch, case, resident, streamed, programs):
    """Check strips of several tiles, with frames of one part, whose sums stay in registers, and of several parts."""
    config = launch.TileConfig(resident, streamed, 1, 1)
    monkeypatch.setattr("ops.kernels.neighborhood_attention.tile_config", lambda *args: config)
    monkeypatch.setattr("ops.kernels.neighborhood_attention.STRIP_PROGRAMS", programs)
    assert_exact(case, torch.float32)


def test_frames_hold_all_keys_of_all_tiles():
    """Check frames against the definition of a neighbourhood, for groups of one or two lengths."""
    from ops.kernels.neighborhood_attention import _frame

    for length, size, side in product(range(1, 20), range(1, 14), range(1, 9)):
        if max(size, side) > length:
            continue
        (before,), (frame,) = _frame((side,), (length,), (size,))
        for group_length in {length, max(length - 1, size)}:
            for valid in range(0, group_length, side):
                first = max(min(valid, group_length - side), 0)
                for query in range(valid, min(valid + side, group_length)):
                    start = min(max(query - size // 2, 0), group_length - size)
                    assert first - before <= start and start + size <= first - before + frame


@interpreted
def test_strides_do_not_change_the_results(kernels):
    qkv, bias, dout = make("size of the whole map")
    assert bias is not None
    attend = partial(run, neighborhood_attention, "size of the whole map")
    expected = attend(qkv, bias, dout)
    strided = qkv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    bias = bias.transpose(1, 2).contiguous().transpose(1, 2)
    dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
    for actual, reference in zip(attend(strided, bias, dout), expected, strict=True):
        assert torch.equal(actual, reference)


@interpreted
@pytest.mark.parametrize("biased", [False, True])
def test_operators_pass_opcheck(biased):
    from ops.kernels.neighborhood_attention import neighborhood_attention_and_lse

    qkv, bias, _ = make("size of one token")
    bias = bias.requires_grad_() if bias is not None and biased else None
    torch.library.opcheck(neighborhood_attention_and_lse, (qkv.requires_grad_(), bias, 2, [1, 1], [1, 2]))


@interpreted
def test_op_in_half_precision_and_with_checkpointing(kernels):
    """Check the op on a map that it pads, and with a bias that autocast leaves in float32."""
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
def test_unsupported_arguments_raise(kernels, stride, causal, message):
    qkv, bias, _ = make("even size")
    with pytest.raises(ValueError, match=f"neighborhood_attention cannot run as a kernel: {message}"):
        neighborhood_attention(qkv, bias, 2, (4, 2), (2, 1), stride, causal)


@interpreted
def test_second_derivative_raises(kernels):
    qkv, bias, _ = make("size of one token")
    qkv.requires_grad_()
    out = neighborhood_attention(qkv, bias, 2, (1, 1))
    (dqkv,) = torch.autograd.grad(out.sum(), qkv, create_graph=True)
    with pytest.raises(ValueError, match=r"no second derivative: choose ops.backend=torch"):
        dqkv.sum().backward()


@interpreted
def test_flops_equal_those_of_plain_pytorch(kernels):
    counts = []
    for attend, device in ((neighborhood_attention, "cpu"), (plain, "meta")):
        qkv, bias, dout = make("without a bias", device)
        with FlopCounterMode(display=False) as forward:
            attend(qkv, bias, 2, (3, 3), (1, 3))
        with FlopCounterMode(display=False) as both:
            run(attend, "without a bias", qkv, bias, dout)
        counts.append((forward.get_total_flops(), both.get_total_flops()))
    assert counts[0] == counts[1] and 0 < counts[0][0] < counts[0][1]


def launches(side: int, size: int, dilation: int, D: int, dtype: torch.dtype, biased: bool) -> list[Launch]:
    """Return the launches of all kernels, forward and backward, on so many maps that a strip has several tiles."""
    from ops.kernels import neighborhood_attention as module

    new = partial(torch.empty, device="meta", dtype=dtype)
    qkv, out = new(4096, side, side, 3 * 2 * D), new(4096, side, side, 2 * D)
    bias = torch.empty(2, 2 * size - 1, 2 * size - 1, device="meta") if biased else None
    settings = (2, (size, size), (dilation, dilation))

    def call() -> None:
        _, lse = module.neighborhood_attention_and_lse._init_fn(qkv, bias, *settings)
        module.neighborhood_attention_backward._init_fn(qkv, bias, out, lse, out, *settings)

    recorded = launches_of(module, call)
    names = ["forward", "backward_queries", "backward_keys"]
    assert [kernel_launch.kernel.fn.__name__ for kernel_launch in recorded] == names
    assert all(kernel_launch.arguments["strip_tiles"] > 1 for kernel_launch in recorded[:2])
    return recorded


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_kernels_of_nat_fit_the_gpu(capability):
    for kernel_launch in launches(56, 7, 1, 32, torch.bfloat16, biased=True):
        assert_fits(capability, kernel_launch)


# Side of the map, size of the neighbourhood, dilation and head dimension. The first three are not compile-time
# constants: they change the code only by the number of tokens that a tile holds.
SHAPES = [(*shape, D) for shape in ((56, 7, 1), (10, 3, 2), (4, 3, 1)) for D in (16, 24, 32, 64)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("side, size, dilation, D", SHAPES)
def test_kernels_of_every_size_fit_the_gpu(side, size, dilation, D, biased, capability, dtype):
    for kernel_launch in launches(side, size, dilation, D, dtype, biased):
        assert_fits(capability, kernel_launch)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_on_the_gpu(monkeypatch, case, dtype):
    monkeypatch.setitem(backend._state, "backend", "triton")
    assert_exact(case, dtype, "cuda")


@on_gpu
def test_repeated_and_compiled_runs_give_the_same_bits(monkeypatch):
    monkeypatch.setitem(backend._state, "backend", "triton")
    case = "groups of two lengths"
    inputs = make(case, "cuda", torch.bfloat16)
    expected = run(neighborhood_attention, case, *inputs)
    for attend in (neighborhood_attention, torch.compile(neighborhood_attention, fullgraph=True)):
        for actual, reference in zip(run(attend, case, *inputs), expected, strict=True):
            assert torch.equal(actual, reference)
