"""Layers that bring a map to a lower resolution."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from retinue.utils.arithmetic import padding


class PatchConv2d(nn.Conv2d):
    """Convolution of patches that do not overlap: (B, in_dim, H, W) to (B, dim, ⌈H / patch⌉, ⌈W / patch⌉).

    The map is zero-padded on the right and at the bottom to whole patches.

    Args:
        in_dim: Channels of the map.
        dim: Channels of the result.
        patch: Side of a patch.
        bias: Add a bias.
    """

    def __init__(self, in_dim: int, dim: int, patch: int, bias: bool = True):
        super().__init__(in_dim, dim, patch, stride=patch, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        (patch_h, patch_w), (H, W) = self.kernel_size, x.shape[2:]
        return super().forward(F.pad(x, (0, padding(W, patch_w), 0, padding(H, patch_h))))


class PatchMerging(nn.Module):
    """Norm and linear map of 2 x 2 tokens, (B, in_dim, H, W) to (B, dim, ⌈H / 2⌉, ⌈W / 2⌉): Swin's downsampling.

    An odd side is zero-padded on the right or at the bottom (Liu et al., ICCV 2021, arXiv:2103.14030).
    """

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * in_dim)
        self.reduction = nn.Linear(4 * in_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)).permute(0, 2, 3, 1)
        quarters = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(quarters, dim=-1))).permute(0, 3, 1, 2)


def patch_embed(in_chans: int, dim: int, patch: int = 4, norm: type[nn.Module] = LayerNorm2d, **norm_args) -> nn.Module:
    """Return a stem of a patch convolution and a norm: (B, in_chans, H, W) to (B, dim, ⌈H / patch⌉, ⌈W / patch⌉).

    Args:
        in_chans: Number of image channels.
        dim: Channels of the result.
        patch: Side of a patch in pixels.
        norm: Class of the norm.
        norm_args: Further arguments of the norm.
    """
    return nn.Sequential(PatchConv2d(in_chans, dim, patch), norm(dim, **norm_args))


class TokenDownsample(nn.Module):
    """Strided convolution and norm, from tokens (B, H * W, C) to (B, ⌈H / 2⌉ * ⌈W / 2⌉, out)."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.proj = nn.Conv2d(dim, out, 3, 2, padding=1)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Reduce the map of `size` (H, W)."""
        return self.norm(self.proj(x.transpose(1, 2).unflatten(2, tuple(size))).flatten(2).transpose(1, 2))
