"""Triton kernels of linear attention, which `ops.kernels.linear_attention` launches.

Arguments of the kernels, for B images of N queries and M keys, and heads with D channels of queries and keys and E
channels of values. P and Q are D and E after padding, and a part is a chunk of the tokens of one image and head:

    q, dq                        (B, N, num_heads * D), k, dk (B, M, num_heads * D), v, dv (B, M, num_heads * E)
    out, dout                    (B, N, num_heads * E): the output and its gradient
    gain                         (num_heads,): learned factor on the weights; read if GAINED
    states                       (B * num_heads, chunks, P, Q): sum of features times values of each part of the keys
    key_sums, key_maxima         (B * num_heads, chunks, P): sum of the features; with softmax features, maximum of the
                                 keys, which the part's features are relative to
    value_sums                   (B * num_heads, chunks, Q): sum of the values; used if SUBTRACT
    state                        (B * num_heads, P, Q): mean over all keys of features times values, weighted by the
                                 softmax for softmax features, minus the product of both means if SUBTRACT
    key_sum, key_maximum         (B * num_heads, P): mean of the features; for softmax features, their sum, and the
                                 maximum of the keys
    value_mean                   (B * num_heads, Q): mean of the values
    dstates, dkey_means          shaped like states and key_sums: parts of the gradients of `state`, without the factor
                                 on the weights, and of the mean of the features; for chunks of the queries
    dvalue_means                 shaped like value_sums: sum of `dout`
    dstate, dkey, dvalue         shaped like state, key_sum and value_mean: a key's features φ and value v have the
                                 gradients dstate v + dkey and dstateᵀ φ + dvalue
    dgain                        (B * num_heads,): gradient of `gain` from one image
    *_batch, *_token             strides: number of values from one image and from one token to the next
    factor                       factor on a query's features times `state`
    min_mean                     minimum of a query's product with the mean of the features, by which it is divided
    tokens                       N in kernels over queries, M in kernels over keys
    chunk_tokens, chunks         tokens of a chunk, a multiple of STREAMED, and number of chunks of an image
    STREAMED                     number of tokens that a program loads per iteration of its loop
    FEATURES, SUM, SUBTRACT      the feature map; normalization by the sum; normalization by subtraction
    PRECISION                    `input_precision` of `tl.dot`

`dstate` has the values' type; other sums and means are float32. Products of matrices have operands of
the values' type. The kernels use means where the definition has sums, since means stay in the range of half precision.
Softmax features subtract the maximum before they multiply by LOG2E: rounded products of large keys would differ by more
than the exponential's own error.
"""

import triton
import triton.language as tl

from ops.kernels.rows import LOG2E, load_rows, store_rows


