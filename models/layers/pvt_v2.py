"""Stages, blocks and MLPs of PVTv2 (Wang et al., CVMJ 2022, arXiv:2106.13797), to which later papers add their ops."""

import math
from collections.abc import Sequence

from timm.layers import DropPath, LayerNorm2d
from torch import Tensor, nn

from models.hierarchical import Stage, init_weights
from ops.losses import Losses

# Renames from the weight names in the checkpoints of PVTv2 and the papers that build on it to ours.
RENAMES = (
    (r"^patch_embed(\d)\.proj\.", lambda match: f"stages.{int(match[1]) - 1}.downsample.0."),
    (r"^patch_embed(\d)\.norm\.", lambda match: f"stages.{int(match[1]) - 1}.downsample.1."),
    (r"^block(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks."),
    (r"^norm(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.norm."),
    (r"\.attn\.", ".mixer."),
)


class NormedStage(Stage):
    """Stage that begins with a convolution of overlapping patches and ends with a norm of its map.

    The next stage and a detector both read the map after the norm.

    Args:
        in_dim: Channels of the previous stage's map, or of the image.
        dim: Channels of the stage.
        first: Whether this is the first stage, whose patches are 7 wide with a stride of 4; the patches of the other
            stages are 3 wide with a stride of 2.
        blocks: Blocks of the stage.
        contexts: As in `Stage`.
    """

    def __init__(self, in_dim: int, dim: int, first: bool, blocks: Sequence[nn.Module], contexts: Sequence):
        side, stride = (7, 4) if first else (3, 2)
        conv = nn.Conv2d(in_dim, dim, side, stride, padding=side // 2)
        super().__init__(nn.Sequential(conv, LayerNorm2d(dim, eps=1e-5)), blocks, contexts)
        self.norm = LayerNorm2d(dim, eps=1e-6)

    def forward(self, x: Tensor, losses: Losses | None = None) -> Tensor:
        return self.norm(super().forward(x, losses))


class Block(nn.Module):
    """Token mixing and an MLP, each added to the map (B, C, H, W); both take (B, H, W, C)."""

    def __init__(self, dim: int, mixer: nn.Module, mlp: nn.Module, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, **context) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.mixer(self.norm1(x), **context))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class DepthwiseMlp(nn.Module):
    """MLP for maps (B, H, W, dim) with a 3 x 3 depthwise convolution of the hidden map."""

    renames = ((r"^dwconv\.dwconv\.", "dwconv."),)

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        init_conv(self.dwconv)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(self.act(x))


def init_conv(module: nn.Module) -> None:
    """Initialise a linear layer or a convolution as PVTv2 does; for `nn.Module.apply`.

    Linear layers: `init_weights`. Convolutions: normal of variance 2 / fan-out per group, bias 0.
    """
    init_weights(module)
    if isinstance(module, nn.Conv2d):
        fan_out = module.out_channels * math.prod(module.kernel_size) // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
