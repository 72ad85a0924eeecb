"""Spectral gating of SpectFormer (Patro et al., WACV 2025, arXiv:2304.06446), the filter layer of GFNet.

Written after the paper and the authors' repository, badripatro/SpectFormers (no licence of its own).
"""

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from ops.precision import at_least_float32, without_autocast
from ops.registry import FIRST, Place, register_op
from retinue.utils.arithmetic import ceil_div


@register_op("spectral_gating")
class SpectralGating(nn.Module):
    """Each channel is filtered over the whole map: its Fourier transform is multiplied by learned complex weights.

    The filter wraps around the map's borders. For a map of another size than `size` the weights are interpolated
    linearly over frequency, so that a filter keeps its response to each frequency in cycles per token. There are no
    heads and no projections. Cost is H * W * log(H * W), in at least float32.

    Args:
        dim: Number of channels.
        num_heads: Not used.
        place: The stride sets the default of `size`.
        size: Size (H, W) of the map that the weights are learned for, or one number for both; by default the size at an
            image of 224 pixels.
    """

    family = "convolution"

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, size: int | tuple[int, int] | None = None):
        super().__init__()
        H, W = map(int, to_2tuple(ceil_div(224, place.stride) if size is None else size))
        if min(H, W) < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        self.size = (H, W)
        # Real and imaginary parts are last.
        self.complex_weight = nn.Parameter(0.02 * torch.randn(H, W // 2 + 1, dim, 2))

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[1], x.shape[2])
        with without_autocast(x):
            wide, weight = at_least_float32(x, self.complex_weight)
            spectrum = torch.fft.rfft2(wide, dim=(1, 2), norm="ortho")
            # `Module.to` gives weights of four dimensions channels-last memory, where they are no complex numbers.
            weight = resize_filter(weight, self.size, size).contiguous()
            spectrum = spectrum * torch.view_as_complex(weight)
            return torch.fft.irfft2(spectrum, s=size, dim=(1, 2), norm="ortho").to(x.dtype)

    def resize_table(self, name: str, value: Tensor) -> Tensor:
        """Interpolate the weights of a checkpoint for a square map to this op's `size`, for `load_weights`."""
        return resize_filter(value, (value.shape[0], value.shape[0]), self.size)


def resize_filter(weight: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolate a filter (H, W // 2 + 1, C, 2) for maps of size `old` = (H, W) to maps of size `new`."""
    if old == new:
        return weight
    # Frequencies in cycles per token; those of rows are periodic, those of columns lie between 0 and one half.
    kwargs = {"device": weight.device, "dtype": weight.dtype}
    rows = interpolation(torch.fft.fftfreq(new[0], **kwargs) % 1 * old[0], old[0])
    columns = interpolation(torch.fft.rfftfreq(new[1], **kwargs) * old[1], old[1] // 2 + 1)
    return torch.einsum("Hh,Ww,hwcr->HWcr", rows, columns, weight)


def interpolation(positions: Tensor, size: int) -> Tensor:
    """Return the matrix (N, size) that interpolates linearly in a periodic table of `size` entries at N positions."""
    floor = positions.floor()
    places, share = torch.arange(size, device=positions.device), (positions - floor)[:, None]
    lower = (places == floor[:, None] % size).to(positions.dtype)
    upper = (places == (floor[:, None] + 1) % size).to(positions.dtype)
    return lower * (1 - share) + upper * share
