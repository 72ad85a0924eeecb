"""Base of the ViT-shaped backbones: tokens of one resolution, with or without a class token."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, Mlp, PatchEmbed, calculate_drop_path_rates, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import Tensor, nn

from models.backbone import Backbone, run_block
from models.hierarchical import init_weights, to_channels_last
from models.layers.position import fit_positions, resize_positions
from ops import create_ops, parse_mixers
from ops.losses import Losses, loss_weights
from ops.registry import Spec, take_extra


class Block(nn.Module):
    """Token mixing and MLP, each added to the tokens (B, E + H * W, C).

    The first E tokens are extra ones, such as a class token; the others are a map of H rows and W columns.

    Args:
        dim: Channels C.
        mixer: Op from (B, H, W, C) to the same shape; with extra tokens from (x, extra) to both.
        mlp_ratio: Hidden channels of the MLP relative to `dim`.
        drop_path: Drop path rate.
        eps: Epsilon of the norms.

    Attributes:
        branch_scale: Factor of what the mixer and the MLP add.
    """

    branch_scale = 1.0

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float = 4.0, drop_path: float = 0.0, eps: float = 1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: Sequence[int], **context) -> Tensor:
        x = self.add(x, self.mix(self.norm1(x), size, **context))
        return self.add(x, self.mlp(self.norm2(x)))

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """Add what the mixer or the MLP returned to the tokens."""
        return torch.add(x, self.drop_path(branch), alpha=self.branch_scale)

    def mix(self, x: Tensor, size: Sequence[int], **context) -> Tensor:
        """Apply the mixer to tokens (B, E + H * W, C), of which the last are a map of `size` (H, W)."""
        H, W = size
        extra, x = x[:, : -H * W], x[:, -H * W :].unflatten(1, (H, W))
        if not extra.shape[1]:
            return self.mixer(x, **context).flatten(1, 2)
        x, extra = self.mixer(x, extra, **context)
        return torch.cat([extra, x.flatten(1, 2)], dim=1)


class TokenPool(nn.Module):
    """Pooling of tokens (B, E + N, C), of which the first E are extra ones and N are a map.

    Args:
        kind: "token" returns the first token, "avg" the mean of the map's tokens, "" all tokens.
        extra: Number of extra tokens E.

    Raises:
        ValueError: `kind` is another one, or "token" although there are no extra tokens.
    """

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

    A paper's class inherits from this one and sets the attributes in which its net differs.

    If all ops take a class token, there is one and the classifier reads it; else the classifier reads the mean of the
    map. A distillation token (DeiT, arXiv:2012.12877) has a classifier of its own, and the scores are the mean of both
    classifiers'. Images are zero-padded on the right and at the bottom to whole patches, and positions are
    interpolated.

    Args:
        img_size: Size, in pixels, of the images that the positions are learned for.
        patch: Side of a patch in pixels.
        dim: Channels of all blocks.
        depths: Number of blocks, as a list of one entry: the net counts as one stage.
        heads: Attention heads of all blocks.
        mlp_ratio: Hidden channels of the MLPs relative to `dim`.
        mixers: Token mixers, as `ops.parse_mixers` reads them for one stage. A nested list has mixers that the blocks
            take in turn: [[agent, full]].
        class_token: False leaves out the class token.
        distilled: Add a distillation token to the class token.
        num_classes: Number of classes; 0 leaves out the classifier.
        in_chans: Number of image channels.
        global_pool: "token", "avg" or "", as `TokenPool` reads it. By default "token" if there is a class token, else
            "avg".
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Drop path rate of the last block; the rates rise linearly from 0.

    Attributes:
        block: Class of the blocks.
        positions: Whether the net learns positions.
        patch_norm: Whether a norm follows the patch embedding.
        eps: Epsilon of all norms.
        distilled_training: In training mode, return the scores of both classifiers as (class, distillation).

    Raises:
        ValueError: `depths` has not exactly one entry, `global_pool` is unknown, or there is a distillation token but
            no class token.
    """

    block: type[nn.Module] = Block
    positions = True
    patch_norm = False
    eps = 1e-6
    distilled_training = False

    blocks: nn.Sequential
    pos_embed: nn.Parameter | None
    head_dist: nn.Module
    # `features_only=True` returns the maps after the last three blocks, as in timm's ViTs.
    out_indices = 3

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
        distilled: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if len(depths) != 1:
            raise ValueError(f"depths must be one number of blocks, as in (12,), not {depths}")
        if distilled and not class_token:
            raise ValueError("distilled needs a class token")
        (specs,) = parse_mixers(mixers, depths)
        # Number of tokens that are not part of the map.
        self.extra = (class_token + distilled) * take_extra(specs)
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
        self.dist_token = nn.Parameter(torch.empty(1, 1, dim)) if self.extra == 2 else None
        # Weights of a net with a class token load into a net without one.
        self.unused_weights = set() if self.extra else {"cls_token", "dist_token", "head_dist.weight", "head_dist.bias"}
        if self.dist_token is not None:
            self.classifiers = (*self.classifiers, "head_dist")
        tokens = self.extra + self.patch_embed.num_patches
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, dim)) if self.positions else None

        # Ops choose defaults by the stage, so take the stage of a pyramid with this stride: stage 2 for stride 16.
        stage = max(round(math.log2(patch / 4)), 0)
        ops, contexts = create_ops(specs, dim, heads, stage=stage, stride=patch, extra=self.extra)
        rates: Any = calculate_drop_path_rates(drop_path_rate, len(specs))
        self.blocks = nn.Sequential(
            *(self.block(dim, op, mlp_ratio, rate, self.eps) for op, rate in zip(ops, rates, strict=True))
        )
        self.contexts = nn.ModuleList(dict.fromkeys(module for module in contexts if module is not None))
        self.context_indices = [None if module is None else list(self.contexts).index(module) for module in contexts]

        self.have_losses = [bool(loss_weights(block)) for block in self.blocks]

        self.norm = norm(dim)
        self.feature_info = [{"num_chs": dim, "reduction": patch, "module": f"blocks.{i}"} for i in range(len(specs))]
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, ("token" if self.extra else "avg") if global_pool is None else global_pool)
        self.apply(init_weights)
        for table in (self.pos_embed, self.cls_token, self.dist_token):
            if table is not None:
                trunc_normal_(table, std=0.02)

    def reset_pool(self, global_pool: str) -> None:
        self.global_pool = TokenPool(global_pool, self.extra)

    def set_distilled_training(self, enable: bool = True) -> None:
        """Return the scores of both classifiers in training mode; without a distillation token nothing changes."""
        self.distilled_training = enable

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters by depth for layer decay: the stem, each block, the rest (timm's interface)."""
        return {
            "stem": r"^(?:cls_token|dist_token|pos_embed|patch_embed|contexts)",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm\.", MATCH_PREV_GROUP)],
        }

    def no_weight_decay(self) -> set[str]:
        tables = {"pos_embed": self.pos_embed, "cls_token": self.cls_token, "dist_token": self.dist_token}
        return super().no_weight_decay() | {name for name, table in tables.items() if table is not None}

    def resize_table(self, name: str, value: Tensor) -> Tensor:
        """Interpolate a checkpoint's positions to the grid of this net; `load_weights` calls it."""
        return fit_positions(value, self.patch_embed.grid_size, self.extra) if name == "pos_embed" else value

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens (B, E + H * W, C) of images (B, in_chans, h, w) with positions added, and (H, W)."""
        x = self.patch_embed(x)
        size, x = (x.shape[1], x.shape[2]), x.flatten(1, 2)
        extra = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.dist_token) if token is not None]
        x = torch.cat([*extra, x], dim=1)
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
        """Return the final tokens and the maps (B, C, H, W) after the blocks `indices` (timm's interface).

        Args:
            x: Images (B, in_chans, h, w).
            indices: Indices of blocks, or the number of last blocks; None means all.
            norm: Apply the final norm to the maps.
            stop_early: Skip the blocks after the last index.
            output_fmt: "NCHW" only.
            intermediates_only: Return the list of maps only.

        Raises:
            ValueError: `output_fmt` is not "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', not {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        x, intermediates, sizes = self.run(x, take, last + 1 if stop_early else None)
        if norm:
            intermediates = [self.norm(tokens) for tokens in intermediates]
        maps = [
            to_channels_last(tokens[:, self.extra :].unflatten(1, size).permute(0, 3, 1, 2))
            for tokens, size in zip(intermediates, sizes, strict=True)
        ]
        return maps if intermediates_only else (self.finish(x), maps)

    def run(
        self, x: Tensor, take: Sequence[int] = (), blocks: int | None = None, losses: Losses | None = None, **options
    ) -> tuple[Tensor, list[Tensor], list[tuple[int, int]]]:
        """Run images (B, in_chans, h, w) through the patch embedding and the first `blocks` blocks; None means all.

        Auxiliary losses of the ops are added to `losses`; `options` are arguments of all blocks.

        Returns:
            The tokens (B, E + H * W, C) after the last block, a list of the tokens after each block of `take`, and a
            list of the sizes (H, W) of their maps.
        """
        intermediates, sizes = [], []
        x, size = self.embed(x)
        contexts = [module(x[:, self.extra :].unflatten(1, size)) for module in self.contexts]
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        for i, block in enumerate(list(self.blocks)[:blocks]):
            index = self.context_indices[i]
            context = options if index is None else options | {"context": contexts[index]}
            attended = losses is not None and losses.wants_attention and i == len(self.blocks) - 1
            own = losses if self.have_losses[i] or attended else None
            x = run_block(block, x, size, recompute=recompute, losses=own, **context)
            if x.shape[1] != self.extra + size[0] * size[1]:
                size = self.reduced_size(size, x.shape[1] - self.extra)
            if i in take:
                intermediates.append(x)
                sizes.append(size)
        return x, intermediates, sizes

    def reduced_size(self, size: tuple[int, int], tokens: int) -> tuple[int, int]:
        """Return the size of a map of `size` of which a block has left so many tokens: one row."""
        return 1, tokens

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the parts that the maps after the blocks `indices` do not need (timm's interface).

        Returns:
            The indices, counted from 0.
        """
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = nn.Sequential(*list(self.blocks)[: last + 1])
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head or last + 1 < len(self.feature_info):
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor, losses: Losses | None = None) -> Tensor:
        """Compute the final tokens (B, E + H * W, C)."""
        x = self.run(x, losses=losses)[0]
        features = self.finish(x)
        if losses is not None:
            self.compare_tokens(x, features, losses)
        return features

    def compare_tokens(self, x: Tensor, features: Tensor, losses: Losses) -> None:
        """If there are a teacher's tokens, add the mean squared distance of the map's final tokens from them.

        Args:
            x: Tokens after the last block. Pruned ones are vectors of zeros and do not count.
            features: Final tokens.
            losses: Has the teacher's tokens as `target`, and receives the loss `tokens`.

        Raises:
            ValueError: The teacher's tokens have another shape.
        """
        if losses.target is None:
            return
        tokens, target = self.distillation_tokens(features), losses.target
        if tokens.shape != target.shape:
            shapes = " and ".join(str(tuple(t.shape)) for t in (tokens, target))
            raise ValueError(f"student and teacher must have tokens of one shape (B, N, C), not {shapes}")
        alive = (x[:, self.extra :] != 0).any(-1)
        losses.add("tokens", ((tokens - target).square().mean(-1) * alive).sum() / alive.sum())

    def map_tokens(self, features: Tensor) -> Tensor:
        return features[:, self.extra :]

    def distillation_tokens(self, features: Tensor) -> Tensor:
        """Return what token distillation compares, of the final tokens: those of the map (B, N, C)."""
        return self.map_tokens(features)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Pool the tokens and classify them, (B, num_classes); `pre_logits` returns what the classifier reads.

        With `distilled_training` and in training mode the scores of both classifiers are returned.
        """
        if self.dist_token is None:
            return super().forward_head(x, pre_logits)
        pooled = self.head_drop(self.global_pool(x))
        if pooled.ndim == 3:
            return pooled if pre_logits else self.head(pooled)
        token = self.head_drop(x[:, 1])
        if pre_logits:
            return (pooled + token) / 2
        scores, distilled = self.head(pooled), self.head_dist(token)
        return (scores, distilled) if self.training and self.distilled_training else (scores + distilled) / 2

    def finish(self, x: Tensor) -> Tensor:
        """Return the final tokens; `x` are those after the last block."""
        return self.norm(x)
