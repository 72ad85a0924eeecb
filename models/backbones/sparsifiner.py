"""Sparsifiner: DeiT with attention along a predicted sparse pattern (Wei et al., CVPR 2023, arXiv:2303.13755).

Paper: Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers. Written after the
paper and the authors' repository, lim142857/Sparsifiner (MIT); its checkpoints load. The authors fine-tune DeiT's
weights in two phases with DeiT as the teacher; here the predictors learn beside the net.
"""

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from models import plain
from models.backbones.deit import DeiT, deit_cfg
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
        alive = (x[:, 1:] != 0).any(-1)
        limit = ceil(self.alive_share * alive.shape[1])
        mixer: Any = self.mixer
        mixed, weights = mixer.attend(self.norm1(x), tuple(size), alive=alive, limit=limit, **context)
        x = x + self.drop_path(mixed)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        if self.keep_tokens is not None:
            scores = weights[:, :, 0, 1:].mean(1).masked_fill(~alive, -torch.inf)
            kept = scores.topk(ceil(self.keep_tokens * scores.shape[1]), sorted=False).indices
            alive = torch.zeros_like(alive).scatter(1, kept, True)
        return torch.cat([x[:, :1], x[:, 1:].masked_fill(~alive.unsqueeze(-1), 0)], dim=1)


class Sparsifiner(DeiT):
    """DeiT with sparse attention, and on request with fewer tokens in later blocks.

    Args:
        keep: Share of all tokens that each token attends to.
        keep_tokens: Share of the tokens that is left after each block of `prune_at`: this number, its square, ...; 1
            prunes none.
        prune_at: Indices of the blocks that prune tokens.
        depths: As in `PlainBackbone`.
        img_size: As in `PlainBackbone`.
        patch: As in `PlainBackbone`.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: the op "sparsifiner".
        **kwargs: Further arguments of `DeiT`.

    Raises:
        ValueError: `keep_tokens` is out of its range, or a block of `prune_at` does not exist or has another op.
    """

    block = Block

    def __init__(
        self,
        keep: float = 0.25,
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
            mixers = {"name": "sparsifiner", "keep": keep, "size": [ceil_div(side, patch) for side in sides]}
        super().__init__(img_size=img_size, patch=patch, depths=depths, mixers=mixers, **kwargs)
        if not 0 < keep_tokens <= 1:
            raise ValueError(f"keep_tokens must be a share above 0 and at most 1, not {keep_tokens}")
        if keep_tokens == 1:
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


default_cfgs = generate_default_cfgs({f"sparsifiner_{size}": deit_cfg("") for size in ("small", "base")})


@register_model
def sparsifiner_small(pretrained: bool = False, **kwargs) -> Sparsifiner:
    return Sparsifiner.build("sparsifiner_small", pretrained, **{"dim": 384, "heads": 6} | kwargs)


@register_model
def sparsifiner_base(pretrained: bool = False, **kwargs) -> Sparsifiner:
    return Sparsifiner.build("sparsifiner_base", pretrained, **kwargs)
