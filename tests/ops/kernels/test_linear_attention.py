"""The kernels of linear attention against plain PyTorch in float64, and their compilation for several GPUs."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ops import backend, create_op
from ops.kernels import launch
from ops.linear import linear_attention, max_head_dim
from tests.ops.kernels.ahead_of_time import SHARED_MEMORY, Launch, assert_fits, launches_of, written_when_compiled
from tests.ops.kernels.interpreter import run_interpreted
from tests.ops.kernels.numerics import assert_trains_in_half_precision, assert_within_budget, poisoned

interpreted = pytest.mark.interpreted
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Case(NamedTuple):
    """Arguments of a call of `linear_attention` with N queries and M keys; 0 for keys and values beside the queries.

    Heads have D channels of queries and keys and E channels of values; all inputs are multiplied by `size`.
    """

    features: str
    normalization: str
    N: int = 21
    M: int = 0
    D: int = 8
    E: int = 8
    heads: int = 1
    batch: int = 1
    learned: bool = False
    min_sum: float = 1e-6
    size: float = 1.0


CASES = {
    "elu": Case("elu", "sum", heads=2, batch=2),
    "elu, no normalization": Case("elu", "none", N=5, M=37, D=5, E=3, heads=2),
    "l2vit": Case("relu", "sum", D=24, E=24, heads=2, learned=True, min_sum=60.0),
    "relu, cross": Case("relu", "sum", N=50, M=17, D=3, E=33, min_sum=1.0, batch=2),
    "relu, no normalization": Case("relu", "none", N=1, M=1, learned=True),
    "inline": Case("identity", "subtract", heads=2, D=16, E=16, learned=True),
    "subtraction, cross": Case("elu", "subtract", N=17, M=65, E=24, heads=2),
    "identity": Case("identity", "none", N=33, D=1, E=1, batch=2, learned=True),
    "softmax": Case("softmax", "none", N=70, heads=2, learned=True),
    "softmax, cross": Case("softmax", "none", N=3, M=70, D=33, E=5, batch=2),
    "wide heads": Case("elu", "sum", N=19, M=9, D=128, E=100),
    "many tokens": Case("relu", "sum", N=150),
    "no smallest sum": Case("relu", "sum", D=24, E=24, min_sum=0.0),
    "large sums": Case("elu", "none", N=40, size=30.0),
    "large softmax": Case("softmax", "none", N=40, size=24.0),
}


def cases(dtype: torch.dtype) -> list[str]:
    """Return the cases whose heads the kernels take in a type, on the GPU if there is one."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return [
        name
        for name, case in CASES.items()
        if max(case.D, case.E) <= max_head_dim(dtype, case.normalization, capability)
    ]


@pytest.fixture
def kernels(monkeypatch):
    """Run only the kernels, with uninitialised tensors poisoned."""
    monkeypatch.setitem(backend._state, "backend", "triton")
    with poisoned():
        yield


def make(case: str, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], Tensor]:
    """Return the inputs of a case, rounded to `dtype`, and the gradient of the output."""
    c = CASES[case]
    torch.manual_seed(0)
    widths = (c.D, c.D, c.E) if c.M else (3 * c.D,)
    lengths = (c.N, c.M, c.M) if c.M else (c.N,)
    inputs = [c.size * torch.randn(c.batch, n, c.heads * w) for n, w in zip(lengths, widths, strict=True)]
    if c.learned:
        inputs.append(torch.rand(c.heads) + 0.5)
    dout = torch.randn(c.batch, c.N, c.heads * c.E)
    return [t.to(device, dtype) for t in inputs], dout.to(device, dtype)


