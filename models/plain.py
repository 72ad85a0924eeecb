"""What every ViT-shaped backbone shares: tokens of one resolution, beside them a class token or none."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.layers import DropPath, Mlp, PatchEmbed, calculate_drop_path_rates, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from models.backbone import Backbone
from models.hierarchical import init_weights, to_channels_last
from models.layers.position import fit_positions, resize_positions
from ops import create_ops, parse_mixers
from ops.registry import Spec, take_extra


class Block(nn.Module):
    """Token mixing and MLP, each added to the tokens (B, E + H * W, C), of which E stand beside the map."""

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float = 4.0, drop_path: float = 0.0, eps: float = 1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: Sequence[int], **context) -> Tensor:
        x = x + self.drop_path(self.mix(self.norm1(x), size, **context))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def mix(self, x: Tensor, size: Sequence[int], **context) -> Tensor:
        H, W = size
        extra, x = x[:, : -H * W], x[:, -H * W :].unflatten(1, (H, W))
        if not extra.shape[1]:
            return self.mixer(x, **context).flatten(1, 2)
        x, extra = self.mixer(x, extra, **context)
        return torch.cat([extra, x.flatten(1, 2)], dim=1)


class TokenPool(nn.Module):
    """Of tokens (B, E + N, C): the first ("token"), the mean of those of the map ("avg"), or all ("")."""

    def __init__(self, kind: str, extra: int):
        super().__init__()
        if kind not in ("token", "avg", "") or (kind == "token" and not extra):
            raise ValueError(f"global_pool must be {'token, ' if extra else ''}avg or '', not {kind!r}")
        self.kind, self.extra = kind, extra

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "token":
            return x[:, 0]
        return x[:, self.extra :].mean(1) if self.kind else x


class PlainBackbone(Backbone):
    """Patches, learned positions, blocks, a final norm and a linear classifier, with timm's interface.

    A paper's file subclasses it and sets the attributes in which its net differs.

    The class token, which is there if all ops take it, is what the classifier reads; else that is the mean of the map.
    Images are zero-padded on the right and at the bottom to whole patches, and positions interpolated.

    Args:
        img_size: of the images that the positions are learned for.
        patch: side of a patch in pixels.
        dim, heads, mlp_ratio: of all blocks.
        depths: the number of blocks, as of a net with one stage.
        mixers: token mixers, as `ops.parse_mixers` reads them; a list of one entry, a list that the blocks take in
            turn: [[agent, full]].
        class_token: False leaves it out.
        num_classes: 0 leaves out the classifier.
        global_pool: "token", "avg" or "" in place of the above.
    """

    block: type[nn.Module] = Block
    positions = True
    patch_norm = False
    eps = 1e-6  # of all norms

    blocks: nn.Sequential
    pos_embed: nn.Parameter | None
    out_indices = 3  # the last three, as of timm's

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch: int = 16,
        dim: int = 768,
        depths: Sequence[int] = (12,),
        heads: int = 12,
        mlp_ratio: float = 4.0,
        mixers: Spec | Sequence = "full",
        class_token: bool = True,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if len(depths) != 1:
            raise ValueError(f"depths must be one number of blocks, as in (12,), not {depths}")
        (specs,) = parse_mixers(mixers, depths)
        self.extra = int(class_token and take_extra(specs))  # tokens beside the map
        self.in_chans, self.grad_checkpointing = in_chans, False
        self.num_features = self.head_hidden_size = self.embed_dim = dim
        norm: Any = partial(nn.LayerNorm, eps=self.eps)
        self.patch_embed = PatchEmbed(
            img_size,
            patch,
            in_chans,
            dim,
            norm_layer=norm if self.patch_norm else None,
            output_fmt="NHWC",
            strict_img_size=False,
            dynamic_img_pad=True,
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if self.extra else None
        tokens = self.extra + self.patch_embed.num_patches
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, dim)) if self.positions else None

        stage = max(round(math.log2(patch / 4)), 0)  # that of a pyramid with this stride: the third of 16
        ops, contexts = create_ops(specs, dim, heads, stage=stage, stride=patch, extra=self.extra)
        rates: Any = calculate_drop_path_rates(drop_path_rate, len(specs))
        self.blocks = nn.Sequential(
            *(self.block(dim, op, mlp_ratio, rate, self.eps) for op, rate in zip(ops, rates, strict=True))
        )
        self.contexts = nn.ModuleList(dict.fromkeys(module for module in contexts if module is not None))
        self.context_of = [None if module is None else list(self.contexts).index(module) for module in contexts]

        self.norm = norm(dim)
        self.feature_info = [{"num_chs": dim, "reduction": patch, "module": f"blocks.{i}"} for i in range(len(specs))]
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, ("token" if self.extra else "avg") if global_pool is None else global_pool)
        self.apply(init_weights)
        for table in (self.pos_embed, self.cls_token):
            if table is not None:
                trunc_normal_(table, std=0.02)

    def reset_pool(self, global_pool: str) -> None:
        self.global_pool = TokenPool(global_pool, self.extra)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Depth order for layer decay: the stem, each block, the rest."""
        return {
            "stem": r"^(?:cls_token|pos_embed|patch_embed|contexts)",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        own = {"pos_embed": self.pos_embed, "cls_token": self.cls_token}
        return super().no_weight_decay() | {name for name, table in own.items() if table is not None}

    def resize_table(self, name: str, value: Tensor) -> Tensor:
        return fit_positions(value, self.patch_embed.grid_size, self.extra) if name == "pos_embed" else value

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images to tokens (B, E + H * W, C) with their positions, and (H, W)."""
        x = self.patch_embed(x)
        size, x = (x.shape[1], x.shape[2]), x.flatten(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        if self.pos_embed is None:
            return x, size
        return x + resize_positions(self.pos_embed, self.patch_embed.grid_size, size, self.extra), size

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps (B, C, H, W) after the blocks `indices`, after the final tokens (timm's interface)."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', not {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        x, taken, size = self.run(x, take, last + 1 if stop_early else None)
        taken = [self.norm(tokens) if norm else tokens for tokens in taken]
        maps = [to_channels_last(t[:, self.extra :].unflatten(1, size).permute(0, 3, 1, 2)) for t in taken]
        return maps if intermediates_only else (self.norm(x), maps)

    def run(
        self, x: Tensor, take: Sequence[int] = (), blocks: int | None = None
    ) -> tuple[Tensor, list[Tensor], tuple[int, int]]:
        """Images through the first `blocks`, or all: the tokens after the last one, those after `take`, and (H, W)."""
        taken = []
        x, size = self.embed(x)
        contexts = [module(x[:, self.extra :].unflatten(1, size)) for module in self.contexts]
        for i, block in enumerate(list(self.blocks)[:blocks]):
            index = self.context_of[i]
            context = {} if index is None else {"context": contexts[index]}
            recompute = self.grad_checkpointing and torch.is_grad_enabled()
            x = cast(Tensor, checkpoint(block, x, size, **context)) if recompute else block(x, size, **context)
            if i in take:
                taken.append(x)
        return x, taken, size

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps after the blocks `indices` do not need (timm's interface)."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = nn.Sequential(*list(self.blocks)[: last + 1])
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head or last + 1 < len(self.feature_info):
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """The final tokens (B, E + H * W, C)."""
        return self.norm(self.run(x)[0])
