"""Scans along a sequence: the recurrences of state space models and of linear attention.

They are computed without a loop over the tokens, in linear cost and without divisions, so that no decay can overflow.
States and sums are in float32 at least.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from ops.backend import obstacle_to_kernels, primitive, use_triton
from ops.precision import at_least_float32, without_autocast
from retinue.utils.arithmetic import padding

# Tokens of a chunk in `gated_linear_attention`: inside a chunk the weights of all pairs are multiplied.
CHUNK = 64
# Maximum number of states of a channel in the kernels of `selective_scan`
MAX_STATES = 64


@custom_op("retinue::linear_recurrence", mutates_args=())
def linear_recurrence(decay: Tensor, x: Tensor) -> Tensor:
    """Compute h_t = decay_t * h_(t-1) + x_t from h_(-1) = 0, as an associative scan.

    For `torch.compile` it is one operator, since a graph for maps of any size cannot unroll the scan.

    Args:
        decay: Factors on the state (..., N, C), from 0 to 1; broadcasts to `x`.
        x: Inputs (..., N, C).

    Returns:
        States h (..., N, C).
    """
    return scan_in_pairs(decay, x).contiguous()


def scan_in_pairs(decay: Tensor, x: Tensor) -> Tensor:
    """Compute `linear_recurrence` in 2 * log2(N) operations, of about 3 * N steps in all.

    Two adjacent steps make one step of a recurrence that is half as long: its states are those of every second
    position, and the states between them follow.
    """
    n = x.shape[-2]
    if n == 1:
        return x.clone()
    if n % 2:
        decay, x = F.pad(decay, (0, 0, 0, 1)), F.pad(x, (0, 0, 0, 1))
    decay_even, decay_odd = decay.unflatten(-2, (-1, 2)).unbind(-2)
    x_even, x_odd = x.unflatten(-2, (-1, 2)).unbind(-2)
    odd = scan_in_pairs(decay_odd * decay_even, decay_odd * x_even + x_odd)
    even = decay_even * F.pad(odd[..., :-1, :], (0, 0, 1, 0)) + x_even
    return torch.stack([even, odd], dim=-2).flatten(-3, -2)[..., :n, :]


@linear_recurrence.register_fake
def _empty_states(decay: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output)


def _backward(ctx, dh: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients by a recurrence from the end."""
    decay, h = ctx.saved_tensors
    next_decay = F.pad(decay[..., 1:, :], (0, 0, 0, 1))
    dx = linear_recurrence(next_decay.flip(-2), dh.flip(-2)).flip(-2)
    previous = F.pad(h[..., :-1, :], (0, 0, 1, 0))
    return (dx * previous).sum_to_size(decay.shape), dx


linear_recurrence.register_autograd(_backward, setup_context=_setup_context)


@primitive
def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, first: Tensor | None = None) -> Tensor:
    """Compute the selective state space model of Mamba (Gu and Dao, arXiv:2312.00752) along each of K sequences.

    Every channel has S states: h_t = exp(delta_t A) h_(t-1) + delta_t u_t B_t from h_(-1) = 0, and its output is
    y_t = C_t · h_t. The term D u_t of the paper is left to the caller.

    Args:
        u: Inputs (B, K, N, E).
        delta: Lengths of the steps (B, K, N, E), not negative.
        A: Rates of the states (K, E, S), not positive.
        B: Weights from the input to the states (B, K, N, S).
        C: Weights from the states to the output (B, K, N, S).
        first: True where the state starts anew, from 0: (K, N). By default only at position 0.

    Returns:
        Outputs (B, K, N, E), in float32 at least.

    Raises:
        ValueError: `ops.backend=triton` was chosen and the kernels cannot run.
    """
    if use_triton("selective_scan", obstacle_to_scan_kernels(u, A)):
        from ops.kernels.selective_scan import selective_scan as kernel

        return kernel(u, delta, A, B, C, first)
    with without_autocast(u):
        u, delta, A, B, C = at_least_float32(u, delta, A, B, C)
        decay = (delta.unsqueeze(-1) * A.unsqueeze(1)).exp()  # (B, K, N, E, S)
        if first is not None:
            decay = decay.masked_fill(first[:, :, None, None], 0.0)
        inputs = (delta * u).unsqueeze(-1) * B.unsqueeze(-2)
        states = linear_recurrence(decay.flatten(-2), inputs.flatten(-2)).view_as(inputs)
        return (states @ C.unsqueeze(-1)).squeeze(-1)


def obstacle_to_scan_kernels(u: Tensor, A: Tensor) -> str | None:
    """Return the reason why the Triton kernels cannot run, or None if they can."""
    if reason := obstacle_to_kernels(u, head_dim=1):
        return reason
    return None if A.shape[-1] <= MAX_STATES else f"it takes at most {MAX_STATES} states, not {A.shape[-1]}"


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, both_ways: bool = False) -> Tensor:
    """Compute causal linear attention whose state decays by one factor for each token.

    The state is S_t = exp(log_decay_t) S_(t-1) + k_t v_t^T, and the output is q_t^T S_t. So the weight of token s for a
    later token t is exp(log_decay_(s+1) + ... + log_decay_t) q_t·k_s. Cost is linear in N: inside chunks of 64 tokens
    the weights of all pairs are computed, and a state is handed from chunk to chunk.

    Args:
        q: Queries (..., N, D).
        k: Keys (..., N, D).
        v: Values (..., N, E).
        log_decay: Logarithms of the factors (..., N), not positive; broadcasts.
        both_ways: Add the same attention along the reversed sequence, in which a token's own factor also stands between
            it and the tokens after it. The token itself counts once.

    Returns:
        Tensor (..., N, E), in float32 at least.
    """
    with without_autocast(q):
        q, k, v, log_decay = at_least_float32(q, k, v, log_decay)
        out = _causal(q, k, v, log_decay)
        if both_ways:
            out = out + _causal(q.flip(-2), k.flip(-2), v.flip(-2), log_decay.flip(-1)).flip(-2)
            out = out - (q * k).sum(-1, keepdim=True) * v
        return out


def _causal(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Compute `gated_linear_attention` in one direction."""
    n = q.shape[-2]
    chunk = min(CHUNK, n)
    pad = padding(n, chunk)
    q, k, v = (F.pad(x, (0, 0, 0, pad)).unflatten(-2, (-1, chunk)) for x in (q, k, v))  # (..., P, chunk, D or E)
    total = F.pad(log_decay, (0, pad)).unflatten(-1, (-1, chunk)).cumsum(-1).unsqueeze(-1)  # (..., P, chunk, 1)
    # Differences of sums, which are not positive for pairs of a query and an earlier key, cannot overflow
    between = total - total.transpose(-2, -1)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    inside = (q @ k.transpose(-2, -1) * between.masked_fill(later, -torch.inf).exp()) @ v
    last = total[..., -1:, :]
    added = (k * (last - total).exp()).transpose(-2, -1) @ v  # (..., P, D, E)
    ends = linear_recurrence(last.exp().squeeze(-1), added.flatten(-2))
    starts = F.pad(ends[..., :-1, :], (0, 0, 1, 0)).view_as(added)
    return (inside + (q * total.exp()) @ starts).flatten(-3, -2)[..., :n, :]
