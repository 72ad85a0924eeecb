"""HBFormer's decoder: multi-scale feature fusion (MFF) with dynamic dilated convolutions.

Paper: HBFormer: A Hybrid-Bridge Transformer for Microtumor and Miniature Organ Segmentation (Zheng et al., BIBM 2025,
arXiv:2512.03597). Written after the authors' repository, https://github.com/lzeeorno/HBFormer (MIT), whose checkpoints'
decoders load.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import EcaModule
from torch import Tensor, nn

# Dilations of the three branches of a pyramid, and number of kernels that each convolution mixes
RATES = (1, 4, 8)
EXPERTS = 4


def pooled_weights(dim: int, count: int) -> nn.Sequential:
    """Return a module from maps (B, dim, h, w) to weights (B, count, 1, 1) that sum to 1 for each image."""
    hidden = dim // 8
    layers = nn.Conv2d(dim, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, count, 1)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), *layers, nn.Softmax(1))


def mixed_kernels(experts: Any, weights: Tensor) -> Tensor:
    """Return one kernel (out, in, k, k) for each of B images: a weighted sum of the kernels of several convolutions.

    A convolution is linear in its kernel. So one convolution with this kernel equals the weighted sum of the experts'
    convolutions, which the authors compute, at a fraction of the cost.

    Args:
        experts: E convolutions of one shape.
        weights: Weights (B, E, 1, 1) of the convolutions' kernels.
    """
    kernels = torch.stack([expert.weight for expert in experts])
    return torch.einsum("be,eoikl->boikl", weights.flatten(1), kernels)


class DynamicPyramid(nn.Module):
    """Dilated depthwise separable convolutions whose kernels and branch weights follow from the image (Med-DSPP).

    Takes a map (B, dim, h, w) and returns a map of the same shape.

    Args:
        dim: Number of channels, at least 8.
    """

    renames = (
        (r"^branch_attention\.", "branch_weights."),
        (r"^expert_attention\.", "expert_weights."),
        (r"^dw_experts\.", "depthwise."),
        (r"^pw_experts\.", "pointwise."),
        (r"^bns\.", "norms."),
        (r"^fuse\.weight$", "fuse.0.weight"),
        (r"^fuse_bn\.", "fuse.1."),
    )

    def __init__(self, dim: int):
        super().__init__()
        self.branch_weights = pooled_weights(dim, len(RATES))
        self.expert_weights = pooled_weights(dim, EXPERTS)

        def experts(**kernel) -> nn.ModuleList:
            return nn.ModuleList(
                nn.ModuleList(nn.Conv2d(dim, dim, bias=False, **kernel) for _ in range(EXPERTS)) for _ in RATES
            )

        self.depthwise = experts(kernel_size=3, groups=dim)
        self.pointwise = experts(kernel_size=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for _ in RATES)
        self.eca = EcaModule(kernel_size=3)
        self.fuse = nn.Sequential(nn.Conv2d(len(RATES) * dim, dim, 1, bias=False), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        B, C, h, w = x.shape
        branch_weights = self.branch_weights(x).unbind(1)
        expert_weights = self.expert_weights(x)
        # Images become groups of channels, since each image has its own kernel.
        grouped = x.reshape(1, B * C, h, w)
        branches = []
        for i, rate in enumerate(RATES):
            kernel = mixed_kernels(self.depthwise[i], expert_weights).flatten(0, 1)
            filtered = F.conv2d(grouped, kernel, padding=rate, dilation=rate, groups=B * C).view(B, C, h * w)
            projected = mixed_kernels(self.pointwise[i], expert_weights).flatten(2) @ filtered
            activated = F.silu(self.norms[i](projected.view(B, C, h, w)))
            branches.append(activated * branch_weights[i][:, None])
        return self.fuse(self.eca(torch.cat(branches, dim=1)))


class ConvResidual(nn.Module):
    """3 x 3 and 1 x 1 convolution with batch norms, and a 1 x 1 convolution as the shortcut (LRD block).

    Args:
        in_dim: Number of channels of the input.
        dim: Number of channels of the output.
    """

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim)
        self.conv2, self.bn2 = nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim)
        self.conv_skip = nn.Conv2d(in_dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.bn1(self.conv1(x)))
        return F.leaky_relu(self.bn2(self.conv2(y)) + self.conv_skip(x))


class FusionStep(nn.Module):
    """One step of the decoder: enlarge a map by 2, join it with a skip map, and refine the result.

    Takes maps (B, in_dim, ⌈H / 2⌉, ⌈W / 2⌉) and (B, skip_dim, H, W), and returns a map (B, dim, H, W).

    Args:
        in_dim: Number of channels of the coarse map.
        skip_dim: Number of channels of the skip map.
        dim: Number of channels of the output, at least 8.
    """

    renames = (
        (r"^transp_conv\.", "up."),
        (r"^LRD_block\.", "residual."),
        (r"^Med_DSPP\.", "pyramid."),
        (r"^BN\.", "norm."),
    )

    def __init__(self, in_dim: int, skip_dim: int, dim: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(in_dim, dim, 2, stride=2)
        self.residual = ConvResidual(dim + skip_dim, dim)
        self.pyramid = DynamicPyramid(dim)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        H, W = skip.shape[2:]
        x = self.residual(torch.cat((self.up(x)[..., :H, :W], skip), dim=1))
        return self.norm(F.relu(self.pyramid(x)))


class HBFormerHead(nn.Module):
    """HBFormer's decoder: four maps of a backbone to logits at the size of the image.

    Takes maps (B, in_channels[i], ⌈H / 4 / 2^i⌉, ⌈W / 4 / 2^i⌉) and returns logits (B, num_classes, 4 ⌈H / 4⌉,
    4 ⌈W / 4⌉). Four steps enlarge the coarsest map to stride 2. The first step's skip map is the backbone's; those of
    the other three are projected maps of half the step's size, enlarged by 2. In training, batch norm needs more than
    one position of stride 16 per device.

    The authors train with cross-entropy, Dice and focal loss in equal parts.

    Args:
        in_channels: Numbers of channels of the maps of strides 4, 8, 16 and 32.
        num_classes: Number of classes.
        channels: Width of the decoder at stride 2, at least 8; each coarser stride has twice as many.

    Raises:
        ValueError: There are not four maps, or `channels` is too small.
    """

    renames = (
        # The authors' net maps the colours by a 1 x 1 convolution, and has a projection that it does not use.
        (r"^(input_proj|proj_enc4)\.", None),
        (r"^proj_enc(\d)\.", lambda match: f"laterals.{int(match[1]) - 1}."),
        (r"^MFF_decoder(\d)\.", lambda match: f"steps.{4 - int(match[1])}."),
        (r"^out\.0\.", "up."),
        (r"^out\.1\.", "classifier."),
    )

    def __init__(self, in_channels: Sequence[int], num_classes: int, *, channels: int = 48):
        super().__init__()
        if len(in_channels) != 4:
            raise ValueError(f"HBFormerHead reads four maps, of strides 4, 8, 16 and 32, not {len(in_channels)}")
        if channels < 8:
            raise ValueError(f"HBFormerHead's channels must be at least 8, not {channels}")
        widths = [channels * 2**i for i in range(4)]
        self.laterals = nn.ModuleList(
            nn.Conv2d(in_dim, width, 1) for in_dim, width in zip(in_channels[:3], widths[:3], strict=True)
        )
        self.steps = nn.ModuleList([FusionStep(in_channels[3], in_channels[2], widths[3])])
        self.steps.extend(FusionStep(2 * width, width, width) for width in reversed(widths[:3]))
        self.up = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1, bias=False)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        finest = maps[0].shape[2:]
        sizes = [[2 * side for side in finest], finest, maps[1].shape[2:]]
        x = self.steps[0](maps[3], maps[2])
        for i, step in zip((2, 1, 0), list(self.steps)[1:], strict=True):
            skip = F.interpolate(self.laterals[i](maps[i]), sizes[i], mode="bilinear", align_corners=True)
            x = step(x, skip)
        return self.classifier(self.up(x))
