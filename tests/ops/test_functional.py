"""Every formulation of the attention primitives agrees with plain sums in float64, in outputs and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ops import functional
from ops.functional import (
    biased_attention,
    biased_sdpa,
    gathered_attention,
    map_attention,
    merge_heads,
    routed_attention,
    routing_mask,
    split_heads,
)
from ops.windows import from_windows, to_windows, window_means


def dense_attention(qkv: Tensor, allowed: Tensor, num_heads: int, scale: float) -> Tensor:
    """Compute attention of (B, H, W, 3C), head by head, from each query to the keys with a 1 in `allowed` (B, N, N)."""
    B, H, W, C = *qkv.shape[:3], qkv.shape[3] // 3
    q, k, v = (t.reshape(B, H * W, C) for t in qkv.chunk(3, -1))
    D, heads = C // num_heads, []
    for h in range(num_heads):
        part = slice(h * D, (h + 1) * D)
        scores = torch.einsum("bnd,bmd->bnm", q[..., part], k[..., part]) * scale
        weights = scores.exp() * allowed
        heads.append(torch.einsum("bnm,bmd->bnd", weights / weights.sum(-1, keepdim=True), v[..., part]))
    return torch.cat(heads, -1).view(B, H, W, C)


def allowed_by(index: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return (B, N, N): 1 where the query's window is routed to the key's window, token by token."""
    window = [y // (size[0] // grid[0]) * grid[1] + x // (size[1] // grid[1])
              for y in range(size[0]) for x in range(size[1])]  # fmt: skip
    chosen = [[set(row.tolist()) for row in image] for image in index]
    return torch.tensor([[[j in image[i] for j in window] for i in window] for image in chosen], dtype=torch.float64)


# Size of the map, grid and topk for which the CPU masks (small), gathers (large) or attends to all
CASES = {
    "small": ((6, 8), (3, 2), 2),
    "small, one": ((4, 4), (2, 2), 1),
    "large": ((18, 15), (6, 3), 4),
    "large, one": ((16, 16), (4, 4), 1),
    "all": ((6, 9), (2, 3), 6),
    "large, all": ((16, 18), (2, 2), 4),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("formulation", ["routed_attention", "gathered_attention", "masked"])
def test_routed_attention_and_its_gradients(case, formulation):
    size, grid, topk = CASES[case]
    heads, scale, windows = 2, 0.3, grid[0] * grid[1]
    torch.manual_seed(0)
    qkv, upstream = torch.randn(2, *size, 24), torch.randn(2, *size, 8)
    index = torch.rand(2, windows, windows).topk(topk).indices

    def run(dtype: torch.dtype, attend: Any) -> tuple[Tensor, Tensor]:
        leaf = qkv.to(dtype).requires_grad_()
        out = attend(leaf)
        return out.detach(), torch.autograd.grad(out, leaf, upstream.to(dtype))[0]

    def attend(qkv):
        if formulation == "masked":
            q, k, v = qkv.chunk(3, -1)
            return map_attention(q, k, v, heads, scale, routing_mask(index, grid, size, q.dtype))
        return getattr(functional, formulation)(qkv, index, grid, heads, scale)

    allowed = allowed_by(index, grid, size)
    reference = run(torch.float64, lambda qkv: dense_attention(qkv, allowed, heads, scale))
    for name, actual, expected in zip(("out", "dqkv"), run(torch.float32, attend), reference, strict=True):
        # Compare the gradients of q, k and v each with its own maximum
        for a, b in zip(actual.split(8, -1), expected.split(8, -1), strict=True):
            assert (a - b).abs().max() < 2e-6 * b.abs().max(), name
    for name, actual, expected in zip(("out", "dqkv"), run(torch.float64, attend), reference, strict=True):
        assert (actual - expected).abs().max() < 1e-12, name


def test_a_grid_that_does_not_fit_the_map_is_refused():
    with pytest.raises(ValueError, match="a grid of 2 x 2 for 4 windows does not fit 5 x 4 tokens"):
        routed_attention(torch.zeros(1, 5, 4, 3), torch.zeros(1, 4, 1, dtype=torch.long), (2, 2), 1, 1.0)


def test_small_maps_are_masked_and_large_ones_gathered(monkeypatch):
    calls = []
    monkeypatch.setattr(functional, "gathered_attention", lambda *args: calls.append("gathered"))
    monkeypatch.setattr(
        functional, "map_attention", lambda *args: calls.append("plain" if args[5] is None else "masked")
    )
    index = torch.zeros(1, 4, 1, dtype=torch.long)
    for side, idx, device in ((14, index, "cpu"), (16, index, "cpu"), (14, index.to("meta"), "meta")):
        qkv = torch.empty(1, side, side, 12, device=device)
        routed_attention(qkv, idx, (2, 2), 1, 1.0)
    routed_attention(qkv, torch.zeros(1, 4, 4, dtype=torch.long), (2, 2), 1, 1.0)
    assert calls == ["masked", "gathered", "gathered", "plain"]


@pytest.mark.parametrize("per_window", [False, True])
def test_biased_attention_and_its_gradients(per_window):
    B, P, N, heads, D = 2, 3, 6, 2, 4
    torch.manual_seed(0)
    inputs = (torch.randn(B, P, N, 3 * heads * D), torch.randn(P if per_window else 1, heads, N, N))
    upstream = torch.randn(B, P, N, heads * D)

    def plain_sums(qkv: Tensor, bias: Tensor) -> Tensor:
        q, k, v = qkv.view(B, P, N, 3, heads, D).unbind(3)
        weights = (torch.einsum("bpihd,bpjhd->bphij", q, k) / D**0.5 + bias).softmax(-1)
        return torch.einsum("bphij,bpjhd->bpihd", weights, v).flatten(-2)

    def run(dtype: torch.dtype, attend: Any) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        out = attend(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    def sdpa(qkv: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (split_heads(t, heads) for t in qkv.chunk(3, -1))
        return merge_heads(biased_sdpa(q, k, v, bias))

    reference = run(torch.float64, plain_sums)
    for attend in (lambda qkv, bias: biased_attention(qkv, bias, heads), sdpa):
        for actual, expected in zip(run(torch.float32, attend), reference, strict=True):
            assert (actual - expected).abs().max() < 2e-6 * expected.abs().max()


def test_windows_are_cut_in_order_and_put_back():
    x = torch.arange(2 * 6 * 8 * 3).view(2, 6, 8, 3)
    windows = to_windows(x, (3, 2))
    assert windows.shape == (2, 6, 8, 3)
    # Window 3 is in the second row and the second column of windows
    assert torch.equal(windows[1, 3], x[1, 2:4, 4:8].reshape(8, 3))
    assert torch.equal(from_windows(windows, (3, 2), (6, 8)), x)


def test_window_means_average_tokens_on_the_map_only():
    x = torch.rand(1, 5, 7, 2, dtype=torch.float64)
    means = window_means(x, (2, 3)).view(3, 3, 2)
    assert torch.allclose(means[1, 1], x[0, 2:4, 3:6].mean((0, 1)))
    assert torch.allclose(means[2, 2], x[0, 4:5, 6:7].mean((0, 1)))


def test_gathered_attention_takes_strided_inputs():
    qkv = torch.randn(1, 12, 4, 6).permute(0, 2, 3, 1)
    index = torch.tensor([[[1], [0], [3], [2]]])
    dense = gathered_attention(qkv.contiguous(), index, (2, 2), 2, 1.0)
    assert torch.equal(gathered_attention(qkv, index, (2, 2), 2, 1.0), dense)
