"""The kernels of deformable attention against plain PyTorch in float64, and their compilation for several GPUs."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ops import backend
from ops.deformable import deformable_attention
from tests.ops.kernels.ahead_of_time import SHARED_MEMORY, Launch, assert_fits, launches_of, written_when_compiled
from tests.ops.kernels.interpreter import run_interpreted
from tests.ops.kernels.numerics import assert_within_budget, in_two_types, poisoned

interpreted = pytest.mark.interpreted
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Case(NamedTuple):
    """Shapes of a call; locations are spread over the map and a margin of `margin` times its size on each side."""

    shapes: tuple[tuple[int, int], ...]
    queries: int = 5
    points: int = 4
    heads: int = 1
    D: int = 8
    batch: int = 1
    margin: float = 0.1


CASES = {
    "two levels": Case(((3, 5), (2, 2)), heads=2, batch=2),
    "points and channels that are no power of two": Case(((4, 3), (1, 2), (1, 1)), points=3, D=5),
    "one point": Case(((5, 4),), queries=37, points=1, D=24),
    "many samples of a token": Case(((2, 2),), queries=40, points=4, D=33),
    "mostly outside": Case(((3, 4), (2, 3)), queries=20, margin=3.0, batch=2),
}


@pytest.fixture
def kernels(monkeypatch):
    """Run only the kernels, with uninitialised tensors poisoned."""
    monkeypatch.setitem(backend._state, "backend", "triton")
    with poisoned():
        yield


def make(case: str, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, list[Tensor], Tensor]:
    """Return the shapes of the levels, the values, locations and weights, and the gradient of the output."""
    c = CASES[case]
    torch.manual_seed(0)
    samples = (c.batch, c.queries, c.heads, len(c.shapes), c.points)
    value = torch.randn(c.batch, sum(h * w for h, w in c.shapes), c.heads, c.D)
    locations = (1 + 2 * c.margin) * torch.rand(*samples, 2) - c.margin
    dout = torch.randn(c.batch, c.queries, c.heads * c.D)
    # Autocast leaves locations in float32
    inputs = [value.to(dtype), locations, torch.rand(samples).to(dtype)]
    return torch.tensor(c.shapes).to(device), [t.to(device) for t in inputs], dout.to(device, dtype)


def run(attend, shapes: Tensor, inputs: list[Tensor], dout: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return the output and the gradients of values, locations and weights, for inputs cast to `dtype` if given."""
    value, locations, weights = leaves = [t.to(dtype or t.dtype).detach().requires_grad_() for t in inputs]
    out = attend(value, shapes, locations, weights)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def plain(*args) -> Tensor:
    with backend.using("torch"):
        return deformable_attention(*args)


def assert_exact(case: str, dtype: torch.dtype, device: str = "cpu") -> None:
    arguments = make(case, dtype, device)
    actual, low = run(deformable_attention, *arguments), run(plain, *arguments)
    assert_within_budget(actual, low, run(plain, *arguments, torch.float64))


def launches(queries: int, sides: list[int], D: int, dtype: torch.dtype) -> list[Launch]:
    """Return the launches of the three kernels for square maps, 8 heads and 4 points."""
    from ops.kernels import deformable_attention as module

    new = partial(torch.empty, device="meta", dtype=dtype)
    value, samples = new(2, sum(side**2 for side in sides), 8, D), (2, queries, 8, len(sides), 4)
    inputs = value, torch.empty(len(sides), 2, dtype=torch.long, device="meta"), new(*samples, 2), new(samples)

    def call() -> None:
        out = module.deformable_attention_op._init_fn(*inputs)
        module.deformable_attention_backward._init_fn(out, *inputs)

    recorded = launches_of(module, call)
    names = [kernel_launch.kernel.fn.__name__ for kernel_launch in recorded]
    assert names == ["forward", "backward_samples", "backward_values"]
    return recorded


def test_kernels_in_the_interpreter(request):
    run_interpreted(request.config, __file__)


@interpreted
@pytest.mark.parametrize("case, dtype", in_two_types(CASES))
def test_output_and_gradients(kernels, case, dtype):
    assert_exact(case, dtype)


