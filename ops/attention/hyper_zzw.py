"""HyperZ.Z.W operator: context-dependent weights from a slow network (Zhang, 2024, arXiv:2401.17948).

Written after the paper and the author's code, hyperevolnet/Terminator (no licence), of which the copy
lalalune/Terminator, branch update_torch, was read.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.registry import FIRST, Place, register_op
from retinue.utils.arithmetic import ceil_div


class SlowNet(nn.Module):
    """Network of sines of the coordinates that computes a hyper-kernel: one value for each place and channel.

    Args:
        channels: Number of channels C of the hyper-kernel.
        size: Size of the map (H, W), or (N,), for which a plane is learned that is added in each layer. For other sizes
            the plane is interpolated.
        hidden: Hidden units of each layer.
        layers: Number of layers.
        omega: Scale of the frequencies at initialisation.
    """

    renames = ((r"(?:^|\.)train_length$", None), (r"^Kernel\.", ""), (r"^bias_pk$", "bias_p"))

    def __init__(self, channels: int, size: Sequence[int], hidden: int = 64, layers: int = 2, omega: float = 2000.0):
        super().__init__()
        dims, self.size = len(size), tuple(size)
        conv = (nn.Conv1d, nn.Conv2d)[dims - 1]
        self.filters = nn.ModuleList(nn.ModuleDict({"linear": conv(dims, hidden, 1)}) for _ in range(layers + 1))
        self.linears = nn.ModuleList(conv(hidden, hidden, 1) for _ in range(layers))
        self.output_linear = conv(hidden, channels, 1)
        self.bias_p = nn.Parameter(torch.zeros(1, 1, *size))
        for i, layer in enumerate(self.filters):
            weight = layer.get_submodule("linear").get_parameter("weight")
            # Gamma distributions cannot be sampled on the meta device, where there is nothing to initialise.
            if not weight.is_meta:
                frequencies = torch.distributions.Gamma(6 / (i + 1), 1.0).sample(weight.shape)
                with torch.no_grad():
                    weight.mul_(2 * math.pi * omega * frequencies.to(weight.device))
            nn.init.zeros_(layer.get_submodule("linear").get_parameter("bias"))
        for layer in (*self.linears, self.output_linear):
            nn.init.kaiming_uniform_(layer.get_parameter("weight"), nonlinearity="linear")
            nn.init.ones_(layer.get_parameter("bias"))
        nn.init.zeros_(self.output_linear.get_parameter("bias"))
        with torch.no_grad():
            self.output_linear.get_parameter("weight").mul_(math.prod(size) ** -0.5)

    def forward(self, size: Sequence[int] | None = None, gates: Sequence[Tensor] | None = None) -> Tensor:
        """Return the hyper-kernel (1, C, *size).

        Args:
            size: Size of the map; by default that for which planes are learned.
            gates: Factors (1, hidden, 1, 1) or of the map's size, one for each layer, that make a kernel depend on an
                input. The layer's output then also gains a tenth of its direction, and only that has a gradient.
        """
        size = self.size if size is None else tuple(size)
        axes = [torch.linspace(-1, 1, side, device=self.bias_p.device, dtype=self.bias_p.dtype) for side in size]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
        plane = resize_plane(self.bias_p, size)
        # Frequencies are high, so that the angles need the weights' own precision. The meta device has no autocast.
        with nullcontext() if grid.is_meta else torch.autocast(grid.device.type, enabled=False):
            waves = [torch.sin(layer.get_submodule("linear")(grid)) for layer in self.filters]
            x = waves[0]
            for i, (layer, wave) in enumerate(zip(self.linears, waves[1:], strict=True)):
                x = wave * layer(x) + plane
                if gates is not None:
                    direction = F.normalize(x.flatten(2), dim=2).view_as(x)
                    x = (x.detach() + 0.1 * direction) * gates[i].to(x.dtype)
            return self.output_linear(x)

    def resize_table(self, name: str, value: Tensor) -> Tensor:
        """Interpolate a checkpoint's plane to this net's size, for `load_weights`."""
        return resize_plane(value, self.size) if name == "bias_p" else value


class ContextSlowNet(SlowNet):
    """Slow network of a k x k kernel that depends on the mean of the batch's maps, pooled to k x k.

    Args:
        channels: Number of channels C.
        side: Side k of the kernel.
        omega: Scale of the frequencies at initialisation.
    """

    def __init__(self, channels: int, side: int, omega: float):
        super().__init__(channels, (side, side), hidden=32, omega=omega)
        self.fast_reduce = nn.Conv2d(channels, 32, 1)
        self.fast_fc1 = nn.Conv2d(32, 32, 1)
        self.fast_linears_x = nn.ModuleList(uniform_conv(32, bias=1.0) for _ in self.linears)

    def kernel(self, x: Tensor) -> Tensor:
        """Return the kernel (C, 1, k, k) for maps (B, C, H, W)."""
        pooled = self.fast_reduce(F.adaptive_avg_pool2d(x, self.size[0])).mean(0, keepdim=True)
        gate = F.gelu(self.fast_fc1(pooled))
        return self(gates=[layer(gate) for layer in self.fast_linears_x]).transpose(0, 1).to(x.dtype)


@register_op("hyper_zzw")
class HyperZZW(nn.Module):
    """A hyper-kernel times the map, plane by plane a matrix, multiplies the matrix of a standardised projection.

    The hyper-kernel has a value for each place and channel, which a network of the coordinates computes. The product of
    planes needs square maps, so that others are zero-padded on the right or at the bottom: of a map that is wider than
    high, only the first H columns of the hyper-kernel's product take part. Each channel of the projection is
    standardised over each image, where the author's blocks also standardise over the batch. Cost is H * W * max(H, W).

    Args:
        dim: Number of channels.
        num_heads: Not used; the op has no heads.
        place: The stride sets the default of `size`.
        size: Side of the map for which the slow network learns planes; by default the side at 224 pixels.
        hidden: Hidden units of the slow network; default 64.
        layers: Layers of the slow network; default 2.
        omega: Scale of the slow network's frequencies at initialisation. Default 1, for smooth hyper-kernels; the
            author's nets have 2000, with which neighbouring places are independent.
    """

    family = "convolution"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        size: int | None = None,
        hidden: int = 64,
        layers: int = 2,
        omega: float = 1.0,
    ):
        super().__init__()
        size = ceil_div(224, place.stride) if size is None else size
        if min(size, hidden, layers) < 1 or omega <= 0:
            values = f"{size}, {hidden}, {layers} and {omega}"
            raise ValueError(f"size, hidden and layers must be at least 1 and omega above 0, not {values}")
        self.slow = SlowNet(dim, (size, size), hidden, layers, omega)
        self.fast = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        fast = standardize(self.fast(x).permute(0, 3, 1, 2))
        x = x.permute(0, 3, 1, 2)
        context = x * self.slow(x.shape[2:]).to(x.dtype)
        return multiply_planes(context, fast).permute(0, 2, 3, 1)


def uniform_conv(dim: int, bias: float = 0.0) -> nn.Conv2d:
    """Return a 1 x 1 convolution of C channels, initialised uniformly to keep the variance."""
    conv = nn.Conv2d(dim, dim, 1)
    nn.init.kaiming_uniform_(conv.weight, nonlinearity="linear")
    nn.init.constant_(cast(Tensor, conv.bias), bias)
    return conv


def standardize(x: Tensor, over_batch: bool = False) -> Tensor:
    """Subtract the mean and divide by the standard deviation of each channel of each image, or of the batch.

    Args:
        x: Map (B, C, H, W).
        over_batch: Take the statistics over all images.
    """
    variance, mean = torch.var_mean(x, (0, 2, 3) if over_batch else (2, 3), correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5)


def multiply_planes(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix product of the planes of two maps (B, C, H, W), zero-padded to squares and cropped again."""
    H, W = a.shape[-2:]
    pad = (0, max(H - W, 0), 0, max(W - H, 0))
    return (F.pad(a, pad) @ F.pad(b, pad))[..., :H, :W]


def resize_plane(plane: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate (1, 1, N) or (1, 1, H, W) to another size."""
    if plane.shape[2:] == tuple(size):
        return plane
    return F.interpolate(plane, tuple(size), mode="linear" if plane.ndim == 3 else "bilinear")
