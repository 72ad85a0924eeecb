"""Put a reduction of tokens into a ViT-shaped net, ours or timm's, without a change of its weights."""

from dataclasses import dataclass
from typing import Any

import torch
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.plain import PlainBackbone
from models.reduction.blocks import BLOCKS
from models.reduction.groups import ForwardPass
from models.reduction.registry import NONE, Spec, create_reduction


@dataclass(eq=False)
class WholeMaps:
    """`forward_intermediates` of a net with a reduction: its maps have all tokens.

    A merged token has the values of its group's token, and a dropped token keeps the values with which it was dropped.
    The final tokens are those that are left, as `forward_features` returns them.
    """

    net: Any
    forward_pass: ForwardPass
    extra: int
    restores: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.forward_pass.whole = True
        try:
            outputs = type(self.net).forward_intermediates(self.net, *args, **kwargs)
        finally:
            self.forward_pass.whole = False
        groups = self.forward_pass.groups
        if not isinstance(outputs, tuple) or self.restores or not groups:
            return outputs
        x, maps = outputs
        left = groups[max(groups)].select(x[:, self.extra :])
        return torch.cat([x[:, : self.extra], left], dim=1), maps


def insert_reduction(net: nn.Module, spec: Spec) -> None:
    """Let the last blocks of a net reduce tokens.

    From the first block that reduces tokens on, the blocks must have full attention, since the tokens that are left are
    no map. A reduction that reduces nothing, such as ToMe with r=0, leaves the net as it is.

    Args:
        net: The net, which is changed in place; also one that timm has wrapped in a `FeatureGetterNet`.
        spec: Reduction, as `create_reduction` reads it, or "none".

    Raises:
        ValueError: The net cannot reduce its tokens, a name or an argument is unknown, or a value is out of its range.
    """
    if spec == NONE:
        return
    inner: Any = net.model if isinstance(net, FeatureGetterNet) else net
    kind = type(inner).__name__
    if not isinstance(inner, PlainBackbone | VisionTransformer):
        raise ValueError(f"{kind} takes no reduction: its tokens must stay a map. Nets such as deit take one")
    blocks: Any = inner.blocks
    first = len(blocks)
    while first and any(cls.takes(blocks[first - 1]) for cls in BLOCKS):
        first -= 1
    fits = first < len(blocks)
    # A net of maps may have lost its last blocks, which the reduction's defaults count.
    depth = len(inner.feature_info)
    reduction = create_reduction(spec, first if fits else 0, depth)
    reduce_at = reduction.reduce_at
    if not reduce_at:
        return
    if not fits:
        raise ValueError(f"{kind} takes no reduction: its last block must be a ViT's, with full attention and no bias")
    extra = inner.extra if isinstance(inner, PlainBackbone) else inner.num_prefix_tokens
    if reduction.needs_class_token and getattr(inner, "cls_token", None) is None:
        name = spec if isinstance(spec, str) else spec["name"]
        raise ValueError(f"reduction {name} needs a class token, which {kind} does not have here; tome needs none")
    if not all(isinstance(i, int) and first <= i < depth for i in reduce_at):
        which = f"from {first} to {depth - 1}, which have full attention" if first else f"from 0 to {depth - 1}"
        raise ValueError(f"reduce_at must be indices of blocks {which}, not {list(reduce_at)}")
    forward_pass = ForwardPass()
    for i in range(reduce_at[0], len(blocks)):
        cls = next(cls for cls in BLOCKS if cls.takes(blocks[i]))
        blocks[i] = cls(blocks[i], i, extra, reduction, forward_pass, last=i == len(blocks) - 1)
    inner.forward_intermediates = WholeMaps(inner, forward_pass, extra, reduction.restores)
