"""PVT: Pyramid Vision Transformer (Wang et al., ICCV 2021, arXiv:2102.12122).

Paper: Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions. Written after the
paper and the authors' repository, whai362/PVT (Apache-2.0); its checkpoints load. timm has version 2.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.layers import LayerNorm2d, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models import plain
from models.backbone import run_block
from models.hierarchical import HierarchicalBackbone, Stage, imagenet_cfg, init_weights, stage_layout
from models.layers.downsample import PatchConv2d
from models.layers.position import fit_positions, grid_of, resize_positions
from models.weights import join_projections
from ops import create_ops, parse_mixers
from ops.losses import Losses
from ops.registry import Spec, take_extra


class PatchEmbed(nn.Module):
    """Patch embedding, norm and learned positions: (B, C, H, W) to (B, dim, H', W').

    Args:
        proj: Patch embedding, from (B, C, H, W) to (B, dim, H', W').
        norm: Norm of this map.
        dim: Number of channels of the map.
        grid: Height and width, in tokens, of the map that the positions are learned for; the positions of a map of
            another size are interpolated.
        extra: Number of tokens beside the map that have a position too. These positions are the first of the table.
    """

    def __init__(self, proj: nn.Module, norm: nn.Module, dim: int, grid: tuple[int, int], extra: int = 0):
        super().__init__()
        self.grid, self.extra = grid, extra
        self.proj, self.norm = proj, norm
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, extra + grid[0] * grid[1], dim), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.proj(x))
        table = resize_positions(self.pos_embed, self.grid, x.shape[2:], self.extra, mode="bilinear")
        return x + table[:, self.extra :].transpose(1, 2).unflatten(2, x.shape[2:])

    def resize_table(self, name: str, value: Tensor) -> Tensor:
        return fit_positions(value, self.grid, self.extra, mode="bilinear")


class Block(plain.Block):
    """Block of ViT-shaped nets for maps (B, C, H, W)."""

    def forward(self, x: Tensor, **context) -> Tensor:
        tokens = self.tokens(x.flatten(2).transpose(1, 2), x.shape[2:], **context)
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])

    def tokens(self, x: Tensor, size: Sequence[int], **context) -> Tensor:
        """Mix tokens (B, E + H * W, C), of which the first E are beside the map of size (H, W)."""
        return super().forward(x, size, **context)


class PVT(HierarchicalBackbone):
    """Pyramid with learned positions, spatial reduction attention and a class token in the last stage.

    A subclass may override `make_embedding` and `make_block`.

    The classifier reads the class token if all ops of the last stage take extra tokens, and the mean of the map
    otherwise. As in the authors' dense nets, the maps of `forward_intermediates` are computed without the class token.

    Args:
        dims: Number of channels of each stage.
        depths: Number of blocks in each stage.
        heads: Number of attention heads in each stage.
        mlp_ratios: Width of the MLP in each stage, relative to the channels.
        mixers: Token mixers, as `ops.parse_mixers` reads them.
        class_token: False leaves out the class token.
        final_norm: False leaves out the norm before the classifier.
        img_size: Side or (height, width) in pixels of the images that the positions are learned for.
        patch: Side of a patch of the stem, in pixels.
        in_chans: Number of channels of the images.
        global_pool: "token", "avg" or "". Default: "token" with a class token, "avg" without one.
        drop_path_rate: Drop path rate of the last block; the rates rise linearly from 0.
        **kwargs: Further arguments of `HierarchicalBackbone`.
    """

    renames = (
        (r"^patch_embed(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.downsample."),
        (r"^pos_embed(\d)$", lambda match: f"stages.{int(match[1]) - 1}.downsample.pos_embed"),
        (r"^block(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks."),
        (r"\.attn\.", ".mixer."),
    )

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        mixers: Spec | Sequence = "spatial_reduction",
        class_token: bool = True,
        final_norm: bool = True,
        img_size: int | tuple[int, int] = 224,
        patch: int = 4,
        in_chans: int = 3,
        global_pool: str | None = None,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        specs = parse_mixers(mixers, depths)
        self.extra = int(class_token and take_extra(specs[-1]))
        dims, strides, rates = stage_layout(dims, depths, drop_path_rate, patch)
        stages = []
        for i, dim in enumerate(dims):
            extra = self.extra if i == len(dims) - 1 else 0
            layers = self.make_embedding(i, dims[i - 1] if i else in_chans, dim, 2 if i else patch)
            downsample = PatchEmbed(*layers, dim, grid_of(img_size, strides[i]), extra)
            ops, contexts = create_ops(specs[i], dim, heads[i], stage=i, stride=strides[i], extra=extra)
            blocks = [self.make_block(i, dim, op, mlp_ratios[i], rate) for op, rate in zip(ops, rates[i], strict=True)]
            stages.append(Stage(downsample, blocks, contexts))
        norm = LayerNorm2d(dims[-1], eps=1e-6) if final_norm else nn.Identity()
        if global_pool is None:
            global_pool = "token" if self.extra else "avg"
        super().__init__(stages, dims, strides, norm, in_chans=in_chans, global_pool=global_pool, **kwargs)
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, dims[-1]), std=0.02)) if self.extra else None
        self.apply(init_weights)

    def make_embedding(self, stage: int, in_dim: int, dim: int, patch: int) -> tuple[nn.Module, nn.Module]:
        """Return the patch embedding of stage `stage` and its norm."""
        return PatchConv2d(in_dim, dim, patch), LayerNorm2d(dim, eps=1e-5)

    def make_block(self, stage: int, dim: int, mixer: nn.Module, mlp_ratio: float, drop_path: float) -> nn.Module:
        """Return a block of stage `stage`."""
        return Block(dim, mixer, mlp_ratio, drop_path)

    def reset_pool(self, global_pool: str) -> None:
        if self.extra:
            self.global_pool = plain.TokenPool(global_pool, self.extra)
        else:
            super().reset_pool(global_pool)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | ({"cls_token"} if self.cls_token is not None else set())

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the authors' weights, and join those of `q` and `kv` for ops that project all three by `qkv`."""
        return join_projections(self, super().checkpoint_filter(state))

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.cls_token = None
        return take

    def forward_intermediates(self, x: Tensor, *args, intermediates_only: bool = False, **kwargs) -> Any:
        if self.cls_token is None or intermediates_only:
            return super().forward_intermediates(x, *args, intermediates_only=intermediates_only, **kwargs)
        maps = super().forward_intermediates(x, *args, intermediates_only=True, **kwargs)
        return self.forward_features(x), maps

    def forward_features(self, x: Tensor, losses: Losses | None = None) -> Tensor:
        """Return the last map (B, C, H, W), or with a class token all tokens (B, 1 + H * W, C)."""
        if self.cls_token is None:
            return super().forward_features(x, losses)
        *earlier, last = cast(list[Stage], list(self.stages))
        for stage in earlier:
            x = stage(x, losses)
        embed = cast(PatchEmbed, last.downsample)
        x = embed(x)
        size = x.shape[2:]
        cls_token = (self.cls_token + embed.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat([cls_token, x.flatten(2).transpose(1, 2)], dim=1)
        recompute = last.grad_checkpointing and torch.is_grad_enabled()
        for block, has_losses in zip(cast(list[Block], list(last.blocks)), last.have_losses, strict=True):
            x = run_block(block.tokens, x, size, recompute=recompute, losses=losses if has_losses else None)
        return self.norm(x.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2)


def pvt_cfg(url: Any) -> dict:
    """Return the `default_cfgs` entry of a net in PVT's layout, whose positions belong to one image size."""
    return imagenet_cfg(url, first_conv="stages.0.downsample.proj", fixed_input_size=True)


default_cfgs = generate_default_cfgs(
    {
        f"pvt_{size}.in1k": pvt_cfg(f"https://github.com/whai362/PVT/releases/download/v2/pvt_{size}.pth")
        for size in ("tiny", "small", "medium", "large")
    }
)


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs) -> PVT:
    return PVT.build("pvt_tiny", pretrained, **kwargs)


@register_model
def pvt_small(pretrained: bool = False, **kwargs) -> PVT:
    return PVT.build("pvt_small", pretrained, **{"depths": (3, 4, 6, 3)} | kwargs)


@register_model
def pvt_medium(pretrained: bool = False, **kwargs) -> PVT:
    return PVT.build("pvt_medium", pretrained, **{"depths": (3, 4, 18, 3)} | kwargs)


@register_model
def pvt_large(pretrained: bool = False, **kwargs) -> PVT:
    return PVT.build("pvt_large", pretrained, **{"depths": (3, 8, 27, 3)} | kwargs)