@interpreted
def test_strides_do_not_change_the_results(kernels):
    shapes, inputs, dout = make("two levels", torch.float32)
    expected = run(deformable_attention, shapes, inputs, dout)
    shapes, dout, *inputs = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (shapes, dout, *inputs))
    for actual, reference in zip(run(deformable_attention, shapes, inputs, dout), expected, strict=True):
        assert torch.equal(actual, reference)


@interpreted
def test_locations_far_away_have_no_part(kernels):
    """Coordinates that fit no integer are outside the map, and their gradients are 0."""
    shapes, inputs, dout = make("one point", torch.float32)
    inputs[1] = torch.where(inputs[1] < 0.5, -1e30, 1e30)
    for result in run(deformable_attention, shapes, inputs, dout):
        assert torch.equal(result, torch.zeros_like(result))


@interpreted
def test_operators_pass_opcheck():
    from ops.kernels.deformable_attention import deformable_attention_op

    shapes, (value, locations, weights), _ = make("points and channels that are no power of two", torch.float32)
    arguments = (value.requires_grad_(), shapes, locations.requires_grad_(), weights.requires_grad_())
    torch.library.opcheck(deformable_attention_op, arguments)


@interpreted
def test_second_derivative_raises(kernels):
    shapes, inputs, _ = make("one point", torch.float32)
    value = inputs[0].requires_grad_()
    out = deformable_attention(value, shapes, *inputs[1:])
    (dvalue,) = torch.autograd.grad(out.square().sum(), value, create_graph=True)
    with pytest.raises(ValueError, match=r"no second derivative: choose ops.backend=torch"):
        dvalue.sum().backward()


def test_forced_kernels_that_cannot_run_raise_the_reason(monkeypatch):
    monkeypatch.setitem(backend._state, "backend", "triton")
    shapes, inputs, _ = make("one point", torch.float32, "meta")
    with pytest.raises(
        ValueError, match=r"deformable_attention cannot run as a kernel: it needs a CUDA device, not me"
    ):
        deformable_attention(inputs[0], shapes, *inputs[1:])


@interpreted
def test_too_many_samples_raise_the_reason(kernels):
    value, samples = torch.zeros(1, 4, 1, 8), (1, 2**27, 1, 1, 16)
    locations = torch.zeros(1).expand(*samples, 2)
    with pytest.raises(ValueError, match=r"numbers samples and cells of the maps below 2\^31, not 2147483648"):
        deformable_attention(value, torch.tensor([[2, 2]]), locations, torch.zeros(1).expand(samples))


@pytest.mark.parametrize(
    "capability, queries, D, dtype",
    [(80, 900, 64, torch.float32), (90, 2125, 32, torch.bfloat16), (100, 2125, 32, torch.float32)],
)
def test_kernels_of_dino_fit_the_gpu(capability, queries, D, dtype):
    for kernel_launch in launches(queries, [40, 20, 10, 5], D, dtype):
        assert_fits(capability, kernel_launch)


def test_torch_compile_sees_the_kernels(monkeypatch):
    from ops.kernels.deformable_attention import deformable_attention_backward

    monkeypatch.setitem(backend._state, "backend", "triton")
    half = torch.bfloat16
    inputs = ((2, 125, 8, 32), half), ((2, 2), torch.long), ((2, 30, 8, 2, 4, 2), torch.float), ((2, 30, 8, 2, 4), half)
    assert written_when_compiled(deformable_attention, *inputs) == [["out"]]
    backward = written_when_compiled(lambda *args: deformable_attention_backward(*args), ((2, 30, 256), half), *inputs)
    assert [set(names) for names in backward] == [{"dlocations", "dweights", "cells"}, {"dvalue"}]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("D", [16, 32, 64])
def test_kernels_of_every_size_fit_the_gpu(D, capability, dtype):
    for kernel_launch in launches(900, [40, 20, 10, 5], D, dtype):
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
    arguments = make("many samples of a token", torch.bfloat16, "cuda")
    expected = run(deformable_attention, *arguments)
    for attend in (deformable_attention, torch.compile(deformable_attention, fullgraph=True)):
        for actual, reference in zip(run(attend, *arguments), expected, strict=True):
            assert torch.equal(actual, reference)
