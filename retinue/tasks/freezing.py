"""Freezing: parts of a net that a training leaves as they are."""

import re
from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any

from timm.layers import norm as timm_norms
from timm.models._manipulate import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from models.openmmlab.interface import NET_PREFIX, DensePredictor
from models.weights import classifier_of
from retinue.utils.suggestions import nearest

NORMS = (
    _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
    timm_norms.RmsNorm, timm_norms.RmsNorm2d, timm_norms.SimpleNorm, timm_norms.SimpleNorm2d,
)  # fmt: skip
# Several consecutive parts, such as block1-8.
RANGE = re.compile(r"([a-z]+)(\d+)-(\d+)")


def freeze(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """Freeze parts of a net: their parameters take no gradient, and their modules compute as in evaluation.

    So batch norms keep their statistics, and dropout and drop path are off, also after `model.train()`. Under a head,
    the parts are those of the backbone without what only detectors and segmentors have, such as the maps' norms.

    Args:
        model: A classifier, a detector or a segmentor.
        parts: Names of parts, as `parts_of` returns them, or ranges of these, such as `block1-8`.

    Returns:
        Names of the outermost frozen modules, for `keep_in_evaluation`.

    Raises:
        ValueError: The net has no such part.
    """
    net, prefix = (model.backbone.net, NET_PREFIX) if isinstance(model, DensePredictor) else (model, "")
    known = parts_of(net)
    names = [name for part in parts for name in expand(part)]
    for name in names:
        if name not in known:
            raise ValueError(
                f"recipe.freeze: {type(net).__name__} has no part {name!r}.{nearest(name, known)} "
                f"There are: {', '.join(known)}"
            )
    frozen = set().union(*(known[name] for name in names))
    parameters = [parameter.requires_grad_(False) for name, parameter in net.named_parameters() if name in frozen]
    ids = {id(parameter) for parameter in parameters}
    modules: list[str] = []
    for name, module in net.named_modules(prefix=prefix.rstrip(".")):
        own = {id(parameter) for parameter in module.parameters()}
        if own and own <= ids and not name.startswith(tuple(f"{outer}." for outer in modules)):
            modules.append(name)
    keep_in_evaluation(model, modules)
    return modules


def expand(part: str) -> list[str]:
    """Return the parts of a range: block1 and block2 of `block1-2`, and a single part itself."""
    match = RANGE.fullmatch(part)
    if match is None:
        return [part]
    kind, first, last = match[1], int(match[2]), int(match[3])
    if last < first:
        raise ValueError(f"recipe.freeze: the range {part!r} is empty; did you mean '{kind}{last}-{first}'?")
    return [f"{kind}{number}" for number in range(first, last + 1)]


def parts_of(net: Any) -> dict[str, set[str]]:
    """Return the names of the parameters of each part of a net that can be frozen.

    The parts are `backbone` (all but the classifier), `norms`, `stem`, `stage1`, ... and `block1`, ..., where blocks
    are counted over all stages. A plain net has no stages. Stem, stages and blocks are the groups of the net's own
    `group_matcher`, as in layer decay.

    Args:
        net: A net with timm's interface.
    """
    names = [name for name, _ in net.named_parameters()]
    backbone = set(names) - classifier_of(net, names)
    norms = {
        f"{prefix}.{name}"
        for prefix, module in net.named_modules()
        if isinstance(module, NORMS)
        for name, _ in module.named_parameters(recurse=False)
    }
    stem, blocks = groups(net, coarse=False)
    _, stages = groups(net, coarse=True)
    parts = {"backbone": backbone, "norms": norms & backbone, "stem": stem & backbone}
    if len({level["reduction"] for level in net.feature_info}) > 1:
        parts |= {f"stage{i}": stage & backbone for i, stage in enumerate(stages, 1)}
    parts |= {f"block{i}": block & backbone for i, block in enumerate(blocks, 1)}
    return {name: members for name, members in parts.items() if members}


def groups(net: Any, coarse: bool) -> tuple[set[str], list[set[str]]]:
    """Return the names of the parameters before the first block, and those of each block or stage (`coarse`)."""
    matcher = net.group_matcher(coarse) if hasattr(net, "group_matcher") else None
    if not isinstance(matcher, dict):
        return set(), []
    # timm takes the first pattern that matches. Those of blocks have groups of numbers, that of a final norm has none.
    patterns = [
        (re.compile(pattern), kind)
        for kind, specification in matcher.items()
        for pattern, *_ in ([(specification,)] if isinstance(specification, str) else specification or ())
    ]
    stem, blocks = set(), []
    for group in group_parameters(net, matcher).values():
        matches = [next(((p.groups, kind) for p, kind in patterns if p.match(name)), (0, "")) for name in group]
        if any(numbers and kind != "stem" for numbers, kind in matches):
            blocks.append(set(group))
        elif not blocks:
            stem |= set(group)
    return stem, blocks


def keep_in_evaluation(model: nn.Module, names: Iterable[str]) -> None:
    """Put modules into evaluation mode for good: `train()` of them and of modules around them does not change this.

    Args:
        model: The net.
        names: Names of modules, whose inner modules are included.
    """
    for name in names:
        for module in model.get_submodule(name).modules():
            module.training = False
            module.train = MethodType(_stay_in_evaluation, module)


def is_kept_in_evaluation(module: nn.Module) -> bool:
    """Tell whether `keep_in_evaluation` has changed the module."""
    return "train" in vars(module)


def _stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    """Return the module as it is; replaces `train` of a frozen module."""
    return module
