"""Relative attention of CoAtNet (Dai et al., NeurIPS 2021, arXiv:2106.04803), Astroformer and MOAT.

Astroformer (Dagli, ICLR workshop 2023, arXiv:2304.05350) and MOAT (Yang et al., ICLR 2023, arXiv:2210.01820) compute it
in their last stages. Written after the papers and the authors' repositories, Rishit-dagli/Astroformer and
google-research/deeplab2 (both Apache-2.0).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.functional import window_attention
from ops.registry import FIRST, Place, register_op
from ops.softmax import SoftmaxOptions
from ops.windows import pad_to_multiple
from retinue.utils.arithmetic import ceil_div


@register_op("relative_conv_attention")
class RelativeConvAttention(nn.Module):
    """Tokens attend to all tokens of the map, with a learned global depthwise kernel added to the scores.

    The kernel is a bias for each offset from the query to the key and each head. It is learned for a map of `size`
    tokens a side, and interpolated to the size of the map or window at hand. Cost is quadratic in H * W, or linear with
    windows: then the map is zero-padded on the right and at the bottom to whole windows, and padded tokens are attended
    to.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The stride sets the default of `size`.
        size: Side, in tokens, of the map for which the kernel is learned; by default the side at an image of 224
            pixels. 0 leaves the kernel out.
        window: Side of the windows in which tokens attend to each other, in tokens; by default the whole map.
        out_dim: Number of channels of the output; by default `dim`.
    """

    family = "full"
    softmax_options = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        size: int | None = None,
        window: int | None = None,
        out_dim: int | None = None,
    ):
        super().__init__()
        size = ceil_div(224, place.stride) if size is None else size
        if size < 0 or (window is not None and window < 1):
            raise ValueError(f"size must be at least 0 and window at least 1, not {size} and {window}")
        out_dim = dim if out_dim is None else out_dim
        self.num_heads, self.window = num_heads, window
        self.softmax = SoftmaxOptions(num_heads, out_dim // num_heads, place, window, content=False)
        self.qkv = nn.Linear(dim, 3 * out_dim)
        self.proj = nn.Linear(out_dim, out_dim)
        self.relative_position_bias_table = None
        if size:
            table = torch.empty(num_heads, 2 * size - 1, 2 * size - 1)
            self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def no_weight_decay(self) -> set[str]:
        return set() if self.relative_position_bias_table is None else {"relative_position_bias_table"}

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        window = (H, W) if self.window is None else (min(self.window, H), min(self.window, W))
        qkv = self.qkv(pad_to_multiple(x, window)).unflatten(-1, (3, -1))
        bias, scale = self.softmax.window_options(self.bias(window), window)
        out = window_attention(qkv, bias, self.num_heads, window, scale=scale)
        return self.proj(out[:, :H, :W])

    def bias(self, window: tuple[int, int]) -> Tensor | None:
        """Return the bias between the tokens of a window of (h, w) tokens, (heads, h * w, h * w), or None."""
        if self.relative_position_bias_table is None:
            return None
        table = resize(self.relative_position_bias_table, (2 * window[0] - 1, 2 * window[1] - 1))
        rows, columns = (
            torch.arange(n, device=table.device) - torch.arange(n, device=table.device)[:, None] + n - 1 for n in window
        )
        return table[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3).flatten(1, 2)

    def resize_table(self, name: str, table: Tensor) -> Tensor:
        """Interpolate a checkpoint's table for a map of another size; `load_weights` calls it.

        Astroformer's tables are (offsets, heads), with the offset from key to query.
        """
        if table.ndim == 2:
            side = round(len(table) ** 0.5)
            table = table.T.unflatten(1, (side, side)).flip(1, 2)
        return resize(table, self.get_parameter(name).shape[1:])


def resize(table: Tensor, size: tuple[int, ...]) -> Tensor:
    """Interpolate a table (heads, offsets, offsets) to `size` offsets along each side."""
    if table.shape[1:] == size:
        return table
    return F.interpolate(table.unsqueeze(0), size, mode="bilinear").squeeze(0)
