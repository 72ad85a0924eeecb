"""Softmax-free attention of SOFT (Lu et al., NeurIPS 2021, arXiv:2110.11945, and IJCV 2024, arXiv:2207.03341).

Written after the papers and the authors' repository, fudan-zvg/SOFT (MIT).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.functional import merge_heads, split_heads
from ops.precision import at_least_float32, without_autocast
from ops.registry import FIRST, Place, register_op

# Ratio, and side of the convolution of the values, in each stage of the papers' nets
RATIOS, CONVS = (8, 4, 2, 1), (9, 5, 3, 3)
# Added to the diagonal of the landmarks' kernel in the first release
RIDGE = 0.01


@register_op("softmax_free")
class SoftmaxFreeAttention(nn.Module):
    """Tokens exchange values through landmarks, weighted by a Gaussian kernel K in place of softmax (Nyström's method).

    Queries are keys too. A strided convolution, a norm and GELU make M landmarks of each head's queries; the output is
    K(tokens, landmarks) K(landmarks, landmarks)^-1 K(landmarks, tokens) V, plus a convolution of the values that all
    channels of a head share. Newton's method computes the inverse, in at least float32; its gradient is that of the
    exact inverse. Tokens beyond the last whole square of `ratio` tokens make no landmark; a map that is smaller than
    one square is zero-padded. Cost is linear in H * W for a fixed number of landmarks.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The stage sets the defaults of `ratio` and `conv`.
        ratio: Side of the map divided by the side of the landmarks' map; by default 8, 4, 2 and 1 by stage.
        conv: Side of the convolution of the values, odd; by default 9, 5, 3 and 3 by stage.
        iterations: Number of Newton's iterations; default 20.
        normalized: Divide the inverse by the square roots of its kernel's row and column sums, as in the second release
            (SOFT++). The start of Newton's iteration then follows from all heads of the image; the authors' code takes
            all images of the batch. Default False.
    """

    family = "pooled"
    renames = (
        (r"^W_q\.", "q."),
        (r"^W_v\.", "v."),
        (r"^attn\.Qlandmark_op\.", "landmark."),
        (r"^attn\.Qnorm_act\.0\.", "norm."),
        (r"^attn\.conv\.", "conv."),
        (r"^ff\.", "proj."),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        ratio: int | None = None,
        conv: int | None = None,
        iterations: int = 20,
        normalized: bool = False,
    ):
        super().__init__()
        stage = min(place.stage, 3)
        ratio, conv = RATIOS[stage] if ratio is None else ratio, CONVS[stage] if conv is None else conv
        if min(ratio, iterations) < 1:
            raise ValueError(f"ratio and iterations must be at least 1, not {ratio} and {iterations}")
        if conv < 1 or conv % 2 == 0:
            raise ValueError(f"conv must be odd and at least 1, not {conv}")
        head_dim = dim // num_heads
        self.num_heads, self.ratio, self.iterations, self.normalized = num_heads, ratio, iterations, normalized
        self.q, self.v, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.landmark = nn.Conv2d(head_dim, head_dim, ratio, stride=ratio, bias=False)
        self.norm = nn.LayerNorm(head_dim)
        self.conv = nn.Conv2d(num_heads, num_heads, conv, padding=conv // 2, groups=num_heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        values, queries = self.v(x), self.q(x) / math.sqrt(math.sqrt(self.norm.normalized_shape[0]))
        landmarks = self.landmarks(queries)
        q, v = (split_heads(t.flatten(1, 2), self.num_heads) for t in (queries, values))
        # Half precision is too coarse for differences of squares and for Newton's method.
        with without_autocast(x):
            q, v, landmarks = at_least_float32(q, v, landmarks)
            kernel = gaussian(q, landmarks)  # (B, heads, H * W, M)
            gathered = self.inverse(gaussian(landmarks, landmarks)) @ (kernel.transpose(-1, -2) @ v)
            out = (kernel @ gathered).to(values.dtype)
        out = merge_heads(out).unflatten(1, x.shape[1:3])
        return self.proj(out + self.convolved(values))

    def landmarks(self, queries: Tensor) -> Tensor:
        """Return the landmarks of each head (B, heads, M, C / heads) of the queries (B, H, W, C)."""
        B, H, W, _ = queries.shape
        # A comparison, unlike a maximum in the size of the padding, stays simple where the sizes are variable.
        if min(H, W) < self.ratio:
            queries = F.pad(queries, (0, 0, 0, max(self.ratio - W, 0), 0, max(self.ratio - H, 0)))
        heads = queries.unflatten(3, (self.num_heads, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
        return F.gelu(self.norm(self.landmark(heads).flatten(2).transpose(1, 2))).unflatten(0, (B, self.num_heads))

    def inverse(self, kernel: Tensor) -> Tensor:
        """Return the inverse of kernels (B, heads, M, M) by Newton's method, normalised for SOFT++."""
        sums, identity = kernel.sum(-1, keepdim=True), torch.eye(kernel.shape[-1], device=kernel.device)
        with torch.no_grad():
            if self.normalized:
                start = 2 / sums.amax((1, 2), keepdim=True) ** 2
                square = kernel @ kernel
                for _ in range(10):
                    residual = (identity - start * square).abs().sum(-2, keepdim=True).amax((1, 3), keepdim=True)
                    start = torch.where(residual > 1.01, start / 2, start)
            else:
                start = 1.8 / sums.amax(-2, keepdim=True) ** 2
        if not self.normalized:
            kernel = kernel + RIDGE * identity
        with torch.no_grad():
            inverse = start * kernel
            for _ in range(self.iterations - 1):
                inverse = 2 * inverse - inverse @ kernel @ inverse
        # The last iteration alone has a gradient, which is that of the exact inverse: -V^T G V^T.
        inverse = 2 * inverse - inverse @ kernel @ inverse
        return inverse / (sums * sums.transpose(-1, -2)).sqrt() if self.normalized else inverse

    def convolved(self, values: Tensor) -> Tensor:
        """Convolve the values (B, H, W, C) with one filter for each head."""
        weight = self.conv.weight.repeat_interleave(values.shape[3] // self.num_heads, dim=0)
        out = F.conv2d(values.permute(0, 3, 1, 2), weight, padding=self.conv.padding, groups=len(weight))
        return out.permute(0, 2, 3, 1)


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    """Return exp(-|a_i - b_j|² / 2) for all pairs of tokens (..., N, D) and (..., M, D): (..., N, M)."""
    squares = a.square().sum(-1, keepdim=True) + b.square().sum(-1)[..., None, :]
    return torch.exp(a @ b.transpose(-1, -2) - squares / 2)
