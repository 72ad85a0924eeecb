"""Window attention with low-rank adapters, of LoLA-SpecViT (Zidi et al., Remote Sensing 2025).

Written after the authors' repository, FadiZidiDz/LoLA-SpecViT-Model (no licence).
"""

from torch import Tensor

from ops.attention.window import WindowAttention
from ops.functional import window_attention
from ops.lora import LoRALinear
from ops.registry import FIRST, Place, register_op
from ops.windows import pad_to_multiple


@register_op("lora_window")
class LoRAWindowAttention(WindowAttention):
    """Tokens attend to the tokens of their window, which is never shifted; projections have gated adapters.

    The map is zero-padded on the right and at the bottom to whole windows, also where a side is shorter than a window,
    and padded tokens are attended to. There is a learned bias for each relative position. Cost is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: Not used.
        window: Side of a window in tokens; default 7.
        rank: Rank of the adapters; default 16.
        alpha: Scale of the adapters relative to `rank`; default 32.
        freeze: Whether all of the projections but their adapters stay as they are in training; default False.
        qkv_bias: Give the query, key and value projections a bias; default True.
    """

    family = "local"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        window: int = 7,
        rank: int = 16,
        alpha: float = 32.0,
        freeze: bool = False,
        qkv_bias: bool = True,
    ):
        super().__init__(dim, num_heads, place=place, window=window, shift=0)
        self.qkv = LoRALinear(dim, 3 * dim, qkv_bias, rank=rank, alpha=alpha, freeze=freeze)
        self.proj = LoRALinear(dim, dim, rank=rank, alpha=alpha, freeze=freeze)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        qkv = self.qkv(pad_to_multiple(x, self.window_size)).unflatten(-1, (3, -1))
        window = self.window_size
        bias, scale = self.softmax.window_options(self.bias(window), window)
        out = window_attention(qkv, bias, self.num_heads, window, scale=scale)
        # The projection acts on each token by itself, so that padded tokens need none.
        return self.proj(out[:, :H, :W])
