"""Attention modules of a net: which layers return their values and read their weighted sums, and their calls."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ops.registry import FAMILIES
from ops.weighting import WeightedSums
from retinue.evaluation.sight.blocks import token_grid

# Name of the layer that computes the values -> number of equal parts of its output, of which the last are the values.
VALUE_LAYERS = {"qkv": 3, "kv": 2, "v": 1, "value": 1, "to_v": 1, "v_proj": 1, "qkvs": 3}
# Names of the layer that reads the heads' outputs.
OUTPUT_LAYERS = ("proj", "out", "to_out", "output", "out_proj", "o_proj")
# Families of ops that have no attention, whatever their layers are called.
WITHOUT_ATTENTION = ("convolution", "channel")


@dataclass
class Call:
    """Call of an attention module in a forward pass of one image.

    Attributes:
        module: Module that reads the map: the attention module, or one around it if it reads windows of the map.
        args: Arguments of `module`; the first is a map (1, H, W, C) or tokens (1, E + H * W, C).
        kwargs: Its further arguments.
        size: Size (H, W) of the map.
        extra: Number of extra tokens E.
        attention: The attention module; by default `module`.
    """

    module: Any
    args: tuple
    kwargs: dict[str, Any]
    size: tuple[int, int]
    extra: int
    attention: Any = None

    def __post_init__(self) -> None:
        self.attention = self.module if self.attention is None else self.attention

    def token(self, y: float, x: float) -> int:
        """Return the index of the token at shares of the height and width from 0 up to 1; extra tokens come first."""
        H, W = self.size
        return self.extra + min(int(y * H), H - 1) * W + min(int(x * W), W - 1)


def value_layers(module: Any) -> list[tuple[nn.Linear, int]]:
    """Return the layers that compute a module's values, each with the number of its last channels that are values.

    An op names them in `value_layers`, or they have one of the usual names. Queries, keys and values have equally many
    channels, unless the module states their numbers in `widths`.
    """
    found = []
    for name in getattr(module, "value_layers", VALUE_LAYERS):
        layer = getattr(module, name, None)
        parts = VALUE_LAYERS[name if name in VALUE_LAYERS else name.rsplit("_", 1)[-1]]
        layers = layer if isinstance(layer, nn.ModuleList) else [layer]
        found += [(each, _width(each, parts, module)) for each in layers if isinstance(each, nn.Linear)]
    return found


def _width(layer: nn.Linear, parts: int, holder: Any) -> int:
    widths = list(getattr(holder, "widths", []))
    return widths[-1] if sum(widths) == layer.out_features else layer.out_features // parts


def output_layers(module: Any) -> Sequence[nn.Module]:
    """Return the marks of a module's weighted sums, or the layers that read them."""
    marks = [part for part in module.modules() if isinstance(part, WeightedSums)]
    if marks:
        return marks
    names: Sequence[str] = getattr(module, "output_layers", OUTPUT_LAYERS)
    layers = [layer for name in names if isinstance(layer := getattr(module, name, None), (nn.Linear, nn.Identity))]
    return layers if hasattr(module, "output_layers") else layers[:1]


def count_heads(module: nn.Module) -> int:
    """Return the number of heads of an attention module, or of all its parts that have heads; else 1."""
    for name in ("num_heads", "heads"):
        heads = getattr(module, name, None)
        if isinstance(heads, int):
            return heads
        if isinstance(heads, (list, tuple)):
            return sum(heads)
    return sum(getattr(part, "num_heads", 0) for part in module.modules()) or 1


def find_attention(net: nn.Module) -> list[str]:
    """Return the names of the modules that have values and weighted sums: layers of the usual names, or marks."""
    return [name for name, module in net.named_modules() if _has_attention(module)]


def _has_attention(module: nn.Module) -> bool:
    marks = [part for part in module.modules() if isinstance(part, WeightedSums)]
    if marks:
        return any(part in marks for part in module.children())
    return bool(value_layers(module) and output_layers(module))


@torch.no_grad()
def capture(net: Any, image: Tensor) -> dict[str, Call]:
    """Run one image (1, C, h, w), and return the calls of all attention modules and of all other ops by name.

    The module that reads the map is the attention module itself, or the nearest one around it.

    Raises:
        ValueError: There is none.
    """
    calls: dict[str, Call] = {}
    found = find_attention(net)
    others = [
        name
        for name, module in net.named_modules()
        if hasattr(module, "family") and not any(f"{each}.".startswith(f"{name}.") for each in found)
    ]

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            size = _size(net, module, args, image)
            if size is None:
                # A module inside this one may read a map of its own.
                return
            x, others = args[0], [value for value in args[1:] if isinstance(value, Tensor) and value.ndim == 3]
            extra = x.shape[1] - size[0] * size[1] if x.ndim == 3 else 0
            if x.ndim == 4 and others and getattr(module, "takes_extra", False):
                extra = others[0].shape[1]
            calls[name] = Call(module, args, kwargs, size, extra, net.get_submodule(name))

        return hook

    handles = []
    for name in [*found, *others]:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            # The hooks of the inner modules run later, so the innermost one that reads a map is kept.
            reader = net.get_submodule(".".join(parts[:length]))
            handles.append(reader.register_forward_pre_hook(keep(name), with_kwargs=True))
    try:
        net(image)
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise ValueError(
            f"{type(net).__name__} has no attention that can be shown: no module reads a map or its tokens, and has "
            f"linear layers for values ({', '.join(VALUE_LAYERS)}) and for the output ({', '.join(OUTPUT_LAYERS)})"
        )
    return {name: calls[name] for name in [*found, *others] if name in calls}


def _size(net: Any, module: nn.Module, args: tuple, image: Tensor) -> tuple[int, int] | None:
    """Return the size of the map that a module reads as its first argument, or None."""
    if not args or not isinstance(args[0], Tensor) or len(args[0]) != 1 or args[0].ndim not in (3, 4):
        return None
    x, image_size = args[0], (image.shape[2], image.shape[3])
    if x.ndim == 4 and hasattr(module, "family"):
        return x.shape[1], x.shape[2]
    with suppress(ValueError):
        grid = token_grid(net, x[..., 0].numel(), image_size)
        # A map must have this size, or it is not channels-last.
        return grid if x.ndim == 3 or grid == x.shape[1:3] else None
    return None


def refusal(module: Any) -> str | None:
    """Return why a module has no attention, if its family or its layers say so."""
    family = getattr(module, "family", None)
    if family in WITHOUT_ATTENTION:
        return f"it is of the family {family}: {FAMILIES[family]}"
    if not _has_attention(module):
        return "no layer computes values of tokens that are weighted"
    return None
