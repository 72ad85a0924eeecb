"""Triton back end of `ops.scan.selective_scan`.

The kernels, in `ops.kernels.scan_kernels`, keep the states of a block of channels in registers while they run over the
tokens of one sequence, so that states are not stored for each token.

- `forward` computes the output, and stores the state before each chunk of 64 tokens.
- `backward` runs over the chunks from the last one to the first. It computes the states of a chunk again from the state
  before it, and then the gradients from the chunk's end to its start.

The gradients of the weights to and from the states are sums over the channels, and that of the rates is a sum over the
images. Each program stores its part, and the parts are added in a fixed order, without atomic additions, so repeated
runs give the same bits.

The sizes follow from the compiler's figures for compute capability 8.0, 9.0 and 10.0 (registers, spills, shared
memory). They were not timed on a GPU.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ops.kernels.launch import forbid_second_derivative, kernel_op, wrap_triton
from ops.kernels.scan_kernels import backward, forward
from retinue.utils.arithmetic import ceil_div

# Tokens of a chunk, and channels of a program, which has a warp for each 16 states
CHUNK, BLOCK = 64, 32


def _arguments(u: Tensor, A: Tensor, first: Tensor | None) -> tuple[int, dict[str, Any]]:
    """Return the number of programs, and the arguments of a kernel for sizes."""
    (images, K, N, E), S = u.shape, A.shape[-1]
    P = 1 << (S - 1).bit_length()
    return images * K * ceil_div(E, BLOCK), {
        "tokens": N,
        "chunks": ceil_div(N, CHUNK),
        "num_orders": K,
        "E": E,
        "S": S,
        "CHUNK": CHUNK,
        "BLOCK": BLOCK,
        "P": P,
        "RESET": first is not None,
        "num_warps": max(1, P // 16),
    }


def _contiguous(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, first: Tensor | None) -> list[Tensor]:
    """Return the inputs of the kernels without gaps; without `first`, any tensor stands for it, as it is not read."""
    inputs = [t.contiguous() for t in (u, delta, A, B, C)]
    return [*inputs, inputs[0] if first is None else first.to(torch.int32).contiguous()]


def _empty_outputs(u: Tensor, delta: Tensor, A: Tensor, *_) -> tuple[Tensor, Tensor]:
    images, K, N, E = u.shape
    states = u.new_empty(images * K, ceil_div(N, CHUNK), E, A.shape[-1], dtype=torch.float32)
    return u.new_empty(u.shape, dtype=torch.float32), states


@kernel_op("retinue::selective_scan", _empty_outputs)
def selective_scan_and_states(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the output of `selective_scan` and the `states` of `ops.kernels.scan_kernels`."""
    y, states = _empty_outputs(u, delta, A)
    programs, arguments = _arguments(u, A, first)
    wrap_triton(forward)[(programs,)](*_contiguous(u, delta, A, B, C, first), y, states, **arguments)
    return y, states


def _empty_gradients(
    dy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *_
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    du, ddelta, dA, dB, dC = (t.new_empty(t.shape) for t in (u, delta, A, B, C))
    return du, ddelta, dA, dB, dC


@kernel_op("retinue::selective_scan_backward", _empty_gradients)
def selective_scan_backward(
    dy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, first: Tensor | None, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `u`, `delta`, `A`, `B` and `C` from the gradient `dy` of the output."""
    programs, arguments = _arguments(u, A, first)
    (images, K, N, E), S = u.shape, A.shape[-1]
    du, ddelta = u.new_empty(u.shape), delta.new_empty(delta.shape)
    dA = states.new_empty(images, K, E, S)
    dB, dC = (states.new_empty(ceil_div(E, BLOCK), images, K, N, S) for _ in range(2))
    scratch = states.new_empty(programs, CHUNK, BLOCK, arguments["P"])
    inputs = _contiguous(u, delta, A, B, C, first)
    wrap_triton(backward)[(programs,)](
        *inputs, states, dy.contiguous(), du, ddelta, dA, dB, dC, scratch, sequences=images * K, **arguments
    )
    return du, ddelta, dA.sum(0).to(A.dtype), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy: Tensor, _):
    return *selective_scan_backward(dy, *ctx.saved_tensors), None


selective_scan_and_states.register_autograd(_backward, setup_context=_setup_context)
forbid_second_derivative(selective_scan_backward)


@register_flop_formula(torch.ops.retinue.selective_scan)
def _flops(u_shape, delta_shape, A_shape, *args, **kwargs) -> int:
    """Count the products of the states and their weights to the output, which are a matrix product in plain PyTorch."""
    images, K, N, E = u_shape
    return 2 * images * K * N * E * A_shape[-1]


@register_flop_formula(torch.ops.retinue.selective_scan_backward)
def _backward_flops(dy_shape, *args, **kwargs) -> int:
    """Count the two products of the gradients' definition for each product of the forward pass."""
    return 2 * _flops(*args[:3])


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, first: Tensor | None) -> Tensor:
    """Compute `ops.scan.selective_scan` by Triton kernels.

    The caller must have checked that `ops.scan.obstacle_to_scan_kernels` returns None.
    """
    return selective_scan_and_states(u, delta, A, B, C, first)[0]
