"""Linear attention of all tokens to all tokens: its definition in plain PyTorch, and the choice of its kernels.

The weight between a query and a key is a product of their features. So the sum over the keys of features times values,
the state, is computed once for all queries, and the cost is linear in the number of tokens. The weights of
Katharopoulos et al. (ICML 2020, arXiv:2006.16236), Shen et al. (WACV 2021, arXiv:1812.01243), L2ViT (arXiv:2501.16182)
and InLine (NeurIPS 2024, arXiv:2412.06590) are cases.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.backend import obstacle_to_kernels, primitive, use_triton
from ops.functional import merge_heads, split_heads
from retinue.utils.suggestions import nearest

FEATURES = ("elu", "relu", "softmax", "identity")
NORMALIZATIONS = ("none", "sum", "subtract")


def max_head_dim(dtype: torch.dtype, normalization: str, capability: tuple[int, int] | None) -> int:
    """Return the number of channels of the widest heads that the kernels take: the registers hold no wider state.

    Args:
        dtype: Type of the values.
        normalization: As in `linear_attention`.
        capability: Compute capability of the GPU; None for another device.
    """
    if dtype.itemsize > 2:
        return 64
    # Before compute capability 9.0 the registers do not hold the gradient of a wider state beside that of the sums.
    return 64 if normalization == "sum" and capability is not None and capability < (9, 0) else 128


@primitive
def linear_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    num_heads: int,
    features: str = "elu",
    normalization: str = "sum",
    scale: float | Tensor = 1.0,
    min_sum: float = 1e-6,
) -> Tensor:
    """Compute multi-head attention with weights w_ij that follow from products p_ij = φ(q_i)·φ(k_j) of features.

    Features, products and sums are computed in float32 at least, so that sums over many tokens stay in range in half
    precision.

    Args:
        qkv: Queries, keys and values (B, N, 3C); or a tuple of queries (B, N, heads * D), keys (B, M, heads * D) and
            values (B, M, heads * E). Strided input is allowed.
        num_heads: Number of heads.
        features: Feature map φ. "elu": 1 + ELU; "relu"; "identity"; "softmax": softmax of a query over its channels,
            and of each channel of the keys over the tokens, for which `normalization` must be "none".
        normalization: "none": w_ij = scale * p_ij. "sum": w_ij = scale * p_ij / max(Σ_j p_ij, min_sum).
            "subtract": w_ij = scale / M * (p_ij - mean_j p_ij) + 1 / M, as in InLine.
        scale: Factor on the weights, a number or one for each head (heads,), which may be learned.
        min_sum: Smallest sum that a query's weights are divided by.

    Returns:
        Tensor (B, N, heads * E) of the values' type.

    Raises:
        ValueError: The features or the normalization are unknown or do not fit each other, or `ops.backend=triton` was
            chosen and the kernels cannot run.
    """
    if features not in FEATURES:
        raise ValueError(f"features must be {', '.join(FEATURES)}, not {features!r}.{nearest(features, FEATURES)}")
    if normalization not in NORMALIZATIONS:
        known, hint = ", ".join(NORMALIZATIONS), nearest(normalization, NORMALIZATIONS)
        raise ValueError(f"normalization must be {known}, not {normalization!r}.{hint}")
    if features == "softmax" and normalization != "none":
        raise ValueError(f"softmax features take normalization none, since they sum to 1, not {normalization!r}")
    q, k, v = qkv.chunk(3, dim=-1) if isinstance(qkv, Tensor) else qkv
    head_dim = max(q.shape[-1], v.shape[-1]) // num_heads
    capability = torch.cuda.get_device_capability(v.device) if v.is_cuda else None
    max_dim = max_head_dim(v.dtype, normalization, capability)
    if use_triton("linear_attention", obstacle_to_kernels(v, head_dim, max_dim)):
        from ops.kernels.linear_attention import linear_attention as kernel

        return kernel(qkv, num_heads, features, normalization, scale, min_sum)

    dtype = torch.promote_types(v.dtype, torch.float32)
    if isinstance(scale, Tensor):
        scale = scale.to(dtype).view(-1, 1, 1)
    # Autocast would compute the products in half precision; the meta device has no autocast
    with nullcontext() if v.is_meta else torch.autocast(v.device.type, enabled=False):
        q_heads, k_heads, v_heads = (split_heads(t, num_heads).to(dtype) for t in (q, k, v))
        out = attend_by_state(q_heads, k_heads, v_heads, features, normalization, scale, min_sum)
    return merge_heads(out).to(v.dtype)


def attend_by_state(
    q: Tensor, k: Tensor, v: Tensor, features: str, normalization: str, scale: float | Tensor, min_sum: float
) -> Tensor:
    """Compute `linear_attention` for q (B, heads, N, D), k (B, heads, M, D) and v (B, heads, M, E).

    `scale` is a number or a tensor (heads, 1, 1). The result has shape (B, heads, N, E).
    """
    q, k = map_features(q, k, features)
    if normalization == "subtract":
        # Subtracting the keys' mean gives the first term of the weights, adding the values' mean the second
        k = k - k.mean(-2, keepdim=True)
        return q @ (k.transpose(-2, -1) @ v * (scale / k.shape[-2])) + v.mean(-2, keepdim=True)
    out = q @ (k.transpose(-2, -1) @ v * scale)
    if normalization == "sum":
        out = out / (q @ k.sum(-2).unsqueeze(-1)).clamp(min=min_sum)
    return out


def map_features(q: Tensor, k: Tensor, features: str) -> tuple[Tensor, Tensor]:
    """Return the features of queries (..., N, D) and keys (..., M, D)."""
    if features == "softmax":
        return q.softmax(-1), k.softmax(-2)
    if features == "identity":
        return q, k
    feature_map = F.relu if features == "relu" else elu_plus_one
    return feature_map(q), feature_map(k)


def elu_plus_one(x: Tensor) -> Tensor:
    """Return 1 + ELU(x), which is exp(x) for negative x: computed as such, since 1 + (exp(x) - 1) loses digits."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
