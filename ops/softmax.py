"""Options of the softmax in attention ops: a temperature that follows the number of keys, and a bias of low rank.

An op that owns a `SoftmaxOptions` under the name `softmax`, and whose class sets `softmax_options = True`, takes the
options beside its own arguments, since `ops.create_op` hands them over: `{name: full, temperature: entropy}`.

The temperature keeps the entropy of the attention, relative to the logarithm of the number of keys, at resolutions
other than that of the training: the scale is multiplied by sqrt(log(keys) / log(training keys)) (Jin et al., NeurIPS
2023, arXiv:2306.08645). `ops/low_rank.py` has the biases.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ops.low_rank import ContentBias, DistanceBias, LearnedBias, append_factors
from retinue.utils.arithmetic import ceil_div

if TYPE_CHECKING:
    from ops.registry import Place

TEMPERATURES = ("fixed", "entropy")
BIASES = ("distance", "learned", "content")


class SoftmaxOptions(nn.Module):
    """Change of the queries, keys and scale of an attention op; without options it changes nothing.

    Args:
        num_heads: Number of heads.
        head_dim: Channels D of the queries and keys of a head.
        place: Place of the op; its stride and its extra tokens say how many keys there are.
        window: Side of the windows in tokens, by default the whole map.
        pooling: Side of the queries' map divided by the side of the keys' map.
        content: Whether the op can add a bias "content", which `window_options` cannot.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        place: "Place",
        window: int | None = None,
        pooling: int = 1,
        content: bool = True,
    ):
        super().__init__()
        self.num_heads, self.head_dim, self.place = num_heads, head_dim, place
        self.window, self.pooling, self.content = window, pooling, content
        self.train_keys: int | None = None
        self.bias: nn.Module | None = None

    def configure(
        self,
        temperature: str = "fixed",
        train_size: int = 224,
        train_keys: int | None = None,
        low_rank_bias: str | None = None,
        bias_rank: int = 16,
    ) -> None:
        """Set the options.

        Args:
            temperature: "fixed" (default), or "entropy": the temperature follows the number of keys.
            train_size: Side in pixels of the images of the training; default 224. The number of keys for "entropy" and
                the positions of a bias "learned" follow from it.
            train_keys: Number of keys of a query in the training, in place of that from `train_size`. In windows it is
                by default the window's, which matters if windows are enlarged after the training.
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
        if low_rank_bias == "content" and not self.content:
            raise ValueError("low_rank_bias of this op must be 'distance' or 'learned', not 'content'")
        if min(bias_rank, train_size, 1 if train_keys is None else train_keys) < 1:
            given = f"{bias_rank}, {train_size} and {train_keys}"
            raise ValueError(f"bias_rank, train_size and train_keys must be at least 1, not {given}")
        side = ceil_div(train_size, self.place.stride) if self.window is None else self.window
        if temperature == "entropy":
            extra = self.place.extra if self.window is None else 0
            self.train_keys = ceil_div(side, self.pooling) ** 2 + extra if train_keys is None else train_keys
        if low_rank_bias == "distance":
            self.bias = DistanceBias(self.num_heads)
        elif low_rank_bias == "learned":
            self.bias = LearnedBias(self.num_heads, bias_rank, side)
        elif low_rank_bias == "content":
            self.bias = ContentBias(self.head_dim, bias_rank)

    def scale(self, keys: int) -> float:
        """Return the factor on the products of queries and keys, for a number of keys of a query."""
        factor = 1.0
        if self.train_keys is not None:
            factor = math.sqrt(math.log(max(keys, 2)) / math.log(max(self.train_keys, 2)))
        return self.head_dim**-0.5 * factor

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
        scale = self.scale(k.shape[-2])
        if self.bias is None:
            return q, k, scale
        E, size, key_size = q.shape[-2] - size[0] * size[1], size, size if key_size is None else key_size
        return *append_factors(q, k, self.bias(q[..., E:, :], k[..., E:, :], size, key_size), scale), 1.0

    def window_options(self, bias: Tensor | None, window: Sequence[int]) -> tuple[Tensor | None, float]:
        """Return the bias and the scale for attention in windows (h, w).

        Args:
            bias: Bias of the op (heads, N, N), or None.
            window: Size (h, w) of a window of N tokens.
        """
        scale = self.scale(window[0] * window[1])
        if self.bias is None:
            return bias, scale
        # Factors of positions need neither queries nor keys
        phi_q, phi_k = self.bias(bias, bias, window, window)
        low_rank = phi_q @ phi_k.transpose(-2, -1)
        return low_rank if bias is None else bias + low_rank, scale
