"""Triton kernels of the selective scan, which `ops.kernels.selective_scan` launches.

Arguments of the kernels, for I sequences (the K orders of every image), each of `tokens` tokens of E channels with S
states. BLOCK is the number of channels of a program, and P is S after padding:

    u, delta, y, dy, du, ddelta  (I, tokens, E): inputs, steps and outputs, and their gradients
    A                            (K, E, S): rates of the states
    B, C                         (I, tokens, S): weights to and from the states
    first                        (K, tokens): not 0 where the state starts anew; read if RESET
    states                       (I, chunks, E, S): state before each chunk of CHUNK tokens
    scratch                      (programs, CHUNK, BLOCK, P): states before the tokens of a chunk, for one program each
    dA                           (I, E, S): gradients of the rates from each sequence
    dB, dC                       (blocks, I, tokens, S): gradients from each block of channels

All sequential loops run over the tokens with the states in registers; `states`, `scratch` and all gradients that are
summed later are float32.
"""

import triton
import triton.language as tl

from ops.kernels.rows import LOG2E


@triton.jit
def _place_of_program(E, BLOCK: tl.constexpr):
    """Return the number of this program's sequence, that of its block of channels, and the number of blocks."""
    blocks = tl.cdiv(E, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks, blocks


@triton.jit
def _load_row(base, row, width, column, valid):
    """Load the columns `column` of row `row` of a matrix of `width` columns in float32; zeros where not valid."""
    return tl.load(base + row * width + column, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _decay(step, rates, first, RESET: tl.constexpr):
    """Return exp(step * rate) for steps (BLOCK,) and rates (BLOCK, P), or 0 where the state starts anew."""
    decay = tl.exp2(step[:, None] * (rates * LOG2E))
    if RESET:
        decay = tl.where(tl.load(first) != 0, 0.0, decay)
    return decay


@triton.jit
def forward(
    u, delta, A, B, C, first, y, states, tokens, chunks, num_orders, E, S,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr, RESET: tl.constexpr,
):  # fmt: skip
    """Compute `y` and `states` of a block of channels of a sequence."""
    sequence, block, _blocks = _place_of_program(E, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
    order = sequence % num_orders
    channel, state = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, P)
    is_channel, is_state = channel < E, state < S
    square, is_square = channel[:, None] * S + state[None, :], is_channel[:, None] & is_state[None, :]
    rates = _load_row(A, order * E, S, square, is_square)
    h = tl.zeros((BLOCK, P), tl.float32)
    for chunk in range(chunks):
        tl.store(states + (sequence * chunks + chunk) * E * S + square, h, mask=is_square)
        for t in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, tokens)):
            row = sequence * tokens + t
            x = _load_row(u, row, E, channel, is_channel)
            step = _load_row(delta, row, E, channel, is_channel)
            b = _load_row(B, row, S, state, is_state)
            c = _load_row(C, row, S, state, is_state)
            h = _decay(step, rates, first + order * tokens + t, RESET) * h + (step * x)[:, None] * b[None, :]
            tl.store(y + row * E + channel, tl.sum(h * c[None, :], 1), mask=is_channel)


@triton.jit
def backward(
    u, delta, A, B, C, first, states, dy, du, ddelta, dA, dB, dC, scratch, tokens, chunks, num_orders, sequences, E, S,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr, RESET: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a block of channels of a sequence.

    The states before the tokens of a chunk are computed again, and then the chunk is run through from its end.
    """
    sequence, block, _blocks = _place_of_program(E, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
    order = sequence % num_orders
    channel, state = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, P)
    is_channel, is_state = channel < E, state < S
    square, is_square = channel[:, None] * S + state[None, :], is_channel[:, None] & is_state[None, :]
    rates = _load_row(A, order * E, S, square, is_square)
    own_scratch = scratch + tl.program_id(0).to(tl.int64) * (CHUNK * BLOCK * P)
    own_scratch += tl.arange(0, BLOCK)[:, None] * P + state[None, :]
    dh = tl.zeros((BLOCK, P), tl.float32)
    drates = tl.zeros((BLOCK, P), tl.float32)
    for i in range(chunks):
        chunk = chunks - 1 - i
        start = chunk * CHUNK
        length = tl.minimum(CHUNK, tokens - start)
        h = _load_row(states, (sequence * chunks + chunk) * E, S, square, is_square)
        for j in range(length):
            tl.store(own_scratch + j * (BLOCK * P), h)
            row = sequence * tokens + start + j
            x = _load_row(u, row, E, channel, is_channel)
            step = _load_row(delta, row, E, channel, is_channel)
            b = _load_row(B, row, S, state, is_state)
            h = _decay(step, rates, first + order * tokens + start + j, RESET) * h + (step * x)[:, None] * b[None, :]
        # A thread may read what another one has written
        tl.debug_barrier()
        for backwards in range(length):
            j = length - 1 - backwards
            row = sequence * tokens + start + j
            x = _load_row(u, row, E, channel, is_channel)
            step = _load_row(delta, row, E, channel, is_channel)
            b = _load_row(B, row, S, state, is_state)
            c = _load_row(C, row, S, state, is_state)
            do = _load_row(dy, row, E, channel, is_channel)
            decay = _decay(step, rates, first + order * tokens + start + j, RESET)
            kept = decay * tl.load(own_scratch + j * (BLOCK * P))
            added = step * x
            dh += do[:, None] * c[None, :]
            part = (block * sequences + sequence) * tokens + start + j
            dc = tl.sum(do[:, None] * (kept + added[:, None] * b[None, :]), 0)
            tl.store(dC + part * S + state, dc, mask=is_state)
            tl.store(dB + part * S + state, tl.sum(added[:, None] * dh, 0), mask=is_state)
            dadded = tl.sum(dh * b[None, :], 1)
            dexponent = dh * kept
            dstep = x * dadded + tl.sum(dexponent * rates, 1)
            tl.store(du + row * E + channel, (step * dadded).to(du.dtype.element_ty), mask=is_channel)
            tl.store(ddelta + row * E + channel, dstep.to(ddelta.dtype.element_ty), mask=is_channel)
            drates += dexponent * step[:, None]
            dh = decay * dh
        tl.debug_barrier()
    tl.store(dA + sequence * E * S + square, drates, mask=is_square)
