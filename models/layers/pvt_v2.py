"""The frame of PVTv2 (Wang et al., CVMJ 2022, arXiv:2106.13797), which later papers fill with their attention."""

import math
from collections.abc import Sequence

from timm.layers import DropPath, LayerNorm2d
from torch import Tensor, nn

from models.hierarchical import Stage, init_weights

# From the names in such nets' checkpoints to ours.
RENAMES = (
    (r"^patch_embed(\d)\.proj\.", lambda match: f"stages.{int(match[1]) - 1}.downsample.0."),
    (r"^patch_embed(\d)\.norm\.", lambda match: f"stages.{int(match[1]) - 1}.downsample.1."),
    (r"^block(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks."),
    (r"^norm(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.norm."),
    (r"\.attn\.", ".mixer."),
)


class NormedStage(Stage):
    """A stage of `dim` channels that begins with patches that overlap, and whose map is normed at its end.

    The norm is for the next stage as for a detector. The first stage's patches have strides of 4, the others' of 2.
    """

    def __init__(self, in_dim: int, dim: int, first: bool, blocks: Sequence[nn.Module], contexts: Sequence):
        side, stride = (7, 4) if first else (3, 2)
        conv = nn.Conv2d(in_dim, dim, side, stride, padding=side // 2)
        super().__init__(nn.Sequential(conv, LayerNorm2d(dim, eps=1e-5)), blocks, contexts)
        self.norm = LayerNorm2d(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Block(nn.Module):
    """Token mixing and an MLP that sees the map (B, H, W, C), each added to the map (B, C, H, W)."""

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
    """MLP of (B, H, W, C) with a depthwise convolution of the hidden map."""

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
    """As most papers do linear layers, and convolutions by what leaves them; for `nn.Module.apply`."""
    init_weights(module)
    if isinstance(module, nn.Conv2d):
        fan_out = module.out_channels * math.prod(module.kernel_size) // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
