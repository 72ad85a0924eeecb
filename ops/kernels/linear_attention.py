"""Triton back end of `ops.linear.linear_attention`.

The kernels, in `ops.kernels.linear_kernels`, read queries, keys and values once in each direction. A program holds the
state of one head, a matrix of the channels of keys and of values, and loops over a chunk of the tokens of one image:

- `sum_keys` adds up the state over its chunk of the keys, and `combine_keys` adds the chunks up, in a fixed order.
- `attend` multiplies its chunk of the queries by the state.
- `backward_queries` computes the gradient of its chunk of the queries, and adds up the gradient of the state, which
  `combine_queries` adds up over the chunks.
- `backward_keys` computes the gradients of its chunk of the keys and of the values from the gradient of the state.

Features and their derivatives are computed in the kernels again, so only inputs and the state are kept for the backward
pass. There are no atomic additions, so repeated runs give the same bits.

The default tile sizes follow from the compiler's figures for compute capability 8.0, 9.0 and 10.0 (registers, spills,
shared memory). They were not timed on a GPU.
"""

import itertools
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ops.kernels.launch import (
    TileConfig,
    dot_precision,
    forbid_second_derivative,
    kernel_op,
    padded,
    tile_config,
    wrap_triton,
)
from ops.kernels.linear_kernels import (
    attend,
    backward_keys,
    backward_queries,
    combine_keys,
    combine_queries,
    sum_keys,
)
from retinue.utils.arithmetic import ceil_div, round_up

# Number of programs that suffices to fill a GPU, and maximum number of chunks that one program adds up.
PROGRAMS, MAX_ADDED_CHUNKS = 1024, 32
# Kernels whose chunks another kernel adds up.
ADDED_UP = ("sum_keys", "backward_queries")


def configs(tokens: int) -> list[TileConfig]:
    """Return the tile configurations that tuning tries for maps of `tokens` tokens; no token is resident."""
    sizes = sorted({padded(tokens, limit) for limit in (16, 32, 64, 128)})
    return [TileConfig(0, *choice) for choice in itertools.product(sizes, (2, 4, 8), (1, 2, 3))]


def _parts(q: Tensor, k: Tensor | None, v: Tensor | None) -> list[Tensor]:
    """Return queries, keys and values; `q` holds all three if `k` and `v` are None."""
    return list(q.chunk(3, dim=-1)) if k is None or v is None else [q, k, v]


def _rows(x: Tensor) -> Tensor:
    """Return `x`, or a copy if its channels do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _arguments(
    kernel: str, tokens: int, q: Tensor, v: Tensor, num_heads: int, features: str, normalization: str
) -> tuple[int, dict[str, Any]]:
    """Return the number of programs of a kernel over `tokens` tokens, and its arguments for sizes and tiles."""
    D, E = q.shape[-1] // num_heads, v.shape[-1] // num_heads
    P, Q = padded(D), padded(E)
    half = v.element_size() == 2
    streamed = padded(tokens, 64 if half and max(P, Q) <= 64 else 32 if half or max(P, Q) <= 32 else 16)
    default = TileConfig(0, streamed, _num_warps(v, P, Q), 2)
    config = tile_config(f"linear_attention.{kernel}", v, max(P, Q), tokens, default)
    images_heads = len(q) * num_heads
    chunks = max(1, min(ceil_div(tokens, config.streamed), PROGRAMS // images_heads))
    chunks = min(chunks, MAX_ADDED_CHUNKS) if kernel in ADDED_UP else chunks
    chunk_tokens = round_up(ceil_div(tokens, chunks), config.streamed)
    chunks = ceil_div(tokens, chunk_tokens)
    return images_heads * chunks, {
        "tokens": tokens,
        "chunks": chunks,
        "chunk_tokens": chunk_tokens,
        "num_heads": num_heads,
        "D": D,
        "E": E,
        "STREAMED": config.streamed,
        "PRECISION": dot_precision(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    } | _constants(P, Q, features, normalization)


def _num_warps(v: Tensor, P: int, Q: int) -> int:
    """Return the number of warps whose registers hold a state of P x Q values, and the tiles of a program."""
    if v.element_size() == 2:
        return 4 if P * Q <= 64 * 64 else 8
    return 4 if P * Q < 64 * 64 else 8 if P * Q < 128 * 128 else 16


def _constants(P: int, Q: int, features: str, normalization: str) -> dict[str, Any]:
    return {"P": P, "Q": Q, "FEATURES": features, "SUBTRACT": normalization == "subtract"}


def _factor(keys: int, features: str, normalization: str, scale: float) -> float:
    """Return the factor on a query's features times the state, which is a mean over the keys."""
    return scale * keys if normalization == "none" and features != "softmax" else scale


