"""What a `conf/head/*.yaml` says of a head of mmdetection's or mmsegmentation's: the package's own config, changed.

The config is one of those in the package's wheel; what it says of the backbone is not used. It is changed by the head's
size and arguments, then fitted to the maps of the backbone and to the data's classes.
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

FINEST = 4  # stride of the first map that the papers' heads read


@cache
def library(name: str) -> Path:
    """Import mmdetection and, for `mmseg`, mmsegmentation, quietly; the folder of the package's configs."""
    mmcv_ext.install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in dict.fromkeys(("mmdet", name)):  # mmsegmentation's Mask2Former is mmdetection's
            importlib.import_module(f"{package}.models")
    warnings.filterwarnings("ignore", module=r"mm(engine|cv|det|seg)\b")
    warnings.filterwarnings("ignore", message=r"torch\.meshgrid")  # theirs, told of as torch's
    from mmengine.logging import MMLogger

    MMLogger.get_current_instance().setLevel(logging.ERROR)  # it tells every parameter's initialisation
    return Path(importlib.import_module(name).__file__ or "").parent / ".mim" / "configs"


def read_model(head: Any, small: bool) -> dict[str, Any]:
    """The model part of the package's config with the head's changes, for data that is `small` or not.

    Raises:
        ValueError: the config or the size is unknown.
    """
    from mmengine.config import Config

    configs = library(head.library)
    path = configs / head.config
    if not path.is_file():
        near = nearest(head.config, [str(each.relative_to(configs)) for each in configs.rglob("*.py")])
        raise ValueError(f"{head.library} has no config {head.config!r}.{near}")
    model = Config.fromfile(path).model.to_dict()
    model |= {"data_preprocessor": None} | ({"pretrained": None} if head.library == "mmseg" else {})
    return merge(model, changes(head, small))


def changes(head: Any, small: bool) -> dict[str, Any]:
    """What a head's size and the command line change in it.

    Raises:
        ValueError: the size is unknown, or `args` is no mapping.
    """
    settings: Any = OmegaConf.to_container(head, resolve=True)
    size, sizes = settings["size"] or ("small" if small else "full"), settings["sizes"]
    if size not in sizes:
        raise ValueError(f"head.size {size!r} is unknown.{nearest(size, sizes)} There are: {', '.join(sizes)}")
    if not isinstance(settings["args"], dict):
        raise ValueError(
            f"head.args must be a mapping, like {{rpn_head: {{feat_channels: 128}}}}, not {settings['args']!r}"
        )
    return merge(sizes[size], settings["args"])


def merge(config: dict[str, Any], change: Mapping) -> dict[str, Any]:
    """Change `config` in place: a mapping changes a mapping's values, or those of every mapping of a list.

    All else replaces what was there, as a mapping with a key `_delete_` does.
    """
    for key, value in change.items():
        old = config.get(key)
        if not isinstance(value, Mapping):
            config[key] = value
        elif isinstance(old, list) and "_delete_" not in value:
            config[key] = [merge(each, value) for each in old]
        else:
            kept = old if isinstance(old, dict) and "_delete_" not in value else {}
            config[key] = merge(kept, {k: v for k, v in value.items() if k != "_delete_"})
    return config


def finest_stride(model: dict[str, Any]) -> int:
    """That of the first map which a head reads, for a backbone with strides from 4 to 32.

    A neck's `start_level`, which says so, is taken out: the backbone gives only maps that are read.
    """
    reader = model.get("neck") or model["decode_head"]
    return FINEST * 2 ** (4 - len(reader["in_channels"]) + reader.pop("start_level", 0))


def fit(model: dict[str, Any], backbone: DenseBackbone, num_classes: int) -> None:
    """Set what follows from the backbone's maps and the data's classes."""
    channels, levels = list(backbone.channels), len(backbone.channels)
    strides = [backbone.strides[0] * 2**i for i in range(8)]  # those of a neck's further maps, too

    def visit(node: Any) -> None:
        for child in node.values() if isinstance(node, dict) else node:
            if isinstance(child, dict | list | tuple):
                visit(child)
        if not isinstance(node, dict):
            return
        if "num_classes" in node:
            node["num_classes"] = num_classes
        if isinstance(node.get("class_weight"), list):  # the last is that of no object
            node["class_weight"] = [1.0] * num_classes + node["class_weight"][-1:]
        if node.get("type") == "SyncBN":  # trainer.sync_batchnorm makes it of BN
            node["type"] = "BN"
        for key in ("strides", "featmap_strides", "feature_strides"):
            if isinstance(node.get(key), list):
                node[key] = strides[: len(node[key])]

    visit(model)
    if "neck" in model:
        model["neck"]["in_channels"] = channels
    else:
        model["decode_head"] |= {"in_channels": channels, "in_index": list(range(levels))}
    if model.get("auxiliary_head"):
        index = max(levels - 2, 0)
        model["auxiliary_head"] |= {"in_channels": channels[index], "in_index": index}


def learns_masks(head: Any, small: bool) -> bool:
    """Tell whether the detector of a `conf/head/*.yaml` learns instance masks, without building it.

    Args:
        head: The composed head config.
        small: Whether the data are small, which chooses the head's default size.

    Raises:
        ValueError: the config or the size is unknown.
    """
    model = read_model(head, small)
    return bool(model.get("mask_head") or (model.get("roi_head") or {}).get("mask_head"))
