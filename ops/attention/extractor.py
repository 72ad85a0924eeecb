"""Extractors, inspired by SHE, HE, WE and ME (Chen, 2023, arXiv:2308.07661).

Paper: Attention Is Not All You Need Anymore. Neither its equations nor the author's code could be read: the op follows
the idea of its abstract, sums over tokens with weights of the offset only and a product with the token itself, and does
not claim to be the paper's. The form for maps, in both directions, is ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.precision import at_least_float32, without_autocast
from ops.registry import FIRST, Place, register_op
from retinue.utils.arithmetic import ceil_div

KINDS = ("she", "he", "we", "me")


@register_op("extractor")
class Extractor(nn.Module):
    """Each token receives a sum of all tokens, weighted by their offset from it, times a projection of itself.

    The kernel of weights is learned for a map of `size` tokens a side; for other maps it is interpolated and scaled to
    the same sum. Outside the map are zeros. Cost is H * W * log(H * W), in at least float32; "she" multiplies it, and
    the number of weights, by the number of channels.

    Args:
        dim: Number of channels.
        num_heads: Without effect.
        place: The stride sets the default of `size`.
        kind: "she": a matrix of channels for each offset. "he" (default): a weight for each offset and channel. "we": a
            weight for each offset. "me": the mean of the map.
        size: Side, in tokens, of the map for which the kernel is learned; by default the side at an image of 224
            pixels, at most 14.
    """

    family = "convolution"

    def __init__(self, dim: int, num_heads: int, *, place: Place = FIRST, kind: str = "he", size: int | None = None):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
        size = min(ceil_div(224, place.stride), 14) if size is None else size
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        self.kind = kind
        side = 2 * size - 1
        channels = {"she": dim * dim, "he": dim, "we": 1}
        self.kernel = None
        if kind != "me":
            # The sums keep the variance of the tokens
            std = (side**2 * (dim if kind == "she" else 1)) ** -0.5
            self.kernel = nn.Parameter(std * torch.randn(channels[kind], side, side))
        self.gate = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def no_weight_decay(self) -> set[str]:
        return set() if self.kernel is None else {"kernel"}

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.extract(x) * self.gate(x))

    def extract(self, x: Tensor) -> Tensor:
        """Return the weighted sums of the tokens of maps (B, H, W, C), in the same shape."""
        if self.kernel is None:
            return x.mean((1, 2), keepdim=True)
        H, W = x.shape[1:3]
        # With these sides, sums that wrap around are not among the tokens of the map
        sides = (2 * H, 2 * W)
        with without_autocast(x):
            wide, kernel = at_least_float32(x.permute(0, 3, 1, 2), self.kernel)
            kernel = resize_kernel(kernel, (H, W))
            spectrum, response = torch.fft.rfft2(wide, sides), torch.fft.rfft2(kernel, sides)
            if self.kind == "she":
                response = response.unflatten(0, (x.shape[-1], -1))
                spectrum = torch.einsum("bchw,dchw->bdhw", spectrum, response)
            else:
                spectrum = spectrum * response
            sums = torch.fft.irfft2(spectrum, sides)[..., H - 1 : 2 * H - 1, W - 1 : 2 * W - 1]
        return sums.permute(0, 2, 3, 1).to(x.dtype)


def resize_kernel(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate a kernel (C, offsets, offsets) for maps of `size` (H, W), scaled to keep its sum."""
    new = (2 * size[0] - 1, 2 * size[1] - 1)
    if kernel.shape[1:] == new:
        return kernel
    scale = kernel.shape[1] * kernel.shape[2] / (new[0] * new[1])
    return scale * F.interpolate(kernel.unsqueeze(0), new, mode="bilinear").squeeze(0)
