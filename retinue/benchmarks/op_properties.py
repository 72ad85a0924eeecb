"""Properties of an op that follow from running it: MACs, how they grow, which tokens reach a token, and time."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ops import Place, create_op
from ops.losses import Losses, loss_weights
from ops.registry import Spec, create_context
from retinue.benchmarks.timing import Timing, interleave

SECOND_STAGE = Place(stage=1, block=0, depth=2, stride=8)
# Sides of maps between which the growth of MACs is measured, in tokens: no projection matters beside N² there.
LARGE_SIDES = (256, 512)
# Side of the map in which the reach is measured, in tokens.
REACH_SIDE = 28
# Swin-T at an image of 224 pixels: side of the map -> channels, heads and place of the first block.
LAYERS = {56: (96, 3, Place(0, 0, 2, 4)), 14: (384, 12, Place(2, 0, 6, 16))}


def make_layer(
    spec: Spec, dim: int, heads: int, place: Place, side: int, device: str = "cpu", batch: int = 1
) -> tuple[nn.Module, Callable[[], Tensor], Tensor]:
    """Build an op with its context.

    Returns:
        The modules, a function that runs the op, and its input (batch, side, side, dim).
    """
    with torch.device(device):
        op = create_op(spec, dim, heads, place=place)
        modules = nn.ModuleDict({"op": op})
        if getattr(op, "make_context", None) is not None:
            modules["context"] = create_context(spec, dim, heads, place=place)
        x = torch.randn(batch, side, side, dim)

    def run() -> Tensor:
        keywords = {"context": modules["context"](x)} if "context" in modules else {}
        if op.training and loss_weights(op):
            keywords["losses"] = Losses()
        return op(x, **keywords)

    return modules, run, x


def count_macs(spec: Spec, side: int, dim: int = 32, heads: int = 2, place: Place = SECOND_STAGE) -> int:
    """Return the multiply-accumulates of an op on a map of side x side tokens, counted on the meta device.

    Matrix products, convolutions and attention are counted; Fourier transforms and sums are not.
    """
    modules, run, _ = make_layer(spec, dim, heads, place, side, "meta")
    modules.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() // 2


def cost_exponent(spec: Spec) -> float | None:
    """Return the exponent with which MACs grow with the number of tokens of large maps; None without MACs."""
    small, large = (count_macs(spec, side) for side in LARGE_SIDES)
    return math.log(large / small) / (2 * math.log(LARGE_SIDES[1] / LARGE_SIDES[0])) if small else None


def reach(spec: Spec) -> tuple[int, int, int]:
    """Measure from which tokens of a map of 28 x 28 the value of one token in the middle follows.

    These are the tokens on which the output of an op of random weights has a gradient, in the first block of a stage.

    Returns:
        The number of tokens, and the height and the width of the rectangle around them.
    """
    torch.manual_seed(0)
    modules, run, x = make_layer(spec, 32, 2, SECOND_STAGE, REACH_SIDE)
    modules.double().eval()
    x.data = x.double()
    x.requires_grad_()
    middle = REACH_SIDE // 2
    [gradient] = torch.autograd.grad(run()[0, middle, middle].square().sum(), x)
    rows, columns = gradient[0].abs().sum(-1).nonzero(as_tuple=True)
    return len(rows), int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1


def time_ops(names: Iterable[str], side: int, batch: int, rounds: int) -> dict[str, Timing]:
    """Time the forward and backward pass of ops as layers of Swin-T, all in turn, in float32 on the CPU.

    Args:
        names: Ops to time.
        side: Side of the map in tokens, a key of `LAYERS`.
        batch: Number of maps.
        rounds: How often each op is timed.
    """
    return interleave({name: _training_step(name, side, batch) for name in names}, rounds)


def _training_step(name: str, side: int, batch: int) -> Callable[[], object]:
    dim, heads, place = LAYERS[side]
    modules, run, x = make_layer(name, dim, heads, place, side, batch=batch)
    inputs = (x.requires_grad_(), *modules.parameters())
    return lambda: torch.autograd.grad(run().sum(), inputs, allow_unused=True)
