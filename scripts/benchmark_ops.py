"""Bi-level routing attention against the authors' formulation, on the CPU: in a whole BiFormer and alone.

    python scripts/benchmark_ops.py --threads 2 --csv ops.csv

The whole net is biformer_tiny at 224 pixels, batch 8, fp32, against the same net and weights in which only
`routed_attention` gathers the windows' keys and values as the authors do. Alone, `routed_attention` stands in the
shapes of its three stages, and its two formulations on maps of several sizes, which shows from where on gathering is
the quicker (`ops.functional.MASKED_TOKENS`). No figure is printed before outputs and gradients agree.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import timm
import torch
from torch import Tensor

import models  # noqa: F401  # registers our nets
from benchmarking import Row, interleave, make_row, peak_memory_mb, print_rows, write_csv
from ops import functional
from ops.attention import bilevel_routing
from ops.functional import merge_heads, split_heads
from ops.windows import from_windows, to_windows
from runs.errors import user_errors

GATHER = "gather, matmul, softmax"


def authors_attention(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, grid: tuple[int, int], num_heads: int, scale: float
) -> Tensor:
    """`routed_attention` as rayleizhu/BiFormer computes it."""
    size = q.shape[1:3]
    q, kv = to_windows(q, grid), to_windows(torch.cat((k, v), dim=-1), grid)
    B, P, T, C = kv.shape
    places = index.view(B, P, -1, 1, 1).expand(-1, -1, -1, T, C)
    kv = torch.gather(kv.unsqueeze(1).expand(-1, P, -1, -1, -1), 2, places).flatten(2, 3)  # (B, P, topk * T, 2C)
    q, k, v = (split_heads(t, num_heads) for t in (q, *kv.chunk(2, dim=-1)))
    weights = ((q * scale) @ k.transpose(-2, -1)).softmax(-1)
    return from_windows(merge_heads(weights @ v), grid, size)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, grid: tuple[int, int], num_heads: int, scale: float
) -> Tensor:
    mask = functional.routing_mask(index, grid, (q.shape[1], q.shape[2]), q.dtype)
    return functional.map_attention(q, k, v, num_heads, scale, mask)


FORMULATIONS = {
    "routed_attention": functional.routed_attention,
    GATHER: authors_attention,
    "index_select + SDPA": functional.gathered_attention,
    "masked SDPA": masked_attention,
}


def following(attention: Callable[..., Tensor], routes: list[Tensor]) -> Callable[..., Tensor]:
    """The formulation with the routes that `routes` holds call by call; it notes them there where there are none.

    For comparing two nets: by rounding, they may differ in their choice between windows that are equally near.
    """
    calls = iter(routes[:])

    def follow(q: Tensor, k: Tensor, v: Tensor, index: Tensor, *rest) -> Tensor:
        route = next(calls, None)
        if route is None:
            routes.append(index)
        return attention(q, k, v, index if route is None else route, *rest)

    return follow


def net_step(formulation: str, train: bool, routes: list[Tensor] | None = None) -> Callable[[], list[Tensor]]:
    """A function that runs biformer_tiny and returns its scores, or with `train` also the gradients of its weights."""
    torch.manual_seed(0)
    net = timm.create_model("biformer_tiny").to(memory_format=torch.channels_last).train(train)  # pyright: ignore[reportCallIssue]
    images = torch.randn(8, 3, 224, 224)
    attention = FORMULATIONS[formulation] if routes is None else following(FORMULATIONS[formulation], routes)

    def step() -> list[Tensor]:
        with mock.patch.object(bilevel_routing, "routed_attention", attention), torch.set_grad_enabled(train):
            scores = net(images)
        if not train:
            return [scores]
        net.zero_grad()
        scores.square().mean().backward()
        return [scores.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]

    return step


def op_step(
    formulation: str, train: bool, routes: object = None, *, batch: int, side: int, dim: int, topk: int
) -> Callable[[], list[Tensor]]:
    """The same for routed attention alone, on a map of side x side tokens and 7 x 7 windows."""
    torch.manual_seed(0)
    qkv = torch.randn(batch, side, side, 3 * dim, requires_grad=train)
    index = torch.rand(batch, 49, 49).topk(topk).indices

    def step() -> list[Tensor]:
        q, k, v = qkv.chunk(3, dim=-1)
        out = FORMULATIONS[formulation](q, k, v, index, (7, 7), dim // 32, dim**-0.5)
        return [out.detach(), *torch.autograd.grad(out.square().mean(), qkv)] if train else [out]

    return step


def compare(make: Callable[..., Callable], name: str, against: str, rounds: int, shape: str, memory: bool) -> list[Row]:
    """Rows of `name` against another formulation, forward and forward + backward.

    Raises:
        ValueError: outputs differ by more than 1e-5, or gradients by more than 1e-4, of their norm.
    """
    rows = []
    for train, direction in ((False, "forward"), (True, "forward + backward")):
        routes: list[Tensor] = []
        theirs, ours = (make(key, train, routes)() for key in (against, name))
        least = 1e-2 * max(tensor.norm() for tensor in theirs)  # a bias before batch norm has no gradient but noise
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            error, limit = float((a - b).norm() / b.norm().clamp(min=least if i else 0)), 1e-4 if i else 1e-5
            if not error <= limit:
                raise ValueError(f"{name} and {against} differ by {error:.1e} in tensor {i} ({direction}, {shape})")
        steps = {key: make(key, train) for key in (name, against)}
        timings = interleave(steps, rounds)
        for key, other in ((name, (against, timings[against])), (against, None)):
            peak = peak_memory_mb(partial(make, key, train), "cpu") if memory else None
            columns = {"shape": shape, "dtype": "float32", "device": "cpu", "direction": direction}
            rows.append(make_row(key, timings[key], against=other, peak_mb=peak, **columns))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each formulation, in turn")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--csv", type=Path, help="write the rows to this file")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.threads < 1:
        raise ValueError(f"--rounds and --threads must be at least 1, not {args.rounds} and {args.threads}")
    torch.set_num_threads(args.threads)

    nets = compare(net_step, "routed_attention", GATHER, args.rounds, "8 x 3 x 224 x 224", memory=True)
    print_rows(nets, "biformer_tiny, in which only the routed attention differs")
    alone = []
    for side, dim, topk in ((56, 64, 1), (28, 128, 4), (14, 256, 16)):
        make = partial(op_step, batch=8, side=side, dim=dim, topk=topk)
        shape = f"8 x {side} x {side} x {dim}, topk {topk}"
        alone += compare(make, "routed_attention", GATHER, args.rounds, shape, memory=False)
    print_rows(alone, "routed attention alone")
    sizes = []
    for side in (7, 14, 21, 28):
        for topk in (1, 4, 16):
            make = partial(op_step, batch=4, side=side, dim=128, topk=topk)
            shape = f"4 x {side} x {side} x 128, topk {topk}"
            sizes += compare(make, "masked SDPA", "index_select + SDPA", args.rounds, shape, memory=False)
    print_rows(sizes, f"masking or gathering; masked up to {functional.MASKED_TOKENS} tokens")
    if args.csv:
        write_csv(args.csv, nets + alone + sizes)


if __name__ == "__main__":
    with user_errors():
        main()
