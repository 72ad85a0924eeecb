"""Atrous-window selective scan, after the abstract of AtrousMamba (arXiv:2507.16172).

There is no code, and the paper was not in reach: the exact order, the window, the rates and how blocks take turns are
our definition. The abstract fixes that the scan goes window by window, that the windows are dilated at a rate that can
be set, and that the rates grow. The rest is SS2D of VMamba (arXiv:2401.10166).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.registry import FIRST, Place, register_op
from ops.scan_orders import atrous_group, atrous_windows, positions, to_orders
from ops.selective_scan import SS2D

# Rates of successive blocks, without a common factor
RATES = (1, 2, 3)


@register_op("atrous_scan")
class AtrousScan(nn.Module):
    """A state runs over the map window by window, and inside a window over one dilated grid after the other.

    A window covers window * rate tokens along each side; its rate² grids hold every `rate`-th row and column. There are
    four orders: windows, grids and tokens in raster order, the same with rows and columns exchanged, and both reversed.
    Windows at the border are smaller, so there is no padding. Cost is linear in H * W.

    Args:
        dim: Number of channels.
        num_heads: Not used; the op has no heads.
        place: The block sets the default of `rate`.
        window: Side of a window's grid in tokens; default 7.
        rate: Distance between adjacent tokens of a grid, one number or one for each of the four orders; by default 1, 2
            and 3 in successive blocks.
        reset: Start the state anew in each window, so that windows do not see each other; default False.
        states: Number of states of each channel; default 1.
        expansion: Number of channels of the scan, relative to `dim`; default 2.
        kernel: Side of the depthwise convolution before the scan, odd; default 3. 1 leaves it out.
    """

    family = "recurrent"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        window: int = 7,
        rate: int | Sequence[int] | None = None,
        reset: bool = False,
        states: int = 1,
        expansion: float = 2.0,
        kernel: int = 3,
    ):
        super().__init__()
        rate = RATES[place.block % len(RATES)] if rate is None else rate
        self.window, self.rates, self.reset = window, (rate,) * 4 if isinstance(rate, int) else tuple(rate), reset
        if window < 1 or len(self.rates) != 4 or min(self.rates) < 1:
            raise ValueError(
                f"window must be at least 1, and rate a number or four numbers of at least 1, not {window} and {rate}"
            )
        self.mixer = SS2D(dim, states, expansion, kernel)

    def forward(self, x: Tensor) -> Tensor:
        i, j = positions(x.shape[1:3], x.device)
        lines = ((i, j), (j, i), (i, j), (j, i))
        keys = [atrous_windows(*line, self.window, rate) for line, rate in zip(lines, self.rates, strict=True)]
        orders = to_orders([keys[0], keys[1], -keys[2], -keys[3]])
        if not self.reset:
            return self.mixer(x, orders)
        windows = torch.stack([atrous_group(i, j, self.window * rate).flatten() for rate in self.rates])
        visited = windows.gather(1, orders)
        first = F.pad(visited[:, 1:] != visited[:, :-1], (1, 0), value=True)
        return self.mixer(x, orders, first)
