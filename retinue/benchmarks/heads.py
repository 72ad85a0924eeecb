"""Multi-scale deformable attention, the op of DINO and Mask2Former: our form against mmcv's."""

import importlib
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from models.openmmlab import mmcv_ext
from ops.deformable import deformable_attention
from retinue.benchmarks.formulations import PLAIN_PYTORCH, with_backend
from retinue.benchmarks.options import Pair
from retinue.benchmarks.timing import Row, interleave, make_row, peak_memory_mb
from retinue.utils.arithmetic import ceil_div

# DINO's configuration: 8 heads of 32 channels and 4 points on maps of four strides; the decoder has 900 queries.
HEADS, HEAD_DIM, POINTS, STRIDES, QUERIES = 8, 32, 4, (8, 16, 32, 64), 900
OURS, COMPILED_MMCV, PLAIN_MMCV = "ours", "compiled mmcv", "mmcv's plain PyTorch"

Step = Callable[[], tuple[Tensor, ...]]


def make_inputs(batch: int, image_size: Pair, queries: int | None, device: str) -> tuple[Tensor, ...]:
    """Return random inputs of deformable attention.

    Args:
        batch: images of the batch.
        image_size: (height, width) of the images in pixels.
        queries: number of queries; by default every token is a query, as in the encoder.
        device: device of the tensors.

    Returns:
        values (B, N, heads, D), for the N tokens of all maps; sizes (levels, 2) of the maps; indices (levels,) of their
        first tokens; sampling locations (B, Q, heads, levels, points, 2); weights (B, Q, heads, levels, points).
    """
    torch.manual_seed(0)
    shapes = torch.tensor([[ceil_div(side, stride) for side in image_size] for stride in STRIDES])
    tokens = shapes.prod(1)
    starts, num_tokens = tokens.cumsum(0) - tokens, int(tokens.sum())
    sampled = (batch, num_tokens if queries is None else queries, HEADS, len(STRIDES), POINTS)
    weights = torch.rand(sampled).flatten(3).softmax(-1).view(sampled)
    inputs = (torch.randn(batch, num_tokens, HEADS, HEAD_DIM), shapes, starts, torch.rand(*sampled, 2), weights)
    return tuple(tensor.to(device) for tensor in inputs)


def extension_step(module: str, batch: int, image_size: Pair, queries: int | None, device: str) -> Step:
    """Return a step of forward and backward by the two functions of an extension module.

    Args:
        module: name of mmcv's compiled extension.
        batch: as in `make_inputs`.
        image_size: as in `make_inputs`.
        queries: as in `make_inputs`.
        device: as in `make_inputs`.

    Returns:
        A function that returns the output, and the gradients of values, locations and weights.
    """
    extension = importlib.import_module(module)
    value, shapes, starts, locations, weights = make_inputs(batch, image_size, queries, device)
    dout = torch.ones(len(value), locations.shape[1], HEADS * HEAD_DIM, device=value.device)

    def step() -> tuple[Tensor, ...]:
        out = extension.ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step=64)
        grads = [torch.zeros_like(tensor) for tensor in (value, locations, weights)]
        extension.ms_deform_attn_backward(value, shapes, starts, locations, weights, dout, *grads, im2col_step=64)
        return out, *grads

    return step


def autograd_step(
    attend: Callable[..., Tensor], batch: int, image_size: Pair, queries: int | None, device: str
) -> Step:
    """Return a step like `extension_step`, by autograd of a function of values, sizes, locations and weights."""
    value, shapes, _, locations, weights = make_inputs(batch, image_size, queries, device)
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]

    def step() -> tuple[Tensor, ...]:
        out = attend(value, shapes, locations, weights)
        return out.detach(), *torch.autograd.grad(out.sum(), leaves)

    return step


def mmcvs_plain_attention(value: Tensor, spatial_shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Compute `deformable_attention` by mmcv's function in plain PyTorch."""
    # A process that measures memory imports mmcv here first
    mmcv_ext.install()
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, spatial_shapes, locations, weights)


def candidates(device: str) -> dict[str, Callable[..., Step]]:
    """Return the functions that make a step of our form and of its peers, by name; the second is the baseline.

    The baseline is mmcv's compiled kernel if one is installed and the device is a GPU, else mmcv's plain PyTorch
    function, which mmcv itself uses on the CPU. On a GPU, our plain form is measured beside our kernel.
    """
    steps: dict[str, Callable[..., Step]] = {OURS: partial(autograd_step, deformable_attention)}
    cuda = torch.device(device).type == "cuda"
    if cuda and mmcv_ext.is_compiled():
        steps[COMPILED_MMCV] = partial(extension_step, mmcv_ext.NAME)
    else:
        steps[PLAIN_MMCV] = partial(autograd_step, mmcvs_plain_attention)
    if cuda:
        steps[PLAIN_PYTORCH] = partial(autograd_step, with_backend("torch", deformable_attention))
    return steps


def check(steps: Mapping[str, Step]) -> None:
    """Check that all steps compute the same.

    Raises:
        AssertionError: the output or a gradient differs.
    """
    first, *others = (step() for step in steps.values())
    for other in others:
        for actual, expected in zip(first, other, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def benchmark(image_size: Pair, batch: int, device: str, rounds: int = 7) -> list[Row]:
    """Measure forward and backward of each candidate in the encoder and in the decoder of DINO.

    Args:
        image_size: (height, width) of the images in pixels.
        batch: images of the batch.
        device: "cpu", "cuda" or "cuda:N".
        rounds: how often each candidate is timed.

    Returns:
        A row for each part of DINO and candidate; `ratio` is relative to mmcv.
    """
    rows = []
    for part, queries in (("encoder", None), ("decoder", QUERIES)):
        makers = {name: partial(make, batch, image_size, queries, device) for name, make in candidates(device).items()}
        steps = {name: make() for name, make in makers.items()}
        check(steps)
        timings = interleave(steps, rounds)
        baseline = list(timings)[1]
        rows += [
            make_row(
                name,
                timing,
                against=(baseline, timings[baseline]),
                shape=f"{batch}x3x{image_size[0]}x{image_size[1]}",
                dtype="float32",
                device=device,
                peak_mb=peak_memory_mb(makers[name], device),
                part=part,
            )
            for name, timing in timings.items()
        ]
    return rows
