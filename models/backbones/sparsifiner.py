"""Sparsifiner: DeiT with attention along a predicted sparse pattern (Wei et al., CVPR 2023, arXiv:2303.13755).

Paper: Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers. Written after the
paper and the authors' repository, lim142857/Sparsifiner (MIT); its checkpoints load. The authors fine-tune DeiT's or
LV-ViT's weights in two phases, the second with the same net as the teacher (`phase`).
"""

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from models import plain
from models.backbones.deit import DeiT, deit_cfg
from models.backbones.lvvit import MEDIUM, SMALL, LVViT, lvvit_cfg
from ops.attention.sparsifiner import SparsifinerAttention
from ops.registry import Spec
from retinue.utils.arithmetic import ceil_div


class Block(plain.Block):
    """ViT's block, whose op may prune tokens of the map: a pruned token is a vector of zeros in all later blocks.

    Attributes:
        keep_tokens: Share of all tokens of the map that are left after this block; None prunes none.
        alive_share: Share of them that earlier blocks have left; None if neither this block nor an earlier one prunes.
    """

    keep_tokens: float | None = None
    alive_share: float | None = None

    def forward(self, x: Tensor, size: Sequence[int], **context) -> Tensor:
        if self.alive_share is None:
            return super().forward(x, size, **context)
        E = x.shape[1] - size[0] * size[1]
        alive = (x[:, E:] != 0).any(-1)
        limit = ceil(self.alive_share * alive.shape[1])
        mixer: Any = self.mixer
        mixed, weights = mixer.attend(self.norm1(x), tuple(size), alive=alive, limit=limit, **context)
        x = self.add(x, mixed)
        x = self.add(x, self.mlp(self.norm2(x)))
        if self.keep_tokens is not None:
            scores = weights[:, :, 0, E:].mean(1).masked_fill(~alive, -torch.inf)
            kept = scores.topk(ceil(self.keep_tokens * scores.shape[1]), sorted=False).indices
            alive = torch.zeros_like(alive).scatter(1, kept, True)
        return torch.cat([x[:, :E], x[:, E:].masked_fill(~alive.unsqueeze(-1), 0)], dim=1)


class Sparsifiner(DeiT):
    """DeiT with sparse attention, and on request with fewer tokens in later blocks.

    Weights of a plain DeiT load, except for the phase "net", which needs trained predictors.

    Args:
        keep: Share of all tokens that each token attends to.
        phase: Phase of the paper's training. "predictors": only the predictors learn, by the loss connectivity; each
            token attends to all tokens, and none is pruned. "net": all other weights learn, without this loss. By
            default all weights learn at once.
        keep_tokens: Share of the tokens that is left after each block of `prune_at`: this number, its square, ...; 1
            prunes none.
        prune_at: Indices of the blocks that prune tokens.
        depths: As in `PlainBackbone`.
        img_size: As in `PlainBackbone`.
        patch: As in `PlainBackbone`.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: the op "sparsifiner".
        **kwargs: Further arguments of `DeiT`.

    Raises:
        ValueError: `keep_tokens` is out of its range, `phase` is unknown, or a block of `prune_at` does not exist or
            has another op.
    """

    block = Block

    def __init__(
        self,
        keep: float = 0.25,
        phase: str | None = None,
        keep_tokens: float = 1.0,
        prune_at: Sequence[int] = (3, 6, 9),
        depths: Sequence[int] = (12,),
        img_size: int | tuple[int, int] = 224,
        patch: int = 16,
        mixers: Spec | Sequence | None = None,
        **kwargs,
    ):
        if mixers is None:
            sides = (img_size, img_size) if isinstance(img_size, int) else img_size
            size = [ceil_div(side, patch) for side in sides]
            # In the first phase the predictors learn from the attention to all tokens.
            keep = 1.0 if phase == "predictors" else keep
            mixers = {"name": "sparsifiner", "keep": keep, "size": size, "qkv_bias": self.qkv_bias}
        super().__init__(img_size=img_size, patch=patch, depths=depths, mixers=mixers, **kwargs)
        if phase not in (None, "predictors", "net"):
            raise ValueError(f"phase must be predictors, net or null, not {phase!r}")
        self.phase = phase
        if phase == "net":
            self.have_losses = [False] * len(self.blocks)
            for part in self.modules():
                if isinstance(part, SparsifinerAttention):
                    part.loss_weights = ()
        for name, parameter in self.named_parameters() if phase else ():
            parameter.requires_grad_((".mask_predictor." in name) == (phase == "predictors"))
        if not 0 < keep_tokens <= 1:
            raise ValueError(f"keep_tokens must be a share above 0 and at most 1, not {keep_tokens}")
        if keep_tokens == 1 or phase == "predictors":
            return
        blocks: list[Any] = list(self.blocks)
        for number, i in enumerate(sorted(prune_at), start=1):
            if not 0 <= i < len(blocks):
                raise ValueError(f"prune_at must be indices of {len(blocks)} blocks, not {list(prune_at)}")
            blocks[i].keep_tokens = keep_tokens**number
        share = 1.0
        for block in blocks[min(prune_at, default=len(blocks)) :]:
            if not isinstance(block.mixer, SparsifinerAttention) or not self.extra:
                raise ValueError("pruning needs the op sparsifiner and a class token: keep_tokens=1 prunes no tokens")
            block.alive_share = share
            share = share if block.keep_tokens is None else block.keep_tokens

    @property
    def optional_weights(self) -> set[str]:
        """Names of the predictors' weights, which DeiT's checkpoints lack."""
        return set() if self.phase == "net" else {name for name in self.state_dict() if ".mask_predictor." in name}


class SparsifinerLVViT(Sparsifiner, LVViT):
    """LV-ViT with sparse attention."""


default_cfgs = generate_default_cfgs(
    {f"sparsifiner_{size}": deit_cfg("") for size in ("small", "base")}
    | {f"sparsifiner_lvvit_{size}": lvvit_cfg() for size in ("small", "medium")}
)


@register_model
def sparsifiner_small(pretrained: bool = False, **kwargs) -> Sparsifiner:
    return Sparsifiner.build("sparsifiner_small", pretrained, **{"dim": 384, "heads": 6} | kwargs)


@register_model
def sparsifiner_base(pretrained: bool = False, **kwargs) -> Sparsifiner:
    return Sparsifiner.build("sparsifiner_base", pretrained, **kwargs)


@register_model
def sparsifiner_lvvit_small(pretrained: bool = False, **kwargs) -> SparsifinerLVViT:
    return SparsifinerLVViT.build("sparsifiner_lvvit_small", pretrained, **SMALL | kwargs)


@register_model
def sparsifiner_lvvit_medium(pretrained: bool = False, **kwargs) -> SparsifinerLVViT:
    return SparsifinerLVViT.build("sparsifiner_lvvit_medium", pretrained, **MEDIUM | kwargs)
