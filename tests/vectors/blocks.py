"""Blocks of papers of which only the op is ours: composed as their authors do, for the reference vectors of the blocks.

Maps are (B, C, H, W), as in the authors' code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, Mlp
from torch import Tensor, nn

from ops import create_op
from ops.functional import window_attention


@dataclass(frozen=True)
class Block:
    """A block that is built from the `kwargs` of its vector.

    Attributes:
        make: builds the block from `kwargs`.
    """

    make: Any

    def build(self, vector: Mapping[str, Any]) -> nn.Module:
        """Build the block."""
        return self.make(**vector["kwargs"])

    def run(self, model: nn.Module, vector: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Return the block's output."""
        return (model(x),)


class LaMambaBlock(nn.Module):
    """The block of LaMamba without a condition: op `local_scan` without its windows, window attention and an MLP."""

    def __init__(self, dim: int, num_heads: int, window: int, shift: int):
        super().__init__()
        self.norm, self.norm_swin, self.norm2 = (nn.LayerNorm(dim) for _ in range(3))
        self.op = create_op("local_scan", dim, num_heads, window=0)
        self.attn = create_op("window", dim, num_heads, window=window, shift=shift)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix and transform a map (B, H, W, C)."""
        x = x + self.op(self.norm(x))
        x = x + self.attn(self.norm_swin(x))
        return x + self.mlp(self.norm2(x))


class ConvFFN(nn.Module):
    """CATANet's MLP, with a 5 x 5 depthwise convolution that is added to the hidden map."""

    renames = ((r"^dwconv\.depthwise_conv\.0\.", "dwconv."),)

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 5, padding=2, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(x + F.gelu(self.dwconv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1))


class TokenAggregationBlock(nn.Module):
    """CATANet's block of op `content_aggregation`."""

    renames = ((r"^mlp\.norm\.", "mlp_norm."), (r"^mlp\.fn\.", "mlp."), (r"^(?!norm|mlp|mixer)", "mixer."))

    def __init__(
        self, dim: int, heads: int, qk_dim: int, mlp_dim: int, n_iter: int, num_tokens: int, group_size: int,
        initted: bool,
    ):  # fmt: skip
        super().__init__()
        self.norm, self.mlp_norm, self.mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), ConvFFN(dim, mlp_dim)
        self.mixer = create_op(
            "content_aggregation", dim, heads, qk_dim=qk_dim, steps=n_iter, centers=num_tokens, group=group_size
        )
        self.mixer.centers.initted.fill_(initted)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self.mixer(self.norm(x))
        return (x + self.mlp(self.mlp_norm(x))).permute(0, 3, 1, 2)


class LocalRegionBlock(nn.Module):
    """CATANet's block of op `overlapping_patch`."""

    renames = (
        (r"^layer\.0\.norm\.", "norm."),
        (r"^layer\.0\.fn\.", "mixer."),
        (r"^layer\.1\.norm\.", "mlp_norm."),
        (r"^layer\.1\.fn\.", "mlp."),
    )

    def __init__(self, dim: int, heads: int, qk_dim: int, mlp_dim: int, ps: int):
        super().__init__()
        self.norm, self.mlp_norm, self.mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), ConvFFN(dim, mlp_dim)
        self.mixer = create_op("overlapping_patch", dim, heads, qk_dim=qk_dim, patch=ps)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self.mixer(self.norm(x))
        return (x + self.mlp(self.mlp_norm(x))).permute(0, 3, 1, 2)


class RegionLayer(nn.Module):
    """RAT's layer of region and window attention, with the regions of its vector."""

    renames = ((r"^norm_(ra|wa)_mlp\.", r"mlp_norm_\1."), (r"^wa\.proj_out\.", "wa.proj."))

    def __init__(self, n_feat: int, num_heads: int, window_size: int, mlp_ratio: float):
        super().__init__()
        self.num_heads, self.window = num_heads, (window_size, window_size)
        for name in ("ra", "wa"):
            self.add_module(f"norm_{name}", LayerNorm2d(n_feat))
            self.add_module(f"mlp_norm_{name}", LayerNorm2d(n_feat))
            self.register_parameter(f"lambda_{name}", nn.Parameter(torch.zeros(n_feat, 1, 1)))
            mlp = nn.ModuleDict({"fc1": nn.Linear(n_feat, int(n_feat * mlp_ratio))})
            mlp["fc2"] = nn.Linear(int(n_feat * mlp_ratio), n_feat)
            self.add_module(f"mlp_{name}", mlp)
        self.ra = create_op("region", n_feat, num_heads)
        self.wa = nn.ModuleDict({"qkv": nn.Linear(n_feat, 3 * n_feat), "proj": nn.Linear(n_feat, n_feat)})

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (torch.arange(side) for side in x.shape[2:])
        regions = rows[:, None] // 9 * 3 + (columns + 2 * rows[:, None]) // 20
        windows = lambda x: self.wa["proj"](  # noqa: E731
            window_attention(
                self.wa["qkv"](x).unflatten(-1, (3, -1)), None, self.num_heads, self.window, scale=self.num_heads**-0.5
            )
        )
        for name, mix in (("ra", lambda x: self.ra(x, regions)), ("wa", windows)):
            mixed = mix(self.get_submodule(f"norm_{name}")(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            x = x + self.get_parameter(f"lambda_{name}") * mixed
            fc1, fc2 = self.get_submodule(f"mlp_{name}").children()
            mlp_input = self.get_submodule(f"mlp_norm_{name}")(x).permute(0, 2, 3, 1)
            x = x + fc2(F.gelu(fc1(mlp_input))).permute(0, 3, 1, 2)
        return x
