"""Key-driven grouped-query attention (KDGQA) in ViTs (Khan et al., 2024, arXiv:2408.08454).

Paper: Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention. Written after the paper and the authors'
repository, Zohaib-Khan5040/key-driven-gqa (MIT). The authors train from ImageNet weights of plain ViTs, whose keys and
values are averaged over the heads of a group; `load_weights` does this with the weights of timm's and DeiT's nets.
"""

import re
from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models.backbones.deit import DeiT, deit_cfg
from models.hierarchical import init_as_pytorch
from ops.registry import Spec


class KeyDrivenGQA(DeiT):
    """ViT's layout with grouped-query attention.

    Args:
        kv_heads: Number of key and value heads; as many as `heads` give multi-head attention.
        allocation: How query heads are shared out, as in op `grouped_query`: by default "batch_key_norm", the authors'
            KDGQA; "uniform" is GQA, "key_average" and "key_change" are DGQA.
        noise: Subtract noise from the heads' outputs, as in op `grouped_query`; with "uniform" this is PGQA.
        mixers: Token mixers in place of grouped-query attention, as `ops.parse_mixers` reads them.
        **kwargs: Further arguments of `PlainBackbone`.
    """

    def __init__(
        self,
        kv_heads: int = 3,
        allocation: str = "batch_key_norm",
        noise: bool = False,
        mixers: Spec | Sequence | None = None,
        **kwargs,
    ):
        op = {"name": "grouped_query", "kv_heads": kv_heads, "allocation": allocation, "noise": noise}
        super().__init__(mixers=op if mixers is None else mixers, **kwargs)
        self.apply(init_as_pytorch)
        if self.pos_embed is not None:
            nn.init.normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)

    @property
    def optional_weights(self) -> set[str]:
        """Names of the allocation in use by DGQA, which the authors' checkpoints lack."""
        return {name for name, _ in self.named_buffers() if re.search(r"\.mixer\.(groups|passes)$", name)}

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay; the authors decay positions and the class token too."""
        return super().no_weight_decay() - {"pos_embed", "cls_token"}

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights under our names; multi-head keys and values are averaged over each group of heads."""
        result = {}
        for name, value in super().checkpoint_filter(state).items():
            block = re.match(r"blocks\.(\d+)\.mixer\.qkv\.", name)
            mixer: Any = self.blocks[int(block[1])].mixer if block else None
            if not hasattr(mixer, "kv_heads"):
                result[name] = value
                continue
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                if letter != "q":
                    heads = part.unflatten(0, (mixer.num_heads, -1))
                    # (groups, heads of a group, channels of a head, ...)
                    part = heads.unflatten(0, (mixer.kv_heads, -1)).mean(1).flatten(0, 1)
                result[name.replace(".qkv.", f".{letter}.")] = part
        return result


default_cfgs = generate_default_cfgs({f"kdgqa_{size}": deit_cfg("") for size in ("small", "base", "large")})


@register_model
def kdgqa_small(pretrained: bool = False, **kwargs) -> KeyDrivenGQA:
    return KeyDrivenGQA.build("kdgqa_small", pretrained, **{"dim": 384, "heads": 6} | kwargs)


@register_model
def kdgqa_base(pretrained: bool = False, **kwargs) -> KeyDrivenGQA:
    return KeyDrivenGQA.build("kdgqa_base", pretrained, **kwargs)


@register_model
def kdgqa_large(pretrained: bool = False, **kwargs) -> KeyDrivenGQA:
    arguments = {"dim": 1024, "heads": 16, "kv_heads": 4, "depths": (24,)}
    return KeyDrivenGQA.build("kdgqa_large", pretrained, **arguments | kwargs)
