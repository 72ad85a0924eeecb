"""The kernels of the selective scan against plain PyTorch in float64, and their compilation for several GPUs."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ops import backend, create_op
from ops.scan import selective_scan
from tests.ops.kernels.ahead_of_time import SHARED_MEMORY, Launch, assert_fits, launches_of, written_when_compiled
from tests.ops.kernels.interpreter import run_interpreted
from tests.ops.kernels.numerics import assert_trains_in_half_precision, assert_within_budget, in_two_types, poisoned

interpreted = pytest.mark.interpreted
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Case(NamedTuple):
    """Sizes of a call; with `resets`, states start anew at random tokens; rates are multiplied by `rate`."""

    tokens: int
    channels: int = 5
    states: int = 1
    orders: int = 1
    batch: int = 1
    resets: bool = False
    rate: float = 1.0


CASES = {
    "lamamba": Case(5, channels=8, orders=2, batch=2),
    "16 states": Case(9, channels=3, states=16),
    "states that are no power of two": Case(7, states=3),
    "three chunks": Case(21, states=2),
    "a chunk and a token": Case(9, channels=1, orders=7),
    "two blocks of channels": Case(6, channels=33, states=2),
    "resets": Case(19, channels=4, orders=2, resets=True),
    "one token": Case(1, states=2),
    "quickly forgotten": Case(7, states=2, rate=200.0),
}


@pytest.fixture
def kernels(monkeypatch):
    """Run only the kernels, with uninitialised tensors poisoned, and with chunks of 8 tokens."""
    from ops.kernels import selective_scan as module

    monkeypatch.setattr(module, "CHUNK", 8)
    monkeypatch.setitem(backend._state, "backend", "triton")
    with poisoned():
        yield


def make(case: str, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], Tensor | None, Tensor]:
    """Return the inputs of a case, the resets, and the gradient of the output.

    As in the ops, steps, rates and the output are float32.
    """
    c = CASES[case]
    torch.manual_seed(0)
    u, dy = torch.randn(2, c.batch, c.orders, c.tokens, c.channels)
    delta, A = torch.rand(u.shape), -c.rate * torch.rand(c.orders, c.channels, c.states)
    B, C = torch.randn(2, c.batch, c.orders, c.tokens, c.states)
    first = torch.rand(c.orders, c.tokens) < 0.2 if c.resets else None
    inputs = [t.to(device) for t in (u.to(dtype), delta, A, B.to(dtype), C.to(dtype))]
    return inputs, None if first is None else first.to(device), dy.to(device)


def run(scan, inputs: list[Tensor], first: Tensor | None, dy: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return the output and the gradients of u, delta, A, B and C, for inputs cast to `dtype` if given."""
    leaves = [t.to(dtype or t.dtype).detach().requires_grad_() for t in inputs]
    y = scan(*leaves, first)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def plain(*args) -> Tensor:
    with backend.using("torch"):
        return selective_scan(*args)


def assert_exact(case: str, dtype: torch.dtype, device: str = "cpu") -> None:
    arguments = make(case, dtype, device)
    actual, low = run(selective_scan, *arguments), run(plain, *arguments)
    assert_within_budget(actual, low, run(plain, *arguments, torch.float64))


def launches(tokens: int, channels: int, states: int, dtype: torch.dtype, resets: bool = False) -> list[Launch]:
    """Return the launches of the two kernels for two images in four orders."""
    from ops.kernels import selective_scan as module

    new = partial(torch.empty, device="meta")
    shape = (2, 4, tokens)
    inputs = (
        new(*shape, channels, dtype=dtype),
        new(*shape, channels),
        new(4, channels, states),
        new(*shape, states, dtype=dtype),
        new(*shape, states, dtype=dtype),
        new(4, tokens, dtype=torch.bool) if resets else None,
    )

    def call() -> None:
        y, saved = module.selective_scan_and_states._init_fn(*inputs)
        module.selective_scan_backward._init_fn(y, *inputs, saved)

    recorded = launches_of(module, call)
    assert [kernel_launch.kernel.fn.__name__ for kernel_launch in recorded] == ["forward", "backward"]
    return recorded


def test_kernels_in_the_interpreter(request):
    run_interpreted(request.config, __file__)


@interpreted
@pytest.mark.parametrize("case, dtype", in_two_types(CASES))
def test_output_and_gradients(kernels, case, dtype):
    assert_exact(case, dtype)


