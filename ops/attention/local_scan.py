"""Local attentional Mamba of LaMamba (Fu et al., arXiv:2408.02615): a selective scan, then shifted-window attention.

Written after the paper and the authors' repository, yunxiangfu2001/LaMamba-Diff (MIT). The scan is SS2D of VMamba (Liu
et al., arXiv:2401.10166). The authors' block has a residual connection around the scan and one around the attention; as
an op, the two stand between the block's norm and its residual connection.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ops.attention.window import WindowAttention
from ops.registry import FIRST, Place, register_op
from ops.scan_orders import positions, raster, snake, to_orders
from ops.selective_scan import SS2D
from ops.tiles import ragged_window_attention


class RaggedWindowAttention(WindowAttention):
    """Window attention whose windows at the border hold fewer tokens, instead of padded ones."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1:3]
        h, w = (min(side, n) for side, n in zip(self.window_size, size, strict=True))
        shift = (self.shift if h < size[0] else 0, self.shift if w < size[1] else 0)
        qkv = self.qkv(x).unflatten(-1, (3, -1))
        return self.proj(ragged_window_attention(qkv, self.bias((h, w)), self.num_heads, (h, w), shift))


@register_op("local_scan")
class LocalScan(nn.Module):
    """A state runs over the map along four orders, and tokens then attend to the tokens of their shifted window.

    With a the output of the scan, the op gives a + attention(LayerNorm(x + a)). Nothing is padded: windows
    at the border hold fewer tokens. Cost is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Number of heads of the window attention.
        place: The block sets the default of `shift`.
        scan: "snake" (default): rows, and columns, one after the other and every second one backwards, so that
            successive tokens are neighbours in the map. "cross": all of them in the same direction, as in VMamba. Each
            of the two orders is also reversed.
        states: Number of states of each channel; default 1.
        expansion: Number of channels of the scan, relative to `dim`; default 2.
        kernel: Side of the depthwise convolution before the scan, odd; default 3. 1 leaves it out.
        window: Side of a window in tokens; default 8. 0 leaves the attention out, and the op is SS2D alone.
        shift: Number of tokens by which the windows are shifted, as in `WindowAttention`.
    """

    family = "mixed"
    renames = ((r"^(?!scan\.|norm\.|attn\.)", "scan."),)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        scan: str = "snake",
        states: int = 1,
        expansion: float = 2.0,
        kernel: int = 3,
        window: int = 8,
        shift: int | None = None,
    ):
        super().__init__()
        if scan not in ("snake", "cross"):
            raise ValueError(f"scan must be 'snake' or 'cross', not {scan!r}")
        self.order = scan
        self.scan = SS2D(dim, states, expansion, kernel)
        self.norm = self.attn = None
        if window:
            self.norm = nn.LayerNorm(dim)
            self.attn = RaggedWindowAttention(dim, num_heads, place=place, window=window, shift=shift)

    def forward(self, x: Tensor) -> Tensor:
        scanned = self.scan(x, map_orders(x.shape[1:3], x.device, self.order))
        if self.norm is None or self.attn is None:
            return scanned
        return scanned + self.attn(self.norm(x + scanned))


def map_orders(size: Sequence[int], device: torch.device, kind: str) -> Tensor:
    """Return four orders of the tokens of a map of `size` (H, W): (4, H * W).

    Args:
        size: Size of the map.
        device: Device of the result.
        kind: "snake" or "cross", as in `LocalScan`.
    """
    i, j = positions(size, device)
    if kind == "cross":
        rows, columns = raster(i, j), raster(j, i)
        return to_orders([rows, columns, -rows, -columns])
    # The first column runs from the bottom to the top
    rows, columns = snake(i, j), snake(j, size[0] - 1 - i)
    return to_orders([rows, -rows, columns, -columns])
