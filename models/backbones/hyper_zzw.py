"""Terminator, a net of slow and fast networks (Zhang, 2024, arXiv:2401.17948).

Paper: HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction. Written after the paper and the
author's code, hyperevolnet/Terminator (no licence), of which the copy lalalune/Terminator, branch update_torch, was
read; its checkpoints load. The author's optimiser Kar3 is left out.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg, to_channels_last
from models.layers.position import grid_of
from ops.attention.hyper_zzw import (
    ContextSlowNet,
    SlowNet,
    multiply_planes,
    resize_plane,
    standardize,
    uniform_conv,
)  # fmt: skip
from ops.losses import Losses

# Groups of channels, which are standardised in turn over the batch and over each image
GROUPS = 12
# Side of the kernel, source of the kernel and input of each local convolution
LOCAL = ((3, "input", "gated"), (9, "gated", "input"), (5, "mixed", "input"), (7, "input", "mixed"))
# Earlier outputs that a block also reads; output 0 is the stem's, output i that of block i - 1
EARLIER = ((), (0,), (1,), (2, 1))


class RecursiveGate(nn.Module):
    """Gated unit in which a projection gates a projection of itself: (B, C, H, W) to the same shape."""

    def __init__(self, dim: int, size: tuple[int, int]):
        super().__init__()
        self.size = size
        self.fast_linear_k, self.fast_linear_v = uniform_conv(dim), uniform_conv(dim)
        self.fast_linear_q, self.fast_linear_y = uniform_conv(dim), uniform_conv(dim)
        self.bias_p = nn.Parameter(torch.zeros(1, 1, *size))

    def forward(self, x: Tensor) -> Tensor:
        gated = self.fast_linear_k(x) * self.fast_linear_q(self.fast_linear_v(x))
        return self.fast_linear_y(F.gelu(standardize(gated)) + resize_plane(self.bias_p, x.shape[2:]))

    def resize_table(self, name: str, value: Tensor) -> Tensor:
        """Interpolate a checkpoint's plane to this net's size, for `load_weights`."""
        return resize_plane(value, self.size) if name == "bias_p" else value


class SlowFastBlock(nn.Module):
    """Slow-fast encoding (SFNE): branches of hyper-kernels over the whole map and over neighbourhoods, concatenated.

    Statistics of the batch enter the output in evaluation too, as in the author's code, so an image's output depends on
    its batch.

    Args:
        dim: Channels C of the input.
        out_dim: Channels of the output; a multiple of 12.
        size: Size (H, W) of the map for which planes are learned.
        layers: Layers of the slow network over the map.
        earlier: Number of earlier outputs that the block also reads, each tiled to C channels.
        dropout: Rate at which output channels are dropped.
        omega: Scale of the slow networks' frequencies at initialisation.
    """

    renames = (
        (r"^fast_multi_branch\.", ""),
        (r"^bias$", "shift"),
        (r"^bias([1-4])$", lambda match: f"local_shifts.{int(match[1]) - 1}"),
        (r"^slow_net_l([1-4])\.", lambda match: f"local_slow.{int(match[1]) - 1}."),
        (r"^local_interact_conv_([1-4])\.channel_mixer\.", lambda match: f"local_mixers.{int(match[1]) - 1}."),
        (r"^channel_mixer_hci\.slow_net_gc\.", "channel_slow."),
        (r"^hyper_interact\.slow_net_gc_hi\.", "gate_channel_slow."),
        (r"^hyper_interact\.slow_net_gs_hi\.", "gate_space_slow."),
    )

    def __init__(
        self,
        dim: int,
        out_dim: int,
        size: tuple[int, int],
        layers: int = 2,
        earlier: int = 0,
        dropout: float = 0.0,
        omega: float = 2000.0,
    ):
        super().__init__()
        if out_dim % GROUPS:
            raise ValueError(f"a block's output channels must be a multiple of {GROUPS}, not {out_dim}")
        self.slow_net_g = SlowNet(dim, size, layers=layers, omega=omega)
        self.Fast_Kernel_rgu, self.Fast_Kernel_rgu_2 = RecursiveGate(dim, size), RecursiveGate(dim, size)
        self.channel_mixer_mlp = normal_conv(dim, dim)
        self.channel_slow = SlowNet(1, (dim,), hidden=32, omega=omega)
        self.gate_channel_slow = SlowNet(1, (dim,), hidden=16, omega=omega)
        self.gate_space_slow = SlowNet(1, size, omega=omega)
        self.local_slow = nn.ModuleList(ContextSlowNet(dim, side, omega) for side, _, _ in LOCAL)
        self.local_mixers = nn.ModuleList(normal_conv(dim, dim) for _ in LOCAL)
        self.local_shifts = nn.ParameterList(torch.zeros(1) for _ in LOCAL)
        self.bottleneck_layer = normal_conv((10 + earlier) * dim, out_dim)
        self.shift = nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor, *earlier: Tensor) -> Tensor:
        context = x * self.slow_net_g(x.shape[2:]).to(x.dtype)
        fast = standardize(self.Fast_Kernel_rgu_2(context) + self.Fast_Kernel_rgu(x))
        mixed = standardize(self.channel_mixer_mlp(x))
        gated = standardize(x * torch.sigmoid(self.channel_scores(x, self.channel_slow)))
        out, out_mixed, out_gated = (multiply_planes(context, t) for t in (fast, mixed, gated))

        spatial = out.mean(1, keepdim=True)
        scores = self.gate_space_slow(x.shape[2:]).to(x.dtype) * spatial**2
        interacted = x * torch.sigmoid(scores * self.channel_scores(out, self.gate_channel_slow))

        sources = {"input": x, "gated": gated, "mixed": mixed}
        local = [self.convolve(i, sources[source], sources[input]) for i, (_, source, input) in enumerate(LOCAL)]
        tiled = [t.repeat(1, x.shape[1] // t.shape[1], 1, 1) for t in earlier]
        branches = [out, local[1], *tiled[:1], fast, out_mixed, local[0], torch.sigmoid(out) * out]
        branches += [local[2], out_gated, local[3], *tiled[1:], interacted]
        groups = self.bottleneck_layer(torch.cat(branches, dim=1)).chunk(GROUPS, dim=1)
        x = torch.cat([standardize(group, over_batch=i % 2 == 0) for i, group in enumerate(groups)], dim=1)
        return self.dropout(F.gelu(x) + self.shift)

    def channel_scores(self, x: Tensor, slow: SlowNet) -> Tensor:
        """Return a score of each channel of (B, C, H, W): its squared mean times a hyper-kernel, (B, C, 1, 1)."""
        return x.mean((2, 3), keepdim=True) ** 2 * slow()[0, 0, :, None, None].to(x.dtype)

    def convolve(self, index: int, source: Tensor, x: Tensor) -> Tensor:
        """Convolve x (B, C, H, W) by local kernel `index`, computed from `source`, and mix the channels."""
        kernel = cast(ContextSlowNet, self.local_slow[index]).kernel(source)
        x = self.local_mixers[index](F.conv2d(x, kernel, padding="same", groups=x.shape[1]))
        return F.gelu(standardize(x, over_batch=True)) + self.local_shifts[index]


class ConnectedStage(Stage):
    """Stage of one block, which reads the last output and those of the indices `earlier`.

    The stage takes the list of all outputs and returns it with its own. The first stage takes images, from which its
    `downsample` computes the first output.
    """

    def __init__(self, downsample: nn.Module, block: nn.Module, earlier: Sequence[int]):
        super().__init__(downsample, [block])
        self.earlier = earlier

    def forward(self, x: Any, losses: Losses | None = None) -> Any:
        outputs = [self.downsample(to_channels_last(x))] if isinstance(x, Tensor) else x
        earlier = [outputs[i] for i in self.earlier]
        return [*outputs, self.run_blocks(outputs[-1], outputs[-1].permute(0, 2, 3, 1), losses, *earlier)]


class Terminator(HierarchicalBackbone):
    """Slow-fast blocks at the resolution of the image, without residual connections.

    Args:
        img_size: Side or (height, width), in pixels, of the images for which planes are learned; other sizes
            interpolate them.
        dims: Output channels of the stem, which is a block too, and of the other blocks.
        num_classes: Number of classes; 0 leaves out the classifier.
        in_chans: Number of image channels.
        drop_path_rate: Rate at which whole channels of all blocks' outputs but the stem's are dropped: the net has no
            paths beside its blocks.
        omega: Scale of the slow networks' frequencies at initialisation.
        **kwargs: Further arguments of `HierarchicalBackbone`.
    """

    renames = (
        (r"^out_layer\.", "head."),
        (r"^blocks\.0\.", "stages.0.downsample."),
        (r"^blocks\.(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks.0."),
    )
    out_indices = 3
    loss_weights = (("slow", 1.0),)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        dims: Sequence[int] = (12, 36, 72, 144, 288),
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float = 0.05,
        omega: float = 2000.0,
        **kwargs,
    ):
        if not 2 <= len(dims) <= 1 + len(EARLIER):
            raise ValueError(f"dims must have from 2 to {1 + len(EARLIER)} entries, not {len(dims)}")
        make = partial(SlowFastBlock, size=grid_of(img_size, 1), omega=omega)
        stem: nn.Module = make(in_chans, dims[0], layers=3)
        stages = []
        for (dim, out_dim), earlier in zip(itertools.pairwise(dims), EARLIER, strict=False):
            block = make(dim, out_dim, earlier=len(earlier), dropout=drop_path_rate)
            stages.append(ConnectedStage(nn.Identity() if stages else stem, block, earlier))
        super().__init__(stages, dims[1:], [1] * len(stages), nn.Identity(), num_classes, in_chans, **kwargs)
        if num_classes:
            nn.init.kaiming_normal_(self.head.get_parameter("weight"))

    def finish(self, x: list[Tensor]) -> Tensor:
        return x[-1]

    def stage_map(self, x: list[Tensor], norm: bool) -> Tensor:
        return to_channels_last(x[-1])

    def forward_features(self, x: Tensor, losses: Losses | None = None) -> Tensor:
        """Compute the last map; the slow loss is added to `losses`."""
        if losses is not None:
            losses.add("slow", self.slow_loss(x.shape[2:]))
        return super().forward_features(x, losses)

    def slow_loss(self, size: Sequence[int]) -> Tensor:
        """Return how much the blocks' hyper-kernels for a map of `size` differ, summed over channels.

        This is the sum over all pairs of blocks of the mean squared difference.
        """
        blocks: list[Any] = [module for module in self.modules() if isinstance(module, SlowFastBlock)]
        planes = [block.slow_net_g(size).sum(1) for block in blocks]
        return torch.stack([F.mse_loss(a, b) for a, b in itertools.combinations(planes, 2)]).sum()


def normal_conv(dim: int, out_dim: int) -> nn.Conv2d:
    """Return a 1 x 1 convolution, initialised by a normal distribution for ReLU, without a bias at first."""
    conv = nn.Conv2d(dim, out_dim, 1)
    nn.init.kaiming_normal_(conv.weight)
    nn.init.zeros_(cast(Tensor, conv.bias))
    return conv


_STEM = {"first_conv": "stages.0.downsample.channel_mixer_mlp", "fixed_input_size": True}
_CFG = imagenet_cfg(input_size=(3, 32, 32), pool_size=None, crop_pct=1.0, **_STEM)
default_cfgs = generate_default_cfgs({"terminator_nano": _CFG, "terminator_cifar": _CFG})


@register_model
def terminator_nano(pretrained: bool = False, **kwargs) -> Terminator:
    """Return a small net of our own for small images and CPUs."""
    return Terminator.build("terminator_nano", pretrained, **{"dims": (12, 24, 24, 48), "omega": 1.0} | kwargs)


@register_model
def terminator_cifar(pretrained: bool = False, **kwargs) -> Terminator:
    return Terminator.build("terminator_cifar", pretrained, **kwargs)
