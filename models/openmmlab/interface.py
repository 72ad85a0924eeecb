"""Interface of detectors and segmentors for the tasks, timm's optimisers and `load_weights`."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from timm.models._manipulate import group_parameters
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from models.dense import DenseBackbone
from models.weights import apply_renames

# Prefix of the names of the net's parameters: `backbone` is the DenseBackbone, `net` the net in it.
NET_PREFIX = "backbone.net."
# Modules whose outputs (first pattern) or inputs (second pattern) become float32 in mixed precision. The packages'
# heads compute coordinates and resize logits in the type of their maps, and bfloat16 would round the coordinates in a
# large image to multiples of up to 8 pixels. mmdetection 2 and mmsegmentation 0 had `force_fp32` at these places.
FLOAT32_OUTPUT = re.compile(
    r"(rpn|bbox|mask|decode|panoptic)_head(\.\d+)?$|(cls|reg)_branches\.\d+$|rtm_reg\.\d+$|\.(value_proj|conv_seg|conv_reg)$"
)
FLOAT32_INPUT = re.compile(r"_roi_extractor(\.\d+)?$")


class DensePredictor(nn.Module):
    """Interface of a detector or a segmentor, a backbone under a head, for the tasks and for timm's optimisers.

    `mixed` makes a subclass of this class and of the package's class, so the net does not wrap the package's model but
    is one. Parameters and weights therefore have the names of the package's checkpoints. Hooks on the state dict of a
    wrapper would not suffice: Lightning restores a sharded net (FSDP) by the names of its parameters.

    Attributes:
        masks: Whether the net predicts instance masks.
        backbone: The backbone under the head.
        undecayed: Pattern of the names of head parameters without weight decay: Mask2Former's queries and levels,
            TransDAE's levels, and the biases of relative positions of WAU.
    """

    masks: bool
    backbone: DenseBackbone
    undecayed = re.compile(
        r"(decode|panoptic)_head\.(query_embed|query_feat|level_embed)\.|\.interaction\.level_embed$|\.position_bias$"
    )

    def keep_single_precision(self) -> None:
        """Let some modules compute in float32 in mixed precision.

        Call this once, after the net is built: it registers hooks.
        """
        for name, module in self.named_modules():
            if FLOAT32_OUTPUT.search(name):
                module.register_forward_hook(lambda _, args, output: to_float32(output))
            elif FLOAT32_INPUT.search(name):
                module.register_forward_pre_hook(lambda _, args: to_float32(args))

    @property
    def unused_weights(self) -> set[str]:
        """Names of weights that a checkpoint may hold and that this net does not use; for `load_weights`."""
        return {f"backbone.{name}" for name in self.backbone.unused_weights}

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename a checkpoint's weights to the names of this net; for `load_weights`.

        Args:
            state: Weights that we saved, or weights under the package's names; those of the backbone may have the names
                of the backbone's authors.
        """
        prefix = "backbone."
        backbone = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        head = {name: value for name, value in state.items() if not name.startswith(prefix)}
        renamed = self.backbone.checkpoint_filter(backbone)
        return {f"{prefix}{name}": value for name, value in renamed.items()} | apply_renames(self, head)

    def is_whole(self, names: Iterable[str]) -> bool:
        """Return whether weights with these names include a head like ours, rather than a backbone alone."""
        parts = {name.partition(".")[0] for name in self.state_dict()} - {"backbone"}
        return any(name.partition(".")[0] in parts for name in names)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass, which saves memory."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay: those that the net names, and the `undecayed`."""
        net = self.backbone.net
        names = {name for name, _ in self.named_parameters() if self.undecayed.search(name)}
        if _has_method(net, "no_weight_decay"):
            names |= {f"{NET_PREFIX}{name}" for name in net.no_weight_decay()}
        return names

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """Return the function from a parameter's name to its depth, for layer decay.

        The backbone's layers have the depths that the net's own `group_matcher` gives; all other parameters come after
        them (infinity).

        Args:
            coarse: Group the net's layers by stage rather than by block; for nets that distinguish the two.
        """
        net = self.backbone.net
        depths: Any = {}
        if _has_method(net, "group_matcher"):
            depths = group_parameters(net, net.group_matcher(coarse), reverse=True)
        return lambda name: depths.get(name.removeprefix(NET_PREFIX), torch.inf)


def mixed(interface: type[DensePredictor], package_class: type[nn.Module]) -> type[Any]:
    """Return a subclass of a package's class with the methods of `interface`, which call the package's by `super()`."""
    return type(interface.__name__, (interface, package_class), {})


def _has_method(net: nn.Module, name: str) -> bool:
    return callable(getattr(net, name, None))


def to_float32(values: Any) -> Any:
    """Convert tensors in half precision, alone or in tuples and lists, to float32; leave everything else unchanged."""
    return tree_map_only(
        Tensor, lambda tensor: tensor.float() if tensor.dtype in (torch.half, torch.bfloat16) else tensor, values
    )


def sum_losses(losses: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the packages' losses as scalars under shorter names.

    A loss is averaged over its entries and summed over a pyramid's levels, a cascade's stages (`s0.`, `s1.`) and a
    decoder's layers (`d0.`, `d1.`), whose prefixes are removed. Entries that are no losses, such as accuracies, are
    left out.

    Args:
        losses: Tensors, or lists of one tensor per level, by name.
    """
    totals: dict[str, Tensor] = {}
    for key, value in losses.items():
        name = re.sub(r"\b[ds]\d+\.", "", key)
        if "loss" not in name:
            continue
        levels = [value] if isinstance(value, Tensor) else value
        total = torch.stack([level.mean() for level in levels]).sum()
        totals[name] = totals.get(name, 0) + total
    return totals
