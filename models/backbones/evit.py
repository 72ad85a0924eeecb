"""EViT: Expediting Vision Transformers via Token Reorganizations (Liang et al., ICLR 2022, arXiv:2202.07800).

Paper: Not All Patches Are What You Need. Written after the paper and the authors' repository, youweiliang/evit
(Apache-2.0); its checkpoints load. The repository lacks the paper's nets in LV-ViT's layout: these drop tokens before a
quarter, a half and three quarters of their depth, as the others do. Training begins with all tokens in the paper; here
a net keeps its share from the start.
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
from ops.attention.full import FullAttention
from ops.functional import merge_heads, split_heads


class Block(plain.Block):
    """ViT's block, which may drop the tokens to which the class token pays the least attention.

    Attributes:
        keep: Share of the map's tokens that are left after the attention; 1 keeps all.
        fuse: Add the dropped tokens, weighted by the attention of the class token, as one more token.
    """

    keep = 1.0
    fuse = True

    def forward(self, x: Tensor, size: Sequence[int], whole: bool = False, **context) -> Tensor:
        """Return (B, E + N', C); `whole` keeps all tokens."""
        if whole or self.keep == 1:
            return super().forward(x, size, **context)
        N = size[0] * size[1]
        mixed, weights = self.attend(self.norm1(x))
        x = self.reorganize(self.add(x, mixed), weights[:, :, 0, -N:].mean(1))
        return self.add(x, self.mlp(self.norm2(x)))

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Apply full attention to tokens (B, E + N, C); also return the attention (B, heads, E + N, E + N)."""
        mixer: Any = self.mixer
        q, k, v = split_heads(mixer.qkv(x), 3 * mixer.num_heads).chunk(3, dim=1)
        scale = mixer.softmax.scale(k.shape[-2])
        weights = (q * scale @ k.transpose(-2, -1)).softmax(-1)
        return mixer.proj(merge_heads(weights @ v)), weights

    def reorganize(self, x: Tensor, scores: Tensor) -> Tensor:
        """Return the extra tokens, the tokens with the highest scores in descending order, and the fused token.

        Args:
            x: Tokens (B, E + N, C).
            scores: Attention of the class token to the last N, (B, N).
        """
        extra, others = x[:, : -scores.shape[1]], x[:, -scores.shape[1] :]
        indices = scores.topk(ceil(self.keep * scores.shape[1]), dim=1).indices
        kept = others.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        if not self.fuse or kept.shape[1] == others.shape[1]:
            return torch.cat([extra, kept], dim=1)
        dropped = scores.scatter(1, indices, 0).to(x.dtype)
        return torch.cat([extra, kept, dropped.unsqueeze(1) @ others], dim=1)


class EViT(DeiT):
    """DeiT whose tokens become fewer with depth.

    Maps, as of `features_only`, are computed with all tokens, and so without fused ones.

    Args:
        keep: Share of the map's tokens that each block of `reduce_at` keeps, above 0 and at most 1.
        fuse: Fuse the dropped tokens to one token.
        reduce_at: Indices of the blocks that drop tokens. By default those before a quarter, a half and three quarters
            of the depth, which are 3, 6 and 9 in the paper's nets.
        depths: As in `PlainBackbone`.
        **kwargs: Further arguments of `DeiT`; the ops of the blocks that drop tokens must be "full".

    Raises:
        ValueError: `keep` is out of its range, or a block of `reduce_at` does not exist or has another op.
    """

    block = Block

    def __init__(
        self,
        keep: float = 0.7,
        fuse: bool = True,
        reduce_at: Sequence[int] | None = None,
        depths: Sequence[int] = (12,),
        **kwargs,
    ):
        super().__init__(depths=depths, **kwargs)
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be a share of the tokens above 0 and at most 1, not {keep}")
        depth = len(self.blocks)
        reduce_at = [depth * i // 4 for i in (1, 2, 3)] if reduce_at is None else reduce_at
        for i in reduce_at:
            if not 0 <= i < depth:
                raise ValueError(f"reduce_at must be indices of {depth} blocks, not {list(reduce_at)}")
            block: Any = self.blocks[i]
            if type(block.mixer) is not FullAttention or block.mixer.softmax.bias is not None or not self.extra:
                raise ValueError(
                    f"block {i} needs full attention and a class token, and no bias, to drop tokens: "
                    "reduce_at=[] drops none"
                )
            block.keep, block.fuse = keep, fuse

    def forward_intermediates(self, x: Tensor, *args, intermediates_only: bool = False, **kwargs) -> Any:
        maps = super().forward_intermediates(x, *args, intermediates_only=True, **kwargs)
        return maps if intermediates_only else (self.forward_features(x), maps)

    def run(self, x: Tensor, take: Sequence[int] = (), *args, **kwargs) -> Any:
        return super().run(x, take, *args, **({"whole": True} if take else {}), **kwargs)


class EViTLVViT(EViT, LVViT):
    """LV-ViT whose tokens become fewer with depth."""


default_cfgs = generate_default_cfgs(
    {f"evit_{size}": deit_cfg("") for size in ("small", "base")}
    | {f"evit_lvvit_{size}": lvvit_cfg() for size in ("small", "medium")}
)


@register_model
def evit_small(pretrained: bool = False, **kwargs) -> EViT:
    return EViT.build("evit_small", pretrained, **{"dim": 384, "heads": 6} | kwargs)


@register_model
def evit_base(pretrained: bool = False, **kwargs) -> EViT:
    return EViT.build("evit_base", pretrained, **kwargs)


@register_model
def evit_lvvit_small(pretrained: bool = False, **kwargs) -> EViTLVViT:
    return EViTLVViT.build("evit_lvvit_small", pretrained, **SMALL | kwargs)


@register_model
def evit_lvvit_medium(pretrained: bool = False, **kwargs) -> EViTLVViT:
    return EViTLVViT.build("evit_lvvit_medium", pretrained, **MEDIUM | kwargs)
