"""Configs of mmdetection's and mmsegmentation's heads: read, changed by `conf/head/*.yaml`, and fitted to a backbone.

The package's wheel brings its configs along. We take a config's model without its backbone, apply the changes of the
head's size and arguments, and set what follows from the backbone's maps and the data's classes.
"""

import importlib
import logging
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from models.dense import DenseBackbone
from models.openmmlab import mmcv_ext
from retinue.utils.suggestions import nearest

# Stride of the finest map that the heads read in the papers.
FINEST_STRIDE = 4


@cache
def library(name: str) -> Path:
    """Import a package quietly, register our own parts, and return the folder of its configs.

    Warnings of the packages are filtered from then on. mmengine's logger, which would log the initialisation of each
    parameter, shows errors only.

    Args:
        name: `mmdet` or `mmseg`. mmsegmentation needs mmdetection for its Mask2Former, so `mmseg` imports both.
    """
    mmcv_ext.install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in dict.fromkeys(("mmdet", name)):
            importlib.import_module(f"{package}.models")
        importlib.import_module("models.openmmlab.mayor")
        if name == "mmseg":
            # Put our EoMT into the package's registry.
            importlib.import_module("models.openmmlab.eomt")
    warnings.filterwarnings("ignore", module=r"mm(engine|cv|det|seg)\b")
    # The packages call torch.meshgrid without `indexing`, and torch attributes the warning to its own module.
    warnings.filterwarnings("ignore", message=r"torch\.meshgrid")
    from mmengine.logging import MMLogger

    MMLogger.get_current_instance().setLevel(logging.ERROR)
    return Path(importlib.import_module(name).__file__ or "").parent / ".mim" / "configs"


def read_model(head: Any, small: bool) -> dict[str, Any]:
    """Return the model of the package's config with the head's changes.

    Args:
        head: The composed head config.
        small: Whether the data are small, which chooses the head's default size.

    Raises:
        ValueError: The package has no such config, or the size is unknown.
    """
    from mmengine.config import Config

    configs = library(head.library)
    path = configs / head.config
    if not path.is_file():
        known = [str(file.relative_to(configs)) for file in configs.rglob("*.py")]
        raise ValueError(f"{head.library} has no config {head.config!r}.{nearest(head.config, known)}")
    model = Config.fromfile(path).model.to_dict()
    # Our data modules normalise and pad the images.
    model["data_preprocessor"] = None
    if head.library == "mmseg":
        # mmsegmentation would hand a path of pretrained weights to the backbone.
        model["pretrained"] = None
    return merge(model, head_changes(head, small))


def head_changes(head: Any, small: bool) -> dict[str, Any]:
    """Return the changes of a head's size and of `head.args`, as one mapping.

    Args:
        head: The composed head config.
        small: Whether the data are small: without `head.size`, the size is `small` then, otherwise `full`.

    Raises:
        ValueError: The size is unknown, or `head.args` is not a mapping.
    """
    settings: Any = OmegaConf.to_container(head, resolve=True)
    size, sizes = settings["size"], settings["sizes"]
    if not size:
        size = "small" if small else "full"
    if size not in sizes:
        raise ValueError(f"head.size {size!r} is unknown.{nearest(size, sizes)} There are: {', '.join(sizes)}")
    if not isinstance(settings["args"], dict):
        raise ValueError(
            f"head.args must be a mapping, like {{rpn_head: {{feat_channels: 128}}}}, not {settings['args']!r}"
        )
    return merge(sizes[size], settings["args"])


def merge(config: dict[str, Any], changes: Mapping) -> dict[str, Any]:
    """Change `config` in place and return it.

    A mapping changes the keys of the mapping in its place, or of every mapping in the list in its place. A mapping with
    the key `_delete_`, and any other value, replaces what was in its place.

    Example:
        >>> merge({"norm": {"type": "BN"}, "heads": [{"dim": 8}, {"dim": 8}]}, {"norm": {"eps": 0.1}})
        {'norm': {'type': 'BN', 'eps': 0.1}, 'heads': [{'dim': 8}, {'dim': 8}]}
        >>> merge({"heads": [{"dim": 8}, {"dim": 8}]}, {"heads": {"dim": 4}})
        {'heads': [{'dim': 4}, {'dim': 4}]}
    """
    for key, change in changes.items():
        current = config.get(key)
        if not isinstance(change, Mapping):
            config[key] = change
        elif isinstance(current, list) and "_delete_" not in change:
            config[key] = [merge(element, change) for element in current]
        else:
            base = current if isinstance(current, dict) and "_delete_" not in change else {}
            config[key] = merge(base, {name: value for name, value in change.items() if name != "_delete_"})
    return config


def finest_stride(model: dict[str, Any]) -> int:
    """Return the stride of the finest map that a head reads, and remove `start_level` from its neck.

    The config counts four maps of strides 4 to 32, and a neck's `start_level` is the number of fine maps that it skips.
    Our backbones give only the maps that are read, so that nothing remains to be skipped.
    """
    reader = model.get("neck") or model.get("panoptic_head") or model["decode_head"]
    skipped = 4 - len(reader["in_channels"]) + reader.pop("start_level", 0)
    return FINEST_STRIDE * 2**skipped


def fit_config(model: dict[str, Any], backbone: DenseBackbone, num_classes: int, num_things: int = 0) -> None:
    """Set in place what follows from the backbone's maps and the number of classes.

    These are the classes, of which a panoptic head distinguishes things and stuff, the class weights, the channels and
    strides of the maps, and batch norm instead of synchronised batch norm: `trainer.sync_batchnorm` synchronises it
    again.
    """
    channels, levels = list(backbone.channels), len(backbone.channels)
    # A neck that names its number of maps adds coarser ones to those of the backbone.
    maps = model.get("neck", {}).get("num_outs", levels)
    strides = [backbone.strides[0] * 2**i for i in range(maps)]

    def visit(node: Any) -> None:
        for child in node.values() if isinstance(node, dict) else node:
            if isinstance(child, dict | list | tuple):
                visit(child)
        if not isinstance(node, dict):
            return
        if "num_classes" in node:
            node["num_classes"] = num_classes
        if "num_things_classes" in node:
            node |= {"num_things_classes": num_things, "num_stuff_classes": num_classes - num_things}
        if isinstance(node.get("class_weight"), list):
            # The last weight is for "no object".
            node["class_weight"] = [1.0] * num_classes + node["class_weight"][-1:]
        if node.get("type") == "SyncBN":
            node["type"] = "BN"
        for key in ("strides", "featmap_strides", "feature_strides"):
            if isinstance(node.get(key), list):
                node[key] = strides[: len(node[key])]

    visit(model)
    if "neck" in model:
        model["neck"]["in_channels"] = channels
    elif "panoptic_head" in model:
        model["panoptic_head"]["in_channels"] = channels
    else:
        model["decode_head"] |= {"in_channels": channels, "in_index": list(range(levels))}
    if model.get("auxiliary_head"):
        # The auxiliary head reads the second coarsest map.
        index = max(levels - 2, 0)
        model["auxiliary_head"] |= {"in_channels": channels[index], "in_index": index}


def learns_masks(head: Any, small: bool) -> bool:
    """Tell whether the detector of a `conf/head/*.yaml` learns instance masks, without building it.

    Args:
        head: The composed head config.
        small: Whether the data are small, which chooses the head's default size.

    Raises:
        ValueError: The config or the size is unknown.
    """
    model = read_model(head, small)
    return bool(model.get("mask_head") or (model.get("roi_head") or {}).get("mask_head"))