def _empty_outputs(
    q: Tensor, k: Tensor | None, v: Tensor | None, _, num_heads: int, features: str, normalization: str, *others,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    queries, _, values = _parts(q, k, v)
    P, Q = padded(queries.shape[-1] // num_heads), padded(values.shape[-1] // num_heads)
    images_heads = len(q) * num_heads
    new = partial(q.new_empty, dtype=torch.float32)
    return (
        values.new_empty(*queries.shape[:2], values.shape[-1]),
        new(images_heads, P, Q),
        new(images_heads, P),
        new(images_heads if features == "softmax" else 0, P),
        new(images_heads if normalization == "subtract" else 0, Q),
    )


@kernel_op("retinue::linear_attention", _empty_outputs)
def linear_attention_and_state(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    gain: Tensor | None,
    num_heads: int,
    features: str,
    normalization: str,
    scale: float,
    min_sum: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output of `linear_attention`, and what the backward pass needs of the keys and values.

    Args:
        q: (B, N, num_heads * D): queries; or (B, N, 3C), queries, keys and values, if `k` and `v` are None.
        k: (B, M, num_heads * D): keys.
        v: (B, M, num_heads * E): values.
        gain: (num_heads,): learned factor on the weights of each head; None for 1.
        num_heads: number of heads.
        features: feature map.
        normalization: normalization of the weights.
        scale: further factor on the weights.
        min_sum: smallest sum that a query's weights are divided by.

    Returns:
        The output (B, N, num_heads * E), and `state`, `key_sum`, `key_maximum` and `value_mean` as in
        `ops.kernels.linear_kernels`; the last two are empty where they are not used.
    """
    queries, keys, values = map(_rows, _parts(q, k, v))
    outputs = _empty_outputs(q, k, v, gain, num_heads, features, normalization)
    out, state, key_sum, key_maximum, value_mean = outputs
    kinds, M, P, Q = (queries, values, num_heads, features, normalization), keys.shape[1], *state.shape[1:]
    programs, arguments = _arguments("sum_keys", M, *kinds)
    chunks = arguments["chunks"]
    parts = [state.new_empty(programs, *shape) for shape in ((P, Q), (P,), (P,), (Q,))]
    wrap_triton(sum_keys)[(programs,)](
        keys, values, *parts, keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), **arguments
    )
    constants = _constants(P, Q, features, normalization)
    wrap_triton(combine_keys)[(len(state),)](
        *parts, state, key_sum, key_maximum, value_mean, M, chunks, num_warps=_num_warps(state, P, Q), **constants
    )
    programs, arguments = _arguments("attend", queries.shape[1], *kinds)
    wrap_triton(attend)[(programs,)](
        queries,
        state,
        key_sum,
        value_mean,
        key_sum if gain is None else gain,
        out,
        queries.stride(0),
        queries.stride(1),
        _factor(M, features, normalization, scale),
        min_sum / M,
        SUM=normalization == "sum",
        GAINED=gain is not None,
        **arguments,
    )
    return outputs


def _empty_gradients(
    dout: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, gain: Tensor | None, *_
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (q, k, v, gain)
    dq, dk, dv, dgain = (q.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors)
    return dq, dk, dv, dgain


@kernel_op("retinue::linear_attention_backward", _empty_gradients)
def linear_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    gain: Tensor | None,
    state: Tensor,
    key_sum: Tensor,
    key_maximum: Tensor,
    value_mean: Tensor,
    num_heads: int,
    features: str,
    normalization: str,
    scale: float,
    min_sum: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `q`, `k`, `v` and `gain` from that of the output; empty tensors for None.

    `dout` (B, N, num_heads * E) is the gradient of the output. The further arguments are arguments and results of
    `linear_attention_and_state`.
    """
    queries, keys, values = map(_rows, _parts(q, k, v))
    gradients = _empty_gradients(dout, q, k, v, gain)
    dq, dk, dv = _parts(*(gradients[:1] if k is None else gradients[:3]), *([None, None] if k is None else []))
    dout = _rows(dout)
    kinds, (images_heads, P, Q) = (queries, values, num_heads, features, normalization), state.shape
    M, gain_or_any, gained = keys.shape[1], key_sum if gain is None else gain, gain is not None
    factor = _factor(M, features, normalization, scale)

    programs, arguments = _arguments("backward_queries", queries.shape[1], *kinds)
    chunks = arguments["chunks"]
    parts = [state.new_empty(programs, *shape) for shape in ((P, Q), (P,), (Q,))]
    wrap_triton(backward_queries)[(programs,)](
        queries,
        dout,
        state,
        key_sum,
        gain_or_any,
        dq,
        *parts,
        queries.stride(0),
        queries.stride(1),
        dout.stride(0),
        dout.stride(1),
        dq.stride(0),
        dq.stride(1),
        factor,
        min_sum / M,
        SUM=normalization == "sum",
        GAINED=gained,
        **arguments,
    )
    dstate, dkey, dvalue = values.new_empty(state.shape), torch.empty_like(key_sum), state.new_empty(images_heads, Q)
    dgain = state.new_empty(images_heads)
    wrap_triton(combine_queries)[(images_heads,)](
        *parts,
        state,
        key_sum,
        value_mean,
        gain_or_any,
        dstate,
        dkey,
        dvalue,
        dgain,
        factor,
        M,
        chunks,
        num_heads,
        SUM=normalization == "sum",
        GAINED=gained,
        num_warps=_num_warps(state, P, Q),
        **_constants(P, Q, features, normalization),
    )
    programs, arguments = _arguments("backward_keys", M, *kinds)
    strides = [stride for t in (keys, values, dk, dv) for stride in (t.stride(0), t.stride(1))]
    wrap_triton(backward_keys)[(programs,)](
        keys, values, key_maximum, dstate, dkey, dvalue, dk, dv, *strides, **arguments
    )
    if gain is None:
        return gradients
    return *gradients[:3], dgain.view(-1, num_heads).sum(0).to(gain.dtype)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.num_heads, ctx.features, ctx.normalization, ctx.scale, ctx.min_sum = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor, *_):
    saved, settings = ctx.saved_tensors, (ctx.num_heads, ctx.features, ctx.normalization, ctx.scale, ctx.min_sum)
    gradients = linear_attention_backward(dout, *saved, *settings)
    inputs = saved[:4]
    return *(None if t is None else gradient for t, gradient in zip(inputs, gradients, strict=True)), *[None] * 5


linear_attention_and_state.register_autograd(_backward, setup_context=_setup_context)
forbid_second_derivative(linear_attention_backward)


@register_flop_formula(torch.ops.retinue.linear_attention)
def _flops(q_shape, k_shape, v_shape, gain_shape, num_heads, features, normalization, *args, **kwargs) -> int:
    """Count the matrix products for the state and for the output, and the products for the sum of a query's weights."""
    B, N, channels = q_shape
    C = channels // 3 if k_shape is None else channels
    M, E = (N, C // num_heads) if k_shape is None else (v_shape[1], v_shape[2] // num_heads)
    return 2 * B * C * ((M + N) * E + (N if normalization == "sum" else 0))


@register_flop_formula(torch.ops.retinue.linear_attention_backward)
def _backward_flops(dout_shape, q_shape, k_shape, v_shape, gain_shape, *args, **kwargs) -> int:
    """Count the two products of the gradients' definition for each product of the forward pass."""
    num_heads, features, normalization = args[4:7]
    return 2 * _flops(q_shape, k_shape, v_shape, gain_shape, num_heads, features, normalization)


def linear_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    num_heads: int,
    features: str,
    normalization: str,
    scale: float | Tensor,
    min_sum: float,
) -> Tensor:
    """Compute `ops.linear.linear_attention` by Triton kernels.

    The caller must have checked that `ops.backend.obstacle_to_kernels` returns None for the values.
    """
    inputs = (qkv, None, None) if isinstance(qkv, Tensor) else qkv
    gain, factor = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    return linear_attention_and_state(*inputs, gain, num_heads, features, normalization, factor, min_sum)[0]
