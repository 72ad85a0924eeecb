"""Hyena N-D in two dimensions: gates and long convolutions (Zimerman and Wolf, AISTATS 2024, arXiv:2309.13600).

Written after the paper and the authors' repository, Itamarzimm/HyenaND (Apache-2.0), whose filters without a network
(`direct_paramtrization`) are left out.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.registry import FIRST, Place, register_op
from retinue.utils.arithmetic import ceil_div

DIRECTIONS = ("seq", "standard", "4dir", "4dirp", "parallel")
FILTERS = ("joint", "product")
WINDOWS = ("standard", "learn", "symmetric", "no")
# Axes of (B, C, H, W) along which each of four directions is flipped
FLIPS = ((), (-2, -1), (-1,), (-2,))
# A window falls to TARGET within the share SLOW of the map's side in the first channel and FAST in the last one.
TARGET, SLOW, FAST = 0.01, 1.5, 0.3


class ImplicitFilter(nn.Module):
    """Filters as large as the map, which a network with sines computes from the positions.

    Args:
        channels: Number of filters C.
        width: Hidden units of the network.
        side: Side of the map for which features of positions are learned; for other maps they are interpolated.
        kind: "product": a network of the row times a network of the column. "joint": one network of both.
        window: What the filters are multiplied by, as in `Hyena`.
    """

    renames = (
        # The authors' files repeat the one tensor of frequencies under each layer.
        (r"^(?:Ximplicit_filter\.1|[XY]?implicit_filter\.[35])\.freq$", None),
        (r"^Y?implicit_filter\.1\.freq$", "freq"),
        (r"^X?implicit_filter\.([0246])\.", lambda match: f"nets.0.{int(match[1]) // 2}."),
        (r"^Yimplicit_filter\.([0246])\.", lambda match: f"nets.1.{int(match[1]) // 2}."),
        (r"^pos_emb\.t$", None),
        (r"^pos_emb\.", ""),
        (r"^(?:Xmodulation\.|modulation\.X)", "x_"),
        (r"^(?:Ymodulation\.|modulation\.Y)", "y_"),
        (r"^modulation\.", ""),
    )

    deltas: Tensor
    shift: Tensor

    def __init__(self, channels: int, width: int, side: int, kind: str, window: str):
        super().__init__()
        self.kind, self.window = kind, window
        angles = 1e-4 * 2 * math.pi * torch.arange(side) / side
        features = torch.stack([torch.linspace(0, 1, side), angles.cos(), -angles.sin()], dim=-1)
        self.z = nn.Parameter(features[None])
        self.freq = nn.Parameter(torch.ones(1, width))
        widths = (3 if kind == "product" else 6, width, width, width)
        self.nets = nn.ModuleList()
        for _ in range(2 if kind == "product" else 1):
            layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
            self.nets.append(nn.ModuleList([*layers, nn.Linear(width, channels, bias=False)]))

        falls = torch.linspace(math.log(TARGET) / SLOW, math.log(TARGET) / FAST, channels)[None, None]
        if window == "standard":
            self.register_buffer("x_deltas", falls)
            self.register_buffer("y_deltas", falls.clone())
        elif window != "no":
            for name in ("deltas",) if window == "symmetric" else ("x_deltas", "y_deltas"):
                self.register_parameter(name, nn.Parameter(falls.clone()))
            for name in ("shift",) if kind == "joint" else ("x_shift", "y_shift"):
                self.register_parameter(name, nn.Parameter(torch.rand(falls.shape)))

    def forward(self, size: tuple[int, int]) -> Tensor:
        """Return the filters (C, H, W) for a map of `size` (H, W)."""
        (H, W), (rows, columns) = size, (self.features(side) for side in size)
        if self.kind == "product":
            row, column = (self.run(i, features) for i, features in enumerate((rows, columns)))
            row, column = row * self.line_window("x", H), column * self.line_window("y", W)
            return row.T[:, :, None] * column.T[:, None]
        features = torch.cat([rows[:, None].expand(-1, W, -1), columns[None].expand(H, -1, -1)], dim=-1)
        return (self.run(0, features) * self.map_window(size)).permute(2, 0, 1)

    def features(self, side: int) -> Tensor:
        """Return the features of the positions along an axis: (side, 3)."""
        return resize_line(self.z, side)[0]

    def resize_table(self, name: str, value: Tensor) -> Tensor:
        """Interpolate a checkpoint's features of positions to this filter's side, for `load_weights`."""
        return resize_line(value, self.z.shape[1]) if name == "z" else value

    def run(self, net: int, x: Tensor) -> Tensor:
        """Apply a network to features (..., n): (..., C)."""
        *hidden, last = self.nets[net].children()
        for layer in hidden:
            x = torch.sin(self.freq[0] * layer(x))
        return last(x)

    def decay(self, axis: str, side: int) -> Tensor:
        """Return the fall of the window along an axis, "x" (rows) or "y" (columns): (side, C)."""
        falls = getattr(self, f"{axis}_deltas")[0]
        return (-torch.linspace(0, 1, side, dtype=falls.dtype, device=falls.device)[:, None] * falls.abs()).exp()

    def line_window(self, axis: str, side: int) -> Tensor | float:
        """Return the window along an axis: (side, C)."""
        if self.window == "no":
            return 1.0
        return self.decay(axis, side) + (getattr(self, f"{axis}_shift")[0] if self.window == "learn" else 0.0)

    def map_window(self, size: tuple[int, int]) -> Tensor | float:
        """Return the window over the map: (H, W, C)."""
        if self.window == "no":
            return 1.0
        if self.window == "symmetric":
            places = [torch.arange(side, dtype=self.z.dtype, device=self.z.device) for side in size]
            decay = (-(places[0][:, None] + places[1])[..., None] * self.deltas[0].abs()).exp()
        else:
            decay = self.decay("x", size[0])[:, None] * self.decay("y", size[1])
        return decay if self.window == "standard" else decay + self.shift[0]


@register_op("hyena")
class Hyena(nn.Module):
    """Long convolutions with filters as large as the map alternate with products of projections of the input.

    A convolution sees the tokens above and to the left of each token, without padding; `direction` makes the others
    visible. It is computed by fast Fourier transforms and divided by 2 * sqrt(H * W), as in the authors' code. Cost is
    H * W * log(H * W).

    Args:
        dim: Number of channels.
        num_heads: Not used; the op has no heads.
        place: The stride sets the default of `size`; with "seq" every second block is flipped, from the first on.
        size: Side of the map for which features of positions are learned; by default the side at 224 pixels.
        order: Number of products, at least 2; there is one long convolution less.
        filter: "joint" (default; the authors' `hyena2d_filter`): filters are a network of row and column. "product":
            filters are the product of a network of the row and a network of the column.
        filter_width: Hidden units of these networks; default 64.
        direction: "seq" (default): the first long convolution of every second block sees the tokens below and to the
            right. "standard": none does. "4dir": all four directions, mixed by one weight each. "4dirp": all four
            directions, projected together. "parallel": four independent sets of channels, none of them flipped.
        window: What filters are multiplied by. "standard" (default): a decay from the first row and column. "learn":
            a learned decay and a learned constant. "symmetric": a learned decay by the sum of row and column in tokens,
            and a learned constant; only with "joint". "no": nothing.
    """

    family = "convolution"
    renames = ((r"^filter_fn\.bias$", "skip"), (r"^filter_fn\.", "filter."))

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        size: int | None = None,
        order: int = 2,
        filter: str = "joint",
        filter_width: int = 64,
        direction: str = "seq",
        window: str = "standard",
    ):
        super().__init__()
        size = ceil_div(224, place.stride) if size is None else size
        if order < 2 or min(size, filter_width) < 1:
            values = f"{order}, {size} and {filter_width}"
            raise ValueError(f"order must be at least 2, and size and filter_width at least 1, not {values}")
        for name, value, known in (
            ("filter", filter, FILTERS), ("direction", direction, DIRECTIONS), ("window", window, WINDOWS),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        if window == "symmetric" and filter == "product":
            raise ValueError("window 'symmetric' needs filter 'joint', not 'product'")
        self.dim, self.order, self.direction = dim, order, direction
        self.flip = direction == "seq" and place.block % 2 == 0
        sets = 4 if direction == "parallel" else 1
        inner = (order + 1) * dim
        self.in_proj = nn.Linear(dim, inner)
        self.short_filter = nn.Conv2d(inner, sets * inner, 3, padding=1, groups=inner)
        self.filter = ImplicitFilter((order - 1) * dim, filter_width, size, filter, window)
        self.skip = nn.Parameter(torch.randn((order - 1) * dim))
        if direction in ("4dir", "4dirp"):
            self.linear_mix = nn.Linear(4, 1) if direction == "4dir" else nn.Linear(4 * dim, dim)
        self.out_proj = nn.Linear(sets * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        x = self.short_filter(self.in_proj(x).permute(0, 3, 1, 2))
        if self.direction == "parallel":
            x = x.unflatten(1, (4, -1)).flatten(0, 1)
        four = self.direction in ("4dir", "4dirp")
        if four:
            x = torch.cat([x.flip(axes) for axes in FLIPS])
        first, *gates, v = x.split(self.dim, dim=1)
        filters, skips = self.filter((H, W)).split(self.dim), self.skip.split(self.dim)
        for i, (gate, long_filter, skip) in enumerate(zip(reversed(gates), filters, skips, strict=True)):
            axes = (-2, -1) if self.flip and i == 0 else ()
            v = long_convolution((v * gate).flip(axes), long_filter, skip).flip(axes)
        y = v * first
        if four:
            directions = [part.flip(axes) for part, axes in zip(y.split(B), FLIPS, strict=True)]
            y = torch.stack(directions, dim=-1).permute(0, 2, 3, 1, 4)  # (B, H, W, C, 4)
            y = self.linear_mix(y).squeeze(-1) if self.direction == "4dir" else self.linear_mix(y.flatten(3))
        elif self.direction == "parallel":
            y = y.unflatten(0, (B, 4)).permute(0, 3, 4, 1, 2).flatten(3)
        else:
            y = y.permute(0, 2, 3, 1)
        return self.out_proj(y)


def resize_line(x: Tensor, side: int) -> Tensor:
    """Interpolate (1, n, C) to (1, side, C); the ends keep their values."""
    if x.shape[1] == side:
        return x
    return F.interpolate(x.transpose(1, 2), side, mode="linear", align_corners=True).transpose(1, 2)


def long_convolution(x: Tensor, long_filter: Tensor, skip: Tensor) -> Tensor:
    """Convolve each channel with a filter as large as the map, and add each channel times a factor.

    Output (i, j) is the sum of filter (a, b) times input (i - a, j - b), divided by 2 * sqrt(H * W).

    Args:
        x: Map (B, C, H, W).
        long_filter: Filters (C, H, W).
        skip: Factors (C,).
    """
    H, W = x.shape[-2:]
    # Twice the size, so that the convolution does not wrap around; Fourier transforms have no half precision.
    precise, padded = torch.promote_types(x.dtype, torch.float32), (2 * H, 2 * W)
    spectrum = torch.fft.rfft2(x.to(precise), padded) * torch.fft.rfft2(long_filter.to(precise), padded)
    y = torch.fft.irfft2(spectrum, padded)[..., :H, :W] / (2 * math.sqrt(H * W))
    return (y + x * skip[:, None, None]).to(x.dtype)