@triton.jit
def _chunk_of_program(tokens, chunks, chunk_tokens, num_heads):
    """Return image and head together, image, head, and the first and the last token plus 1 of this program's chunk."""
    program = tl.program_id(0)
    image_head = (program // chunks).to(tl.int64)
    first = program % chunks * chunk_tokens
    return image_head, image_head // num_heads, image_head % num_heads, first, tl.minimum(first + chunk_tokens, tokens)


@triton.jit
def _load_square(base, index, P: tl.constexpr, Q: tl.constexpr):
    """Load matrix `index` of (matrices, P, Q)."""
    return tl.load(base + index * (P * Q) + tl.arange(0, P)[:, None] * Q + tl.arange(0, Q)[None, :])


@triton.jit
def _store_square(base, index, values, P: tl.constexpr, Q: tl.constexpr):
    """Store matrix `index` of (matrices, P, Q)."""
    tl.store(base + index * (P * Q) + tl.arange(0, P)[:, None] * Q + tl.arange(0, Q)[None, :], values)


@triton.jit
def _pointwise_features(x, FEATURES: tl.constexpr):
    """Return the features of float32 values, for a feature map that is no softmax, and their derivatives."""
    if FEATURES == "elu":
        exponential = tl.exp2(tl.minimum(x, 0.0) * LOG2E)
        features, derivatives = tl.where(x > 0, x + 1, exponential), tl.where(x > 0, 1.0, exponential)
    elif FEATURES == "relu":
        features, derivatives = tl.maximum(x, 0.0), tl.where(x > 0, 1.0, 0.0)
    else:
        features, derivatives = x, tl.full(x.shape, 1.0, tl.float32)
    return features, derivatives


@triton.jit
def _query_features(x, D: tl.constexpr, P: tl.constexpr, FEATURES: tl.constexpr):
    """Return the features of queries (rows, P) in float32, 0 beyond channel D, and their derivatives.

    A derivative of a softmax is returned as its value, from which `backward_queries` computes the gradient.
    """
    valid = (tl.arange(0, P) < D)[None, :]
    x = x.to(tl.float32)
    if FEATURES == "softmax":
        x = tl.where(valid, x, float("-inf"))
        weights = tl.exp2((x - tl.max(x, 1)[:, None]) * LOG2E)
        features = weights / tl.sum(weights, 1)[:, None]
        derivatives = features
    else:
        features, derivatives = _pointwise_features(x, FEATURES)  # pyright: ignore[reportGeneralTypeIssues]
        features = tl.where(valid, features, 0.0)
    return features, derivatives


@triton.jit
def sum_keys(
    k, v, states, key_sums, key_maxima, value_sums, k_batch, k_token, v_batch, v_token,
    tokens, chunks, chunk_tokens, num_heads,
    D: tl.constexpr, E: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, STREAMED: tl.constexpr,
    FEATURES: tl.constexpr, SUBTRACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute `states`, `key_sums`, `key_maxima` and `value_sums` of a chunk of keys."""
    _part, image, head, first, end = _chunk_of_program(tokens, chunks, chunk_tokens, num_heads)  # pyright: ignore[reportGeneralTypeIssues]
    state = tl.zeros((P, Q), tl.float32)
    key_sum = tl.zeros((P,), tl.float32)
    key_maximum = tl.full((P,), float("-inf"), tl.float32)
    value_sum = tl.zeros((Q,), tl.float32)
    for start in range(first, end, STREAMED):
        row = (start + tl.arange(0, STREAMED)).to(tl.int64)
        valid = row < tokens
        x = load_rows(k + image * k_batch + head * D, row, k_token, valid, D, P).to(tl.float32)
        values = load_rows(v + image * v_batch + head * E, row, v_token, valid, E, Q)
        if FEATURES == "softmax":
            x = tl.where(valid[:, None], x, float("-inf"))
            new_maximum = tl.maximum(key_maximum, tl.max(x, 0))
            features = tl.exp2((x - new_maximum[None, :]) * LOG2E)
            rescale = tl.exp2((key_maximum - new_maximum) * LOG2E)
            state = state * rescale[:, None]
            key_sum = key_sum * rescale
            key_maximum = new_maximum
        else:
            features, _ = _pointwise_features(x, FEATURES)
            features = tl.where(valid[:, None], features, 0.0)
        state += tl.dot(tl.trans(features.to(values.dtype)), values, input_precision=PRECISION)
        key_sum += tl.sum(features, 0)
        if SUBTRACT:
            value_sum += tl.sum(values.to(tl.float32), 0)
    part = tl.program_id(0).to(tl.int64)
    _store_square(states, part, state, P, Q)
    tl.store(key_sums + part * P + tl.arange(0, P), key_sum)
    if FEATURES == "softmax":
        tl.store(key_maxima + part * P + tl.arange(0, P), key_maximum)
    if SUBTRACT:
        tl.store(value_sums + part * Q + tl.arange(0, Q), value_sum)


@triton.jit
def combine_keys(
    states, key_sums, key_maxima, value_sums, state, key_sum, key_maximum, value_mean, tokens, chunks,
    P: tl.constexpr, Q: tl.constexpr, FEATURES: tl.constexpr, SUBTRACT: tl.constexpr,
):  # fmt: skip
    """Compute `state`, `key_sum`, `key_maximum` and `value_mean` of an image and head from all chunks of the keys."""
    image_head = tl.program_id(0).to(tl.int64)
    total = tl.zeros((P, Q), tl.float32)
    key_total = tl.zeros((P,), tl.float32)
    maximum = tl.full((P,), float("-inf"), tl.float32)
    value_total = tl.zeros((Q,), tl.float32)
    for chunk in range(chunks):
        part = image_head * chunks + chunk
        part_state = _load_square(states, part, P, Q)
        part_sum = tl.load(key_sums + part * P + tl.arange(0, P))
        if FEATURES == "softmax":
            part_maximum = tl.load(key_maxima + part * P + tl.arange(0, P))
            new_maximum = tl.maximum(maximum, part_maximum)
            rescale = tl.exp2((maximum - new_maximum) * LOG2E)
            part_rescale = tl.exp2((part_maximum - new_maximum) * LOG2E)
            total = total * rescale[:, None] + part_state * part_rescale[:, None]
            key_total = key_total * rescale + part_sum * part_rescale
            maximum = new_maximum
        else:
            total += part_state
            key_total += part_sum
        if SUBTRACT:
            value_total += tl.load(value_sums + part * Q + tl.arange(0, Q))
    if FEATURES == "softmax":
        total = total / key_total[:, None]
        tl.store(key_maximum + image_head * P + tl.arange(0, P), maximum)
    else:
        total = total / tokens
        key_total = key_total / tokens
    if SUBTRACT:
        value_total = value_total / tokens
        total -= key_total[:, None] * value_total[None, :]
        tl.store(value_mean + image_head * Q + tl.arange(0, Q), value_total)
    _store_square(state, image_head, total, P, Q)
    tl.store(key_sum + image_head * P + tl.arange(0, P), key_total)


@triton.jit
def attend(
    q, state, key_sum, value_mean, gain, out, q_batch, q_token, factor, min_mean,
    tokens, chunks, chunk_tokens, num_heads,
    D: tl.constexpr, E: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, STREAMED: tl.constexpr,
    FEATURES: tl.constexpr, SUM: tl.constexpr, SUBTRACT: tl.constexpr, GAINED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute `out` of a chunk of queries."""
    image_head, image, head, first, end = _chunk_of_program(tokens, chunks, chunk_tokens, num_heads)  # pyright: ignore[reportGeneralTypeIssues]
    factor = tl.cast(factor, tl.float32)
    if GAINED:
        factor *= tl.load(gain + head).to(tl.float32)
    key_mean = tl.load(key_sum + image_head * P + tl.arange(0, P))
    operand = _load_square(state, image_head, P, Q).to(out.dtype.element_ty)
    out_base = out + image * tokens * num_heads * E + head * E
    for start in range(first, end, STREAMED):
        row = (start + tl.arange(0, STREAMED)).to(tl.int64)
        valid = row < tokens
        x = load_rows(q + image * q_batch + head * D, row, q_token, valid, D, P)
        features, _ = _query_features(x, D, P, FEATURES)
        result = tl.dot(features.to(operand.dtype), operand, input_precision=PRECISION) * factor
        if SUM:
            mean = tl.sum(features * key_mean[None, :], 1)
            result = result / tl.maximum(mean, tl.cast(min_mean, tl.float32))[:, None]
        if SUBTRACT:
            result += tl.load(value_mean + image_head * Q + tl.arange(0, Q))[None, :]
        store_rows(out_base, row, num_heads * E, valid, result, E, Q)


@triton.jit
def backward_queries(
    q, dout, state, key_sum, gain, dq, dstates, dkey_means, dvalue_means,
    q_batch, q_token, dout_batch, dout_token, dq_batch, dq_token, factor, min_mean,
    tokens, chunks, chunk_tokens, num_heads,
    D: tl.constexpr, E: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, STREAMED: tl.constexpr,
    FEATURES: tl.constexpr, SUM: tl.constexpr, SUBTRACT: tl.constexpr, GAINED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute `dq`, `dstates`, `dkey_means` and `dvalue_means` of a chunk of queries."""
    image_head, image, head, first, end = _chunk_of_program(tokens, chunks, chunk_tokens, num_heads)  # pyright: ignore[reportGeneralTypeIssues]
    factor = tl.cast(factor, tl.float32)
    if GAINED:
        factor *= tl.load(gain + head).to(tl.float32)
    key_mean = tl.load(key_sum + image_head * P + tl.arange(0, P))
    operand = tl.trans(_load_square(state, image_head, P, Q).to(dout.dtype.element_ty))
    dstate = tl.zeros((P, Q), tl.float32)
    dkey_mean = tl.zeros((P,), tl.float32)
    dvalue_mean = tl.zeros((Q,), tl.float32)
    for start in range(first, end, STREAMED):
        row = (start + tl.arange(0, STREAMED)).to(tl.int64)
        valid = row < tokens
        x = load_rows(q + image * q_batch + head * D, row, q_token, valid, D, P)
        do = load_rows(dout + image * dout_batch + head * E, row, dout_token, valid, E, Q)
        features, derivatives = _query_features(x, D, P, FEATURES)
        dfeatures = tl.dot(do, operand, input_precision=PRECISION) * factor
        weighted = features
        if SUM:
            mean = tl.sum(features * key_mean[None, :], 1)
            lowest = tl.cast(min_mean, tl.float32)
            # Rows that are not valid must not be divided by 0
            divisor = tl.where(valid, tl.maximum(mean, lowest), 1.0)
            dfeatures = dfeatures / divisor[:, None]
            dmean = tl.where(mean >= lowest, -tl.sum(features * dfeatures, 1) / divisor, 0.0)
            dfeatures += dmean[:, None] * key_mean[None, :]
            dkey_mean += tl.sum(dmean[:, None] * features, 0)
            weighted = features / divisor[:, None]
        dstate += tl.dot(tl.trans(weighted.to(do.dtype)), do, input_precision=PRECISION)
        if SUBTRACT:
            dvalue_mean += tl.sum(do.to(tl.float32), 0)
        if FEATURES == "softmax":
            dfeatures -= tl.sum(features * dfeatures, 1)[:, None]
        store_rows(dq + image * dq_batch + head * D, row, dq_token, valid, dfeatures * derivatives, D, P)
    part = tl.program_id(0).to(tl.int64)
    _store_square(dstates, part, dstate, P, Q)
    if SUM:
        tl.store(dkey_means + part * P + tl.arange(0, P), dkey_mean)
    if SUBTRACT:
        tl.store(dvalue_means + part * Q + tl.arange(0, Q), dvalue_mean)


@triton.jit
def combine_queries(
    dstates, dkey_means, dvalue_means, state, key_sum, value_mean, gain, dstate, dkey, dvalue, dgain, factor,
    tokens, chunks, num_heads, P: tl.constexpr, Q: tl.constexpr,
    FEATURES: tl.constexpr, SUM: tl.constexpr, SUBTRACT: tl.constexpr, GAINED: tl.constexpr,
):  # fmt: skip
    """Compute `dstate`, `dkey`, `dvalue` and `dgain` of an image and head from all chunks of the queries.

    `tokens` is the number of keys.
    """
    image_head = tl.program_id(0).to(tl.int64)
    factor = tl.cast(factor, tl.float32)
    total = tl.zeros((P, Q), tl.float32)
    dkey_total = tl.zeros((P,), tl.float32)
    dvalue_total = tl.zeros((Q,), tl.float32)
    for chunk in range(chunks):
        part = image_head * chunks + chunk
        total += _load_square(dstates, part, P, Q)
        if SUM:
            dkey_total += tl.load(dkey_means + part * P + tl.arange(0, P))
        if SUBTRACT:
            dvalue_total += tl.load(dvalue_means + part * Q + tl.arange(0, Q))
    weighted = _load_square(state, image_head, P, Q)
    if GAINED:
        tl.store(dgain + image_head, factor * tl.sum(total * weighted))
        factor *= tl.load(gain + image_head % num_heads).to(tl.float32)
    keys = tl.load(key_sum + image_head * P + tl.arange(0, P))
    total *= factor
    if FEATURES == "softmax":
        total = total / keys[:, None]
    else:
        total = total / tokens
        dkey_total = dkey_total / tokens
    # Terms of a key's gradient cancel, so all of them must follow from the same rounded gradient of the state
    rounded = total.to(dstate.dtype.element_ty)
    total = rounded.to(tl.float32)
    if FEATURES == "softmax":
        dkey_total = -tl.sum(total * weighted, 1)
    if SUBTRACT:
        values = tl.load(value_mean + image_head * Q + tl.arange(0, Q))
        dkey_total = -tl.sum(total * values[None, :], 1)
        dvalue_total = dvalue_total / tokens - tl.sum(total * keys[:, None], 0)
        tl.store(dvalue + image_head * Q + tl.arange(0, Q), dvalue_total)
    _store_square(dstate, image_head, rounded, P, Q)
    tl.store(dkey + image_head * P + tl.arange(0, P), dkey_total)


@triton.jit
def backward_keys(
    k, v, key_maximum, dstate, dkey, dvalue, dk, dv, k_batch, k_token, v_batch, v_token,
    dk_batch, dk_token, dv_batch, dv_token, tokens, chunks, chunk_tokens, num_heads,
    D: tl.constexpr, E: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, STREAMED: tl.constexpr,
    FEATURES: tl.constexpr, SUBTRACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute `dk` and `dv` of a chunk of keys."""
    image_head, image, head, first, end = _chunk_of_program(tokens, chunks, chunk_tokens, num_heads)  # pyright: ignore[reportGeneralTypeIssues]
    operand = _load_square(dstate, image_head, P, Q)
    key_shift = tl.load(dkey + image_head * P + tl.arange(0, P))
    for start in range(first, end, STREAMED):
        row = (start + tl.arange(0, STREAMED)).to(tl.int64)
        valid = row < tokens
        x = load_rows(k + image * k_batch + head * D, row, k_token, valid, D, P).to(tl.float32)
        values = load_rows(v + image * v_batch + head * E, row, v_token, valid, E, Q)
        dfeatures = tl.dot(values, tl.trans(operand), input_precision=PRECISION) + key_shift[None, :]
        if FEATURES == "softmax":
            features = tl.exp2((x - tl.load(key_maximum + image_head * P + tl.arange(0, P))[None, :]) * LOG2E)
            derivatives = features
        else:
            features, derivatives = _pointwise_features(x, FEATURES)
        dvalues = tl.dot(features.to(operand.dtype), operand, input_precision=PRECISION)
        if SUBTRACT:
            dvalues += tl.load(dvalue + image_head * Q + tl.arange(0, Q))[None, :]
        store_rows(dk + image * dk_batch + head * D, row, dk_token, valid, dfeatures * derivatives, D, P)
        store_rows(dv + image * dv_batch + head * E, row, dv_token, valid, dvalues, E, Q)
