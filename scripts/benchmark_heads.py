"""Multi-scale deformable attention, the op of DINO and Mask2Former: the stand-in for mmcv's extension against others.

    python scripts/benchmark_heads.py --device cuda --image-size 800 1333

Against mmcv's compiled kernel where one is installed and the tensors are on a GPU, else against mmcv's own function in
plain PyTorch, which it takes on the CPU. Shapes are those of DINO's encoder and decoder at the image size: maps of
strides 8 to 64, 8 heads of 32 channels, 4 points. Forward and backward together, as in training: like the kernel, the
stand-in keeps no samples from the one for the other, and takes them again.
"""

import argparse
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.openmmlab import mmcv_ext
from retinue.benchmarks.timing import Row, interleave, make_row, peak_memory_mb, pick_device, print_rows, write_csv
from retinue.utils.errors import user_errors

HEADS, WIDTH, POINTS, STRIDES, QUERIES = 8, 32, 4, (8, 16, 32, 64), 900
STAND_IN = "stand-in"

Step = Callable[[], tuple[Tensor, ...]]


def inputs(batch: int, size: tuple[int, int], queries: int | None, device: str) -> tuple[Tensor, ...]:
    """Values, sizes, starts, locations and weights; without `queries` each token asks, as in the encoder."""
    torch.manual_seed(0)
    shapes = torch.tensor([[-(-size[0] // stride), -(-size[1] // stride)] for stride in STRIDES])
    tokens = shapes.prod(1)
    starts, number = tokens.cumsum(0) - tokens, int(tokens.sum())
    places = (batch, queries or number, HEADS, len(STRIDES), POINTS)
    weights = torch.rand(places).flatten(3).softmax(-1).view(places)
    drawn = (torch.randn(batch, number, HEADS, WIDTH), shapes, starts, torch.rand(*places, 2), weights)
    return tuple(tensor.to(device) for tensor in drawn)


def step_with(module: str, *given: Any) -> Step:
    """Forward and backward by the two functions of an extension, compiled or ours."""
    extension = importlib.import_module(module)
    value, shapes, starts, locations, weights = inputs(*given)
    up = torch.ones(len(value), locations.shape[1], HEADS * WIDTH, device=value.device)

    def step() -> tuple[Tensor, ...]:
        attended = extension.ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step=64)
        grads = [torch.zeros_like(tensor) for tensor in (value, locations, weights)]
        extension.ms_deform_attn_backward(value, shapes, starts, locations, weights, up, *grads, im2col_step=64)
        return attended, *grads

    return step


def plain_step(*given: Any) -> Step:
    """The same by mmcv's function in plain PyTorch and autograd."""
    mmcv_ext.install()
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    value, shapes, _, locations, weights = inputs(*given)
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]

    def step() -> tuple[Tensor, ...]:
        attended = multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
        return attended.detach(), *torch.autograd.grad(attended.sum(), leaves)

    return step


def candidates(device: str) -> dict[str, Callable[..., Step]]:
    found: dict[str, Callable[..., Step]] = {STAND_IN: partial(step_with, mmcv_ext.__name__)}
    if torch.device(device).type == "cuda" and importlib.util.find_spec(mmcv_ext.NAME) is not None:
        return found | {"compiled mmcv": partial(step_with, mmcv_ext.NAME)}
    return found | {"mmcv's plain PyTorch": plain_step}


def check(steps: Mapping[str, Step]) -> None:
    """Raise where results or gradients differ."""
    first, second = (step() for step in steps.values())
    for ours, theirs in zip(first, second, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def benchmark(size: tuple[int, int], batch: int, device: str, rounds: int = 7) -> list[Row]:
    """A row for each candidate on each part of DINO."""
    rows = []
    for part, queries in (("encoder", None), ("decoder", QUERIES)):
        makers = {name: partial(make, batch, size, queries, device) for name, make in candidates(device).items()}
        steps = {name: make() for name, make in makers.items()}
        check(steps)
        timings = interleave(steps, rounds)
        other = next(name for name in timings if name != STAND_IN)
        rows += [
            make_row(
                name,
                timing,
                against=(other, timings[other]),
                shape=f"{batch}x3x{size[0]}x{size[1]}",
                dtype="float32",
                device=device,
                peak_mb=peak_memory_mb(makers[name], device),
                part=part,
            )
            for name, timing in timings.items()
        ]
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Time deformable attention.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--image-size", type=int, nargs=2, default=[800, 1333], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    device = str(pick_device(args.device))
    rows = benchmark((args.image_size[0], args.image_size[1]), args.batch_size, device, args.rounds)
    print_rows(rows)
    if args.csv:
        write_csv(args.csv, rows)


if __name__ == "__main__":
    with user_errors():
        main()
