"""Modified shifted-window attention (MSW-MSA) of HiDiffusion.

Paper: HiDiffusion: Unlocking Higher-Resolution Creativity and Efficiency in Pretrained Diffusion Models (Zhang et al.,
ECCV 2024, arXiv:2311.17528). Written after the paper and the authors' repository, megvii-research/HiDiffusion
(Apache-2.0). The authors draw the shift at random; that blocks take the four shifts in turn, and the mask, are ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.registry import FIRST, Place, register_op
from ops.tiles import ragged_window_attention
from retinue.utils.arithmetic import round_up


@register_op("multi_shift_window")
class MultiShiftWindowAttention(nn.Module):
    """Tokens attend to the tokens of their window, of which the map has 2 x 2, after a cyclic shift.

    The shift is none, one, two or three quarters of a window, the same along both sides. Tokens that it brings together
    from opposite sides of the map attend to each other. If a side of the map is odd, the map is enlarged by one token
    for the attention, and the output is reduced again, both by bicubic interpolation. Cost is quadratic in H * W,
    divided by 4.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The block sets the default of `shift`.
        shift: Shift in quarters of a window, from 0 to 3; by default the blocks of a stage take the four in turn.
        random: Draw the shift anew in each forward pass of training, as the authors do; default False.
        wrap: Let tokens from opposite sides of the map attend to each other; default True.
    """

    family = "local"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        shift: int | None = None,
        random: bool = False,
        wrap: bool = True,
    ):
        super().__init__()
        shift = place.block % 4 if shift is None else shift
        if not 0 <= shift <= 3:
            raise ValueError(f"shift must be from 0 to 3 quarters of a window, not {shift}")
        self.num_heads, self.shift, self.random, self.wrap = num_heads, shift, random, wrap
        # The shift is drawn as a number of Python, which a graph cannot hold
        self.fullgraph = not random
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1:3]
        x = resize(x, (round_up(size[0], 2), round_up(size[1], 2)))
        window = (x.shape[1] // 2, x.shape[2] // 2)
        quarters = int(torch.randint(4, ())) if self.random and self.training else self.shift
        shift = (window[0] // 4 * quarters, window[1] // 4 * quarters)
        qkv = self.qkv(x).unflatten(-1, (3, -1))
        out = ragged_window_attention(qkv, None, self.num_heads, window, shift, self.wrap)
        return resize(self.proj(out), (size[0], size[1]))


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate (B, H, W, C) to `size` = (H, W)."""
    if x.shape[1:3] == size:
        return x
    return F.interpolate(x.permute(0, 3, 1, 2), size, mode="bicubic").permute(0, 2, 3, 1)