@interpreted
def test_strides_do_not_change_the_results(kernels):
    inputs, first, dy = make("lamamba", torch.float32)
    expected = run(selective_scan, inputs, first, dy)
    *inputs, dy = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (*inputs, dy))
    for actual, reference in zip(run(selective_scan, inputs, first, dy), expected, strict=True):
        assert torch.equal(actual, reference)


@interpreted
def test_operators_pass_opcheck():
    from ops.kernels.selective_scan import selective_scan_and_states

    inputs, first, _ = make("states that are no power of two", torch.float32)
    torch.library.opcheck(selective_scan_and_states, (*(t.requires_grad_() for t in inputs), first))


@interpreted
def test_an_op_in_half_precision_and_with_checkpointing(kernels):
    torch.manual_seed(0)
    assert_trains_in_half_precision(create_op("local_scan", dim=6, num_heads=1), torch.randn(1, 2, 3, 6))


@interpreted
def test_second_derivative_raises(kernels):
    inputs, first, _ = make("one token", torch.float32)
    u = inputs[0].requires_grad_()
    (du,) = torch.autograd.grad(selective_scan(u, *inputs[1:], first=first).square().sum(), u, create_graph=True)
    with pytest.raises(ValueError, match=r"no second derivative: choose ops.backend=torch"):
        du.sum().backward()


@interpreted
def test_too_many_states_raise_the_reason(kernels):
    (u, delta, *_), _, _ = make("one token", torch.float32)
    weights = torch.zeros(1, 1, 1, 65)
    with pytest.raises(ValueError, match=r"it takes at most 64 states, not 65"):
        selective_scan(u, delta, torch.zeros(1, 5, 65), weights, weights)


@interpreted
@pytest.mark.parametrize("case", ["lamamba", "states that are no power of two"])
def test_flops_equal_those_of_plain_pytorch(kernels, case):
    counts = []
    for scan in (selective_scan, plain):
        with FlopCounterMode(display=False) as both:
            run(scan, *make(case, torch.float32))
        counts.append(both.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_forced_kernels_that_cannot_run_raise_the_reason(monkeypatch):
    monkeypatch.setitem(backend._state, "backend", "triton")
    inputs, first, _ = make("one token", torch.float32, "meta")
    with pytest.raises(ValueError, match=r"selective_scan cannot run as a kernel: it needs a CUDA device, not meta"):
        selective_scan(*inputs, first=first)


@pytest.mark.parametrize(
    "capability, states, dtype, resets",
    [(80, 16, torch.float32, False), (90, 1, torch.bfloat16, True), (100, 16, torch.bfloat16, False)],
)
def test_kernels_fit_the_gpu(capability, states, dtype, resets):
    for kernel_launch in launches(784, 192, states, dtype, resets):
        assert_fits(capability, kernel_launch)


def test_torch_compile_sees_the_kernels(monkeypatch):
    from ops.kernels.selective_scan import selective_scan_backward

    monkeypatch.setitem(backend._state, "backend", "triton")
    half, sums, shape = torch.bfloat16, torch.float32, (2, 4, 70)
    weights = ((*shape, 2), half), ((*shape, 2), half)
    inputs = ((*shape, 24), half), ((*shape, 24), sums), ((4, 24, 2), sums), *weights
    assert [set(names) for names in written_when_compiled(selective_scan, *inputs)] == [{"y", "states"}]
    backward = written_when_compiled(
        lambda dy, *args: selective_scan_backward(dy, *args[:-1], None, args[-1]),
        ((*shape, 24), sums), *inputs, ((8, 2, 24, 2), sums),
    )  # fmt: skip
    # The scratch of a program is written, too
    assert [set(names) for names in backward] == [{"du", "ddelta", "dA", "dB", "dC", "scratch"}]


@pytest.mark.slow
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize(
    ("tokens", "channels", "states"), [(49, 16, 3), (3136, 192, 1), (784, 32, 16), (49, 16, 32), (196, 384, 64)]
)
def test_kernels_of_every_size_fit_the_gpu(tokens, channels, states, capability, dtype, resets):
    for kernel_launch in launches(tokens, channels, states, dtype, resets):
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
    arguments = make("three chunks", torch.bfloat16, "cuda")
    expected = run(selective_scan, *arguments)
    for scan in (selective_scan, torch.compile(selective_scan, fullgraph=True)):
        for actual, reference in zip(run(scan, *arguments), expected, strict=True):
            assert torch.equal(actual, reference)
