"""Base of ops that mix sets of tokens, and take the tokens of each window or those of the whole map for a set."""

from typing import Any

import torch
from torch import Tensor, nn

from ops.registry import Place
from ops.windows import from_windows, pad_to_multiple, to_windows


class WindowedOp(nn.Module):
    """Op whose method `mix` is applied to the tokens of each window, or to all tokens of the map with extra tokens.

    The map is zero-padded on the right and at the bottom to a multiple of the window; padded tokens take part. A side
    of the map that is shorter than the window is one window.

    Args:
        place: The stride and the number of extra tokens set the default of `window`.
        window: Side of a window in tokens; 0 takes the whole map. By default 7 at strides below 16, where the map has
            many tokens, and 0 at greater strides and with extra tokens.

    Raises:
        ValueError: `window` is negative, or not 0 although there are extra tokens.
    """

    takes_extra = True

    def __init__(self, place: Place, window: int | None):
        super().__init__()
        if window is None:
            window = 0 if place.extra or place.stride >= 16 else 7
        if window < 0 or (window and place.extra):
            raise ValueError(f"window must be at least 1, or 0 for the whole map and for extra tokens, not {window}")
        self.window = window

    def mix(self, x: Tensor) -> Tensor:
        """Mix sets of tokens (B, N, C)."""
        raise NotImplementedError

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        if extra is None:
            return self.mix_map(x)
        E = extra.shape[1]
        if not E:
            return self.mix_map(x), extra
        out = self.mix(torch.cat([extra, x.flatten(1, 2)], dim=1))
        return out[:, E:].view(x.shape), out[:, :E]

    def mix_map(self, x: Tensor) -> Tensor:
        """Mix the windows of maps (B, H, W, C), or all of their tokens."""
        H, W = x.shape[1:3]
        window = (min(self.window, H), min(self.window, W)) if self.window else (H, W)
        padded = pad_to_multiple(x, window)
        grid = (padded.shape[1] // window[0], padded.shape[2] // window[1])
        windows = to_windows(padded, grid)
        out = self.mix(windows.flatten(0, 1)).view(windows.shape)
        return from_windows(out, grid, padded.shape[1:3])[:, :H, :W]
