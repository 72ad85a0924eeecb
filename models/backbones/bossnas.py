"""BossNAS: Hybrid CNN-transformers with Block-wisely Self-supervised Neural Architecture Search (Li et al., ICCV 2021).

The paper is arXiv:2103.12424. Written after the paper and what the authors' repository, changlin31/BossNAS, computes.
It names no licence, so none of its code is here; its checkpoints load.
"""

from collections.abc import Sequence
from typing import Any

from timm.layers import DropPath, SEModule
from timm.models import generate_default_cfgs, register_model
from timm.models.nextvit import PatchEmbed
from torch import Tensor, nn

from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg
from ops import create_ops, parse_mixers
from ops.functional import map_attention
from ops.registry import Spec

# Attention heads in each stage, and channels of a head
HEADS = (1, 2, 4, 8)
HEAD_DIM = 64


class Attention(nn.Module):
    """All tokens of a map (B, H, W, C) attend to all tokens, without biases and without an output projection."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        return map_attention(q, k, v, self.num_heads)


class Block(nn.Module):
    """Bottleneck with a depthwise convolution, which encodes position and reduces the map, and a choice in its middle.

    Maps (B, in_dim, H, W) to (B, dim, ⌈H / stride⌉, ⌈W / stride⌉).

    Args:
        in_dim: Channels of the map.
        dim: Channels of the result.
        width: Channels inside the bottleneck.
        stride: Stride of the depthwise convolution, 1 or 2.
        act: Class of the activation.
        drop_path: Drop path rate.
    """

    def __init__(self, in_dim: int, dim: int, width: int, stride: int, act: type[nn.Module], drop_path: float = 0.0):
        super().__init__()
        self.downsample = PatchEmbed(in_dim, dim, stride)
        self.conv1 = nn.Conv2d(in_dim, width, 1, bias=False)
        self.peg = nn.Conv2d(width, width, 3, stride, 1, groups=width)
        self.bn1 = nn.BatchNorm2d(width)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, dim, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(dim)
        self.act = act()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, **context) -> Tensor:
        return self.join(self.downsample(x), self.bn1(self.peg(self.conv1(x))), **context)

    def join(self, shortcut: Tensor, x: Tensor, **context) -> Tensor:
        """Return the block's result (B, dim, H, W).

        Args:
            shortcut: What the block adds to, (B, dim, H, W).
            x: The map inside the bottleneck, (B, width, H, W).
            context: Context of the mixer.
        """
        y = self.bn3(self.conv3(self.act(self.bn2(self.middle(self.act(x), **context)))))
        return self.act(shortcut + self.drop_path(self.finish(y)))

    def middle(self, x: Tensor, **context) -> Tensor:
        """Apply the choice of the block to a map (B, width, H, W)."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """Change what the block adds to the map, (B, dim, H, W)."""
        return x


class ConvBlock(Block):
    """Block with a 3 x 3 convolution and, with `squeeze`, squeeze-and-excitation."""

    def __init__(self, in_dim: int, dim: int, width: int, squeeze: bool, **kwargs):
        super().__init__(in_dim, dim, width, **kwargs)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.se = SEModule(dim) if squeeze else nn.Identity()

    def middle(self, x: Tensor, **context) -> Tensor:
        return self.conv2(x)

    def finish(self, x: Tensor) -> Tensor:
        return self.se(x)


class AttentionBlock(Block):
    """Block with a token mixer, and the module that computes the mixer's context from its input, if there is one."""

    def __init__(self, in_dim: int, dim: int, width: int, mixer: nn.Module, context: nn.Module | None, **kwargs):
        super().__init__(in_dim, dim, width, **kwargs)
        self.mixer, self.context = mixer, context

    def middle(self, x: Tensor, **context) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        if self.context is not None:
            context["context"] = self.context(x)
        return self.mixer(x, **context).permute(0, 3, 1, 2)


