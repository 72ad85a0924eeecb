"""Options of the softmax in attention ops: a temperature that follows the number of keys, and a bias of low rank.

An op that owns a `SoftmaxOptions` under the name `softmax`, and whose class sets `softmax_options = True`, takes the
options beside its own arguments, since `ops.create_op` hands them over: `{name: full, temperature: entropy}`.

The temperature keeps the entropy of the attention, relative to the logarithm of the number of keys, at resolutions
other than that of the training: the scale is multiplied by sqrt(log(keys) / log(training keys)) (Jin et al., NeurIPS
2023, arXiv:2306.08645). `ops/low_rank.py` has the biases.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ops.low_rank import ContentBias, DistanceBias, LearnedBias, append_factors

TEMPERATURES = ("fixed", "entropy")
BIASES = ("distance", "learned", "content")


class SoftmaxOptions(nn.Module):
    """Change of the queries, keys and scale of an attention op; without options it changes nothing.

    Args:
        num_heads: Number of heads.
        head_dim: Channels D of a head; None for an op in windows, which takes no bias "content".
        side: Side in tokens of the queries' map, or of the window, at an image of 224 pixels.
        keys: Number of keys of a query at such an image.
    """

    def __init__(self, num_heads: int, head_dim: int | None, side: int, keys: int):
        super().__init__()
        self.num_heads, self.head_dim, self.side, self.keys = num_heads, head_dim, side, keys
        self.train_keys: int | None = None
        self.bias: nn.Module | None = None

    def configure(
        self,
        temperature: str = "fixed",
        train_keys: int | None = None,
        low_rank_bias: str | None = None,
        bias_rank: int = 16,
    ) -> None:
        """Set the options.

        Args:
            temperature: "fixed" (default), or "entropy": the temperature follows the number of keys.
            train_keys: Number of keys of a query in training, for "entropy"; by default that at images of 224 pixels.
            low_rank_bias: Bias that is added to the scores, by default none. "distance": minus a learned slope times
                the squared distance. "learned": of learned factors for each position. "content": of learned functions
                of the query and of the key.
            bias_rank: Rank of a bias "learned" or "content"; default 16.

        Raises:
            ValueError: An option is unknown or out of its range.
        """
        if temperature not in TEMPERATURES:
            raise ValueError(f"temperature must be 'fixed' or 'entropy', not {temperature!r}")
        if low_rank_bias is not None and low_rank_bias not in BIASES:
            raise ValueError(f"low_rank_bias must be one of {', '.join(BIASES)}, not {low_rank_bias!r}")
        if low_rank_bias == "content" and self.head_dim is None:
            raise ValueError("low_rank_bias must be 'distance' or 'learned' in windows, not 'content'")
        if bias_rank < 1 or (train_keys is not None and train_keys < 1):
            raise ValueError(f"bias_rank and train_keys must be at least 1, not {bias_rank} and {train_keys}")
        if temperature == "entropy":
            self.train_keys = self.keys if train_keys is None else train_keys
        if low_rank_bias == "distance":
            self.bias = DistanceBias(self.num_heads)
        elif low_rank_bias == "learned":
            self.bias = LearnedBias(self.num_heads, bias_rank, self.side)
        elif self.head_dim is not None and low_rank_bias == "content":
            self.bias = ContentBias(self.head_dim, bias_rank)

    def scale(self, keys: int, head_dim: int) -> float:
        """Return the factor on the products of queries and keys of `head_dim` channels, for `keys` keys of a query."""
        factor = 1.0
        if self.train_keys is not None:
            factor = math.sqrt(math.log(max(keys, 2)) / math.log(max(self.train_keys, 2)))
        return head_dim**-0.5 * factor

    def forward(
        self, q: Tensor, k: Tensor, size: Sequence[int], key_size: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, float]:
        """Return queries, keys and scale for attention without a bias.

        Args:
            q: Queries (B, heads, E + H * W, D).
            k: Keys (B, heads, E + h * w, D).
            size: Size (H, W) of the queries' map.
            key_size: Size (h, w) of the keys' map; by default that of the queries'.
        """
        scale = self.scale(k.shape[-2], q.shape[-1])
        if self.bias is None:
            return q, k, scale
        E, size, key_size = q.shape[-2] - size[0] * size[1], size, size if key_size is None else key_size
        return *append_factors(q, k, self.bias(q[..., E:, :], k[..., E:, :], size, key_size), scale), 1.0

    def window_options(self, bias: Tensor | None, window: Sequence[int], head_dim: int) -> tuple[Tensor | None, float]:
        """Return the bias and the scale for attention in windows (h, w).

        Args:
            bias: Bias of the op (heads, N, N), or None.
            window: Size (h, w) of a window of N tokens.
            head_dim: Channels of the queries and keys of a head.
        """
        scale = self.scale(window[0] * window[1], head_dim)
        if self.bias is None:
            return bias, scale
        # Factors of positions need neither queries nor keys
        phi_q, phi_k = self.bias(bias, bias, window, window)
        low_rank = phi_q @ phi_k.transpose(-2, -1)
        return low_rank if bias is None else bias + low_rank, scale
