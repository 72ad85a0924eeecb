"""MedViTV2: Medical Image Classification with KAN-Integrated Transformers (Manzari et al., 2025, arXiv:2502.13693).

Written after the paper and the authors' repository, Omid-Nejati/MedViTV2 (MIT), whose released weights load. As in the
authors' code, neighbourhood attention has a dilation of 1, and it and the KANs read maps (B, C, H, W) as if they were
laid out as (B, H, W, C).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, make_divisible
from timm.models import generate_default_cfgs, register_model
from timm.models.nextvit import ConvAttention, ConvNormAct, PatchEmbed
from torch import Tensor, nn

from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg, init_linear_and_conv, stage_layout
from models.layers.kan import KANLayer
from models.layers.squeeze import SqueezeExcite
from ops import create_ops, parse_mixers
from ops.functional import map_attention
from ops.registry import Spec

# Channels of a head
HEAD_DIM = 32
# Share of a global block's channels that come from attention
ATTENTION_SHARE = 0.75
# Number of blocks in each stage of all sizes but the smallest
DEPTHS = (2, 2, 6, 2)


class LocalFeedForward(nn.Sequential):
    """Inverted bottleneck with a depthwise convolution, added to its input (B, C, H, W)."""

    def __init__(self, dim: int, ratio: int, kernel: int):
        hidden = ratio * dim
        super().__init__(
            nn.Conv2d(dim, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            SqueezeExcite(hidden, ratio, bias=True, gate=nn.Hardsigmoid),
            nn.Conv2d(hidden, dim, 1, bias=False),
            nn.BatchNorm2d(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class PooledAttention(nn.Module):
    """Attention from each token to means of `reduction` consecutive tokens: (B, C, H, W) to the same shape."""

    def __init__(self, dim: int, reduction: int):
        super().__init__()
        self.num_heads, self.reduction = dim // HEAD_DIM, reduction
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.BatchNorm1d(dim) if reduction > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        if self.reduction > 1:
            # A map with fewer tokens than one mean takes has one mean.
            tokens = self.norm(F.avg_pool1d(tokens, min(self.reduction, tokens.shape[2])))
        tokens, x = tokens.transpose(1, 2).unsqueeze(1), x.permute(0, 2, 3, 1)
        out = map_attention(self.q(x), self.k(tokens), self.v(tokens), self.num_heads)
        return self.proj(out).permute(0, 3, 1, 2)


class LocalBlock(nn.Module):
    """Local feature perception: token mixing and convolutions, each added to the map (B, C, H, W).

    Args:
        dim: Number of channels.
        mixer: Token mixer.
        kernel: Side of the depthwise convolution.
        drop_path: Drop path rate of the mixer.
        scrambled: Give the mixer the map's values in the order of (B, C, H, W), as the authors do.
    """

    def __init__(self, dim: int, mixer: nn.Module, kernel: int, drop_path: float, scrambled: bool):
        super().__init__()
        self.scrambled = scrambled
        self.norm1 = nn.BatchNorm2d(dim)
        self.mixer = mixer
        self.norm2 = nn.BatchNorm2d(dim)
        self.local = LocalFeedForward(dim, 3, kernel)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, **context) -> Tensor:
        B, C, H, W = x.shape
        normed = self.norm1(x)
        if self.scrambled:
            mixed = self.mixer(normed.reshape(B, H, W, C), **context).reshape(B, C, H, W)
        else:
            mixed = self.mixer(normed.permute(0, 2, 3, 1), **context).permute(0, 3, 1, 2)
        x = x + self.drop_path(mixed)
        return x + self.local(self.norm2(x))


class GlobalBlock(nn.Module):
    """Global feature perception: attention, convolutions of a part of the channels, then a KAN.

    Maps (B, in_dim, H, W) to (B, dim, H, W).

    Args:
        in_dim: Channels of the map.
        dim: Channels of the result.
        reduction: Number of tokens in one of the means that are attended to.
        drop_path: Drop path rate.
    """

    def __init__(self, in_dim: int, dim: int, reduction: int, drop_path: float):
        super().__init__()
        width = attention_dim(dim)
        self.patch_embed = PatchEmbed(in_dim, width)
        self.norm1 = nn.BatchNorm2d(width)
        self.attention = PooledAttention(width, reduction)
        self.projection = PatchEmbed(width, dim - width)
        self.mhca = ConvAttention(dim - width, HEAD_DIM)
        self.norm2 = nn.BatchNorm2d(dim)
        self.kan = nn.Sequential(KANLayer(dim, 2 * dim), KANLayer(2 * dim, dim))
        shares = (ATTENTION_SHARE, 1 - ATTENTION_SHARE, 1.0)
        self.drop_path1, self.drop_path2, self.drop_path3 = (DropPath(share * drop_path) for share in shares)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = x + self.drop_path1(self.attention(self.norm1(x)))
        local = self.projection(x)
        x = torch.cat([x, local + self.drop_path2(self.mhca(local))], dim=1)
        mixed = self.kan(self.norm2(x).reshape(-1, x.shape[1]))
        return x + self.drop_path3(mixed.reshape(x.shape))


def attention_dim(dim: int) -> int:
    """Return the number of channels, of the `dim` channels of a global block, that come from attention."""
    return make_divisible(int(ATTENTION_SHARE * dim), HEAD_DIM)


class MedViTV2(HierarchicalBackbone):
    """Pyramid of local blocks, then of both kinds of blocks in turn, then of global blocks.

    Stage 2 ends with a global block, every third block of stage 3 is global, and so are all blocks of stage 4.

    Args:
        dims: Number of channels of each stage.
        depths: Number of blocks in each stage.
        patch: Stride of the stem, 2 or 4.
        mixers: Token mixers of the local blocks, as `ops.parse_mixers` reads them. Default: neighbourhood attention.
        in_chans: Number of channels of the images.
        drop_path_rate: Drop path rate of the last block; the rates rise linearly from 0.
        **kwargs: Further arguments of `HierarchicalBackbone`.
    """

    decays_tables = True
    renames = (
        (r"\.rbf\.grid$", None),
        (r"^stages\.0\.blocks\.0\.patch_embed\.", "stages.0.downsample.4."),
        (r"^stages\.(\d)\.blocks\.0\.patch_embed\.", r"stages.\1.downsample."),
        (r"^stem\.", "stages.0.downsample."),
        (r"\.conv\.conv\.", ".local."),
        (r"\.attn\.", ".mixer."),
        (r"\.e_mhsa\.", ".attention."),
        (r"\.kan\.layers\.(\d)\.layernorm\.", r".kan.\1.norm."),
        (r"\.kan\.layers\.(\d)\.spline_linear\.", r".kan.\1.linear."),
        (r"^proj_head\.0\.", "head."),
    )

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 192, 384),
        depths: Sequence[int] = (2, 2, 6, 1),
        patch: int = 4,
        mixers: Spec | Sequence | None = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        dims, strides, rates = stage_layout(dims, depths, drop_path_rate, patch)
        specs = parse_mixers({"name": "neighborhood", "dilation": 1} if mixers is None else mixers, depths)
        stages = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            is_global = [(False, j == depth - 1, j % 3 == 2, True)[i] for j in range(depth)]
            width = attention_dim(dim) if is_global[0] else dim
            if i:
                downsample = PatchEmbed(dims[i - 1], width, stride=2)
            else:
                downsample = nn.Sequential(
                    ConvNormAct(in_chans, 64, stride=2), ConvNormAct(64, 32), ConvNormAct(32, 64),
                    ConvNormAct(64, 64, stride=patch // 2), PatchEmbed(64, width),
                )  # fmt: skip
            ops, contexts = create_ops(specs[i], dim, dim // HEAD_DIM, stage=i, stride=strides[i])
            blocks: list[nn.Module] = []
            for j, rate in enumerate(rates[i]):
                if is_global[j]:
                    blocks.append(GlobalBlock(dim if j else width, dim, (64, 16, 4, 1)[i], rate))
                    contexts[j] = None
                else:
                    blocks.append(LocalBlock(dim, ops[j], 3 if i else 7, rate, scrambled=mixers is None))
            stages.append(Stage(downsample, blocks, contexts))
        super().__init__(stages, dims, strides, nn.BatchNorm2d(dims[-1]), in_chans=in_chans, **kwargs)
        self.apply(init_linear_and_conv)
        # The authors' global blocks have a `LocalFeedForward` that they do not use.
        shapes = LocalFeedForward(HEAD_DIM, 2, 3).named_parameters()
        names = [name for name, module in self.named_modules() if isinstance(module, GlobalBlock)]
        self.unused_weights = {f"{name}.local.{key}" for key, _ in shapes for name in names}
        # The authors count blocks from the first stage to the last.
        counted = [f"stages.{i}.blocks.{j}." for i, depth in enumerate(depths) for j in range(depth)]
        self.renames = (
            *((rf"^features\.{number}\.", name) for number, name in enumerate(counted)),
            *self.renames,
            *((rf"^{name}\.local\..*(?:running_mean|running_var|num_batches_tracked)$", None) for name in names),
        )


_STEM = {"first_conv": "stages.0.downsample.0.conv"}
default_cfgs = generate_default_cfgs(
    {f"medvitv2_{size}": imagenet_cfg(**_STEM) for size in ("tiny", "small", "base", "large")}
    | {"medvitv2_nano": imagenet_cfg(input_size=(3, 32, 32), pool_size=(2, 2), **_STEM)}
)


@register_model
def medvitv2_nano(pretrained: bool = False, **kwargs) -> MedViTV2:
    """Return a small net of our own for small images and CPUs; 32 pixels give maps of 16, 8, 4 and 2 tokens a side."""
    arguments = {"dims": (32, 128, 128, 256), "depths": (1, 1, 3, 1), "patch": 2}
    return MedViTV2.build("medvitv2_nano", pretrained, **arguments | kwargs)


@register_model
def medvitv2_tiny(pretrained: bool = False, **kwargs) -> MedViTV2:
    return MedViTV2.build("medvitv2_tiny", pretrained, **kwargs)


@register_model
def medvitv2_small(pretrained: bool = False, **kwargs) -> MedViTV2:
    return MedViTV2.build("medvitv2_small", pretrained, **{"dims": (64, 128, 256, 512), "depths": DEPTHS} | kwargs)


@register_model
def medvitv2_base(pretrained: bool = False, **kwargs) -> MedViTV2:
    return MedViTV2.build("medvitv2_base", pretrained, **{"dims": (96, 192, 384, 768), "depths": DEPTHS} | kwargs)


@register_model
def medvitv2_large(pretrained: bool = False, **kwargs) -> MedViTV2:
    return MedViTV2.build("medvitv2_large", pretrained, **{"dims": (96, 256, 512, 1024), "depths": DEPTHS} | kwargs)