class BossNet(HierarchicalBackbone):
    """ResNet-shaped net whose blocks were searched: convolution or attention. A stage's first block reduces the map.

    Args:
        encoding: Blocks of each stage: 1 is a convolution, 0 attention. The first and the last stage may have none.
        dim: Channels inside the convolutional blocks of the first stage; every further stage has twice as many. A
            stage's maps have four times as many.
        squeeze: Give the convolutional blocks squeeze-and-excitation, and all blocks SiLU instead of ReLU.
        last_stride: Stride of the last stage relative to the stage before.
        stem_stride: Stride of the stem's convolution.
        mixers: Token mixers of the attention blocks, as `ops.parse_mixers` reads them. Default: full attention.
        in_chans: Number of channels of the images.
        drop_path_rate: Drop path rate of the last block; the rates rise linearly from 0. Attention blocks have none.
        **kwargs: Further arguments of `HierarchicalBackbone`.
    """

    renames = (
        (r"^conv1\.", "stages.0.downsample.0."),
        (r"^bn1\.", "stages.0.downsample.1."),
        (r"^layer(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks."),
        (r"\.peg\.conv\.", ".peg."),
        (r"(blocks\.\d+)\.(?:shortcut|downsample)\.1\.", r"\1.downsample.conv."),
        (r"(blocks\.\d+)\.(?:shortcut|downsample)\.2\.", r"\1.downsample.norm."),
        (r"\.proj\.0\.", ".conv1."),
        (r"\.proj\.1\.conv\.", ".peg."),
        (r"\.proj\.2\.", ".bn1."),
        (r"\.net\.1\.", ".mixer."),
        (r"\.net\.2\.", ".bn2."),
        (r"\.net\.4\.", ".conv3."),
        (r"\.net\.5\.", ".bn3."),
        (r"^fc\.", "head."),
    )

    def __init__(
        self,
        encoding: Sequence[Sequence[int]] = ((1,), (1,), (1, 1, 1, 0, 1), (0, 0, 0, 1, 0, 0, 0, 0, 0)),
        dim: int = 64,
        squeeze: bool = True,
        last_stride: int = 2,
        stem_stride: int = 2,
        mixers: Spec | Sequence | None = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        depths = [len(stage) for stage in encoding]
        specs = parse_mixers("full" if mixers is None else mixers, depths)
        act = nn.SiLU if squeeze else nn.ReLU
        steps = (1, 2, 2, last_stride)
        stride, in_dim, index = 2 * stem_stride, 64, 0
        stages, dims, strides = [], [], []
        for i, choices in enumerate(encoding):
            # A stage without blocks leaves the map as it is.
            stride, width = stride * steps[i] if choices else stride, dim * 2**i
            attention_width = HEADS[i] * HEAD_DIM
            if mixers is None:
                ops = [Attention(attention_width, HEADS[i]) for _ in choices]
                contexts: list[nn.Module | None] = [None for _ in choices]
            else:
                ops, contexts = create_ops(specs[i], attention_width, HEADS[i], stage=i, stride=stride)
            blocks: list[nn.Module] = []
            for j, is_conv in enumerate(choices):
                common: Any = {"in_dim": in_dim, "dim": 4 * width, "stride": 1 if j else steps[i], "act": act}
                if is_conv:
                    rate = drop_path_rate * index / (sum(depths) - 1)
                    blocks.append(ConvBlock(width=width, squeeze=squeeze, drop_path=rate, **common))
                else:
                    blocks.append(AttentionBlock(width=attention_width, mixer=ops[j], context=contexts[j], **common))
                in_dim, index = 4 * width, index + 1
            downsample = nn.Identity()
            if not i:
                downsample = nn.Sequential(
                    nn.Conv2d(in_chans, 64, 7, stem_stride, padding=3, bias=False),
                    nn.BatchNorm2d(64),
                    act(),
                    nn.MaxPool2d(3, stride=2, padding=1),
                )
            stages.append(Stage(downsample, blocks))
            dims.append(in_dim)
            strides.append(stride)
        super().__init__(stages, dims, strides, nn.Identity(), in_chans=in_chans, **kwargs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Attention):
                # The authors' projection is a 1 x 1 convolution.
                nn.init.kaiming_normal_(module.to_qkv.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Block):
                nn.init.zeros_(module.bn3.weight)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if isinstance(self.head, nn.Linear):
            self.head.reset_parameters()


_RELEASES = "https://github.com/changlin31/BossNAS/releases/download/v0.1/BossNet-"
default_cfgs = generate_default_cfgs(
    {
        "bossnet_t0_nose.in1k": imagenet_cfg(f"{_RELEASES}T0-nose-80_5.pth"),
        "bossnet_t0.in1k": imagenet_cfg(f"{_RELEASES}T0-80_8.pth"),
        "bossnet_t1.in1k": imagenet_cfg(f"{_RELEASES}T1-81_9.pth", pool_size=(14, 14)),
        "bossnet_nano": imagenet_cfg(input_size=(3, 32, 32), pool_size=(2, 2)),
    }
)


@register_model
def bossnet_nano(pretrained: bool = False, **kwargs) -> BossNet:
    """Return a small net of our own for small images and CPUs; 32 pixels give maps of 16, 8, 4 and 2 tokens a side."""
    arguments = {"encoding": ((1,), (1,), (1, 0), (0, 0)), "dim": 16, "stem_stride": 1}
    return BossNet.build("bossnet_nano", pretrained, **arguments | kwargs)


@register_model
def bossnet_t0_nose(pretrained: bool = False, **kwargs) -> BossNet:
    """Build BossNet-T0 without squeeze-and-excitation."""
    return BossNet.build("bossnet_t0_nose", pretrained, **{"squeeze": False} | kwargs)


@register_model
def bossnet_t0(pretrained: bool = False, **kwargs) -> BossNet:
    return BossNet.build("bossnet_t0", pretrained, **kwargs)


@register_model
def bossnet_t1(pretrained: bool = False, **kwargs) -> BossNet:
    """Build BossNet-T1, which is T0 with a last stage that keeps the resolution."""
    return BossNet.build("bossnet_t1", pretrained, **{"last_stride": 1} | kwargs)