def run(attend, case: str, inputs: list[Tensor], dout: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return the output, and the gradients of queries, keys, values and scale."""
    c = CASES[case]
    leaves = [t.to(dtype).requires_grad_() for t in inputs]
    tokens, scale = (leaves[:-1], leaves[-1]) if c.learned else (leaves, 0.7)
    qkv = tuple(tokens) if c.M else tokens[0]
    out = attend(qkv, c.heads, c.features, c.normalization, scale, c.min_sum)
    first, *others = torch.autograd.grad(out, leaves, dout.to(dtype))
    return [out.detach(), *((first,) if c.M else first.chunk(3, dim=-1)), *others]


def plain(*args) -> Tensor:
    with backend.using("torch"):
        return linear_attention(*args)


def assert_exact(case: str, dtype: torch.dtype, device: str = "cpu") -> None:
    inputs, dout = make(case, dtype, device)
    exact = run(plain, case, inputs, dout, torch.float64)
    assert_within_budget(run(linear_attention, case, inputs, dout, dtype), run(plain, case, inputs, dout, dtype), exact)


def launches(shape: tuple[int, int, int], dtype: torch.dtype, features: str, normalization: str) -> list[Launch]:
    """Return the launches of the six kernels for (N, D, E), with two heads and a learned scale."""
    from ops.kernels import linear_attention as module

    N, D, E = shape
    new = partial(torch.empty, device="meta", dtype=dtype)
    inputs = new(2, N, 2 * D), new(2, N, 2 * D), new(2, N, 2 * E), new(2)
    settings = (2, features, normalization, 0.5, 1e-6)

    def call() -> None:
        out, *state = module.linear_attention_and_state._init_fn(*inputs, *settings)
        module.linear_attention_backward._init_fn(out, *inputs, *state, *settings)

    recorded = launches_of(module, call)
    forward, backward = ["sum_keys", "combine_keys", "attend"], ["backward_queries", "combine_queries", "backward_keys"]
    assert [kernel_launch.kernel.fn.__name__ for kernel_launch in recorded] == forward + backward
    return recorded


def test_kernels_in_the_interpreter(request):
    run_interpreted(request.config, __file__)


@interpreted
@pytest.mark.parametrize(
    "case, dtype", [(case, dtype) for dtype in (torch.float32, torch.float16) for case in cases(dtype)]
)
def test_output_and_gradients(kernels, case, dtype):
    assert_exact(case, dtype)


@interpreted
@pytest.mark.parametrize("case", ["many tokens", "inline", "softmax"])
def test_chunks_and_tile_sizes_do_not_change_the_results(kernels, monkeypatch, case):
    """Chunks have one tile each, as on a GPU, or several, because few programs suffice or few chunks may be added."""
    from ops.kernels import linear_attention as module

    c = CASES[case]
    shape = (c.N, c.D, c.E)
    for programs, added, streamed in ((1, 32, 16), (64, 3, 32), (64, 32, 16)):
        monkeypatch.setattr(module, "PROGRAMS", programs)
        monkeypatch.setattr(module, "MAX_ADDED_CHUNKS", added)
        for kernel in ("sum_keys", "attend", "backward_queries", "backward_keys"):
            for tokens in (c.N, c.M):
                key = (f"linear_attention.{kernel}", (0, 0), 4, max(launch.padded(c.D), launch.padded(c.E)), tokens)
                monkeypatch.setitem(launch.TUNED, key, launch.TileConfig(0, streamed, 1, 1))
        recorded = launches(shape, torch.float32, c.features, c.normalization)
        assert {r.arguments["STREAMED"] for r in recorded if "STREAMED" in r.arguments} == {streamed}
        assert_exact(case, torch.float32)


@interpreted
def test_strides_do_not_change_the_results(kernels):
    case = "softmax, cross"
    inputs, dout = make(case, torch.float32)
    expected = run(linear_attention, case, inputs, dout, torch.float32)
    for dims in ((0, 1), (1, 2)):
        *strided, strided_dout = (t.transpose(*dims).contiguous().transpose(*dims) for t in (*inputs, dout))
        results = run(linear_attention, case, strided, strided_dout, dout.dtype)
        for actual, reference in zip(results, expected, strict=True):
            assert torch.equal(actual, reference)


@interpreted
def test_types_may_differ(kernels):
    """Under autocast, keys may be float32, from a norm, and values float16, from a linear layer."""
    q, k, v = (torch.randn(1, 20, 16, requires_grad=True) for _ in range(3))
    out = linear_attention((q, k, v.half()), 2)
    assert out.dtype == torch.float16 and torch.allclose(out.float(), plain((q, k, v), 2), atol=2e-2)
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(out.float().sum(), (q, k, v)))


@interpreted
def test_operators_pass_opcheck():
    from ops.kernels.linear_attention import linear_attention_and_state

    packed = torch.randn(1, 3, 12, requires_grad=True)
    torch.library.opcheck(linear_attention_and_state, (packed, *[None] * 3, 2, "identity", "subtract", 1.0, 1.0))


@interpreted
@pytest.mark.parametrize("name", ["inline", "enhanced_linear"])
def test_ops_in_half_precision_and_with_checkpointing(kernels, name):
    torch.manual_seed(0)
    assert_trains_in_half_precision(create_op(name, dim=16, num_heads=2), torch.randn(1, 7, 8, 16))


@interpreted
def test_second_derivative_raises(kernels):
    qkv = torch.randn(1, 4, 12, requires_grad=True)
    (dqkv,) = torch.autograd.grad(linear_attention(qkv, 1).sum(), qkv, create_graph=True)
    with pytest.raises(ValueError, match=r"no second derivative: choose ops.backend=torch"):
        dqkv.sum().backward()


def test_forced_kernels_that_cannot_run_raise_the_reason(monkeypatch):
    monkeypatch.setitem(backend._state, "backend", "triton")
    with pytest.raises(ValueError, match=r"linear_attention cannot run as a kernel: it needs a CUDA device, not meta"):
        linear_attention(torch.zeros(1, 4, 12, device="meta"), 1)


@interpreted
def test_heads_that_are_too_wide_raise_the_reason(kernels):
    with pytest.raises(ValueError, match=r"it takes heads of at most 64 channels, not 65"):
        linear_attention((torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), torch.zeros(1, 4, 65)), 1)


@interpreted
@pytest.mark.parametrize("case", ["elu", "relu, cross", "inline", "softmax, cross"])
def test_flops_equal_those_of_plain_pytorch(kernels, case):
    counts = []
    for attend in (linear_attention, plain):
        inputs, dout = make(case, torch.float32)
        with FlopCounterMode(display=False) as both:
            run(attend, case, inputs, dout, torch.float32)
        counts.append(both.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    "capability, shape, dtype, form",
    [
        (80, (196, 64, 64), torch.float32, ("identity", "subtract")),
        (90, (3136, 32, 32), torch.bfloat16, ("relu", "sum")),
        (100, (784, 64, 64), torch.bfloat16, ("softmax", "none")),
    ],
)
def test_kernels_fit_the_gpu(capability, shape, dtype, form):
    for kernel_launch in launches(shape, dtype, *form):
        assert_fits(capability, kernel_launch)


def test_torch_compile_sees_the_kernels(monkeypatch):
    from ops.kernels.linear_attention import linear_attention_backward

    monkeypatch.setitem(backend._state, "backend", "triton")
    half, sums = torch.bfloat16, torch.float32
    qkv, scale = ((2, 49, 96), half), ((2,), sums)
    forward = written_when_compiled(lambda x, s: linear_attention(x, 2, "identity", "subtract", s), qkv, scale)
    parts, means = ["states", "key_sums", "value_sums"], ["state", "key_sum", "value_mean"]
    assert [set(names) for names in forward] == [set(parts), set(means), {"out"}]
    state = ((4, 16, 16), sums), ((4, 16), sums), ((0, 16), sums), ((4, 16), sums)
    backward = written_when_compiled(
        lambda dout, x, s, *rest: linear_attention_backward(
            dout, x, None, None, s, *rest, 2, "identity", "subtract", 1.0, 1.0
        ),
        ((2, 49, 32), half), qkv, scale, *state,
    )  # fmt: skip
    assert [set(names) for names in backward] == [
        {"dq", "dstates", "dvalue_means"},
        {"dstate", "dkey", "dvalue", "dgain"},
        {"dk", "dv"},
    ]


@pytest.mark.slow
@pytest.mark.parametrize("form", [("elu", "sum"), ("relu", "none"), ("identity", "subtract"), ("softmax", "none")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("shape", [(49, 16, 16), (3136, 32, 32), (196, 64, 64), (784, 128, 128), (784, 64, 128)])
def test_kernels_of_every_size_fit_the_gpu(shape, capability, dtype, form):
    if max(shape[1:]) > max_head_dim(dtype, form[1], divmod(capability, 10)):
        pytest.skip("the kernels do not take these heads")
    for kernel_launch in launches(shape, dtype, *form):
        assert_fits(capability, kernel_launch)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_the_gpu(monkeypatch, dtype):
    monkeypatch.setitem(backend._state, "backend", "triton")
    for case in cases(dtype):
        assert_exact(case, dtype, "cuda")


@on_gpu
def test_repeated_and_compiled_runs_give_the_same_bits(monkeypatch):
    monkeypatch.setitem(backend._state, "backend", "triton")
    case = "l2vit"
    inputs, dout = make(case, torch.bfloat16, "cuda")
    expected = run(linear_attention, case, inputs, dout, torch.bfloat16)
    for attend in (linear_attention, torch.compile(linear_attention, fullgraph=True)):
        for actual, reference in zip(run(attend, case, inputs, dout, torch.bfloat16), expected, strict=True):
            assert torch.equal(actual, reference)
