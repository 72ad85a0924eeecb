"""Equal budgets: the width or depth at which a net with another op has the MACs or the parameters of a given net."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from models import complexity, create_model

# Steps of a width in channels; the smallest one is taken that the heads and the op permit.
WIDTH_STEPS = range(2, 130, 2)
# Narrowest and widest net that is looked at, relative to the net as it is.
NARROWEST, WIDEST = 1 / 4, 4


class Setting(NamedTuple):
    """The quantity that is counted, and the images for which it is.

    Attributes:
        quantity: `macs` or `params`; the classifier does not count.
        image_size: (height, width) of the images in pixels.
        in_chans: Channels of the images.
    """

    quantity: str
    image_size: tuple[int, int]
    in_chans: int


def build(model: Mapping[str, Any], setting: Setting) -> nn.Module:
    """Build a net without its classifier on the meta device; `model` is the section `model` of a config."""
    with torch.device("meta"):
        return create_model(model, num_classes=0, in_chans=setting.in_chans, img_size=setting.image_size)


def cost(model: Mapping[str, Any], setting: Setting) -> int:
    """Return the MACs or the parameters of a net; `model` is the section `model` of a config."""
    params, macs = complexity(build(model, setting), setting.image_size, setting.in_chans)
    return macs if setting.quantity == "macs" else params


def match(model: Mapping[str, Any], setting: Setting, budget: int, adjust: str) -> dict[str, Any]:
    """Return the arguments, such as `{"dim": 40}`, with which a net comes closest to the budget.

    Args:
        model: Section `model` of a config, with the op for which the arguments are chosen.
        setting: What is counted.
        budget: The MACs or parameters to come close to.
        adjust: `width`, the channels of all stages, or `depth`, the blocks of the stage that has the most.

    Raises:
        ValueError: The net has no argument for its width or its depth.
    """
    net = build(model, setting)
    arguments = _arguments(type(net))
    dims = [info["num_chs"] for info in getattr(net, "feature_info", ())]

    def choose(number: int) -> dict[str, Any]:
        """Return the arguments for a width or for a depth of the deepest stage."""
        if adjust == "depth":
            return {"depths": [number if i == deepest else depth for i, depth in enumerate(depths)]}
        if "dim" in arguments:
            return {"dim": number}
        return {"dims": [_exact(dim * number, dims[0]) for dim in dims]}

    def cost_of(number: int) -> int:
        return cost({**model, "args": {**(model.get("args") or {}), **choose(number)}}, setting)

    if adjust == "depth" and "depths" in arguments:
        depths = [len(stage.blocks) for stage in getattr(net, "stages", [net])]
        deepest = depths.index(max(depths))
        return choose(_nearest(cost_of, depths[deepest], 1, budget, power=1))
    if adjust == "width" and dims and {"dim", "dims"} & arguments:
        step = _smallest_step(cost_of, dims[0])
        return choose(_nearest(cost_of, dims[0], step, budget, power=2))
    raise ValueError(f"{type(net).__name__} has no argument for its {adjust}: it takes {', '.join(sorted(arguments))}")


def _arguments(net: type) -> set[str]:
    """Return the names of the arguments that a class and its base classes take."""
    constructors = [vars(cls)["__init__"] for cls in net.__mro__ if "__init__" in vars(cls) and cls is not object]
    return {name for constructor in constructors for name in inspect.signature(constructor).parameters} - {"self"}


def _exact(product: int, divisor: int) -> int:
    if product % divisor:
        raise ValueError(f"{product} is no multiple of {divisor}")
    return product // divisor


def _smallest_step(cost_of: Callable[[int], int], width: int) -> int:
    """Return the smallest step by which a width can grow: one that the heads and the op permit."""
    for step in WIDTH_STEPS:
        try:
            cost_of(width + step)
        except (ValueError, RuntimeError):
            # The heads do not divide the channels, or the op refuses channels of a head.
            continue
        return step
    raise ValueError(f"no width near {width} channels is permitted")


def _nearest(cost_of: Callable[[int], int], start: int, step: int, budget: int, power: int) -> int:
    """Return the width or depth whose cost is closest to the budget, relative to it.

    Args:
        cost_of: Cost of a width or depth.
        start: The number of the net as it is.
        step: All numbers are `start` plus a multiple of the step.
        budget: The cost to come close to.
        power: Cost grows about with this power of the number.
    """
    lowest = start - int((1 - NARROWEST) * start / step) * step
    highest = WIDEST * start
    costs: dict[int, int] = {}
    number = start
    while number not in costs:
        costs[number] = cost_of(number)
        wanted = number * (budget / costs[number]) ** (1 / power)
        number = max(lowest, start + step * round((min(wanted, highest) - start) / step))
    # The estimate may stop one step beside the best number.
    for neighbour in (number - step, number + step):
        if lowest <= neighbour <= highest and neighbour not in costs:
            costs[neighbour] = cost_of(neighbour)
    return min(costs, key=lambda number: abs(math.log(costs[number] / budget)))
