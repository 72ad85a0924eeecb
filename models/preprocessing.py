"""Preprocessing of images that belongs to weights: mean, deviation, crop, interpolation and image size."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.data import resolve_data_config
from timm.models import resolve_pretrained_cfg

from models.factory import check_name
from models.hub import RUN_CONFIG, fetch, is_hub_name
from retinue.utils.suggestions import nearest

# Keys of a data set's config that follow the weights, in the order in which they are shown.
KEYS = ("mean", "std", "crop_pct", "crop_mode", "interpolation", "image_size")
# Arguments of timm.create_model that change a net's `pretrained_cfg`.
PRETRAINED_ARGUMENTS = ("pretrained_cfg", "pretrained_cfg_overlay")


def net_preprocessing(name: str, args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the preprocessing that the published weights of a net were trained with.

    The values are those of `timm.data.resolve_model_data_config`. The size is `input_size`: a larger `test_input_size`
    is taken only when `data.image_size` asks for it.

    Args:
        name: Name of a net in timm's registry, with or without a tag of weights.
        args: Arguments of `timm.create_model`.

    Returns:
        The values of `KEYS`. `image_size` is a side, or [height, width].

    Raises:
        ValueError: No net or no tag of weights is registered under the name.
    """
    architecture = check_name(name)
    overlay = {key: value for key, value in (args or {}).items() if key in PRETRAINED_ARGUMENTS}
    try:
        if timm.models.get_pretrained_cfg(name) is None:
            # timm's deprecated names have no entry of their own: the net that they build has one.
            with torch.device("meta"):
                cfg = timm.create_model(name, **overlay).pretrained_cfg
        else:
            cfg = resolve_pretrained_cfg(name, **overlay).to_dict()
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{architecture}.*")
        raise ValueError(f"no weights are called {name!r}.{nearest(name, tags)}") from error
    values = resolve_data_config(pretrained_cfg=cfg)
    height, width = values["input_size"][1:]
    size = height if height == width else [height, width]
    values |= {"mean": list(values["mean"]), "std": list(values["std"]), "image_size": size}
    return {key: values[key] for key in KEYS}


def run_config(weights: str | Path) -> Path | None:
    """Return the `config.yaml` of the run whose checkpoint `weights` is, also from a hub; None for any other file."""
    if is_hub_name(weights):
        config = fetch(str(weights)) / RUN_CONFIG
        return config if config.is_file() else None
    path = Path(weights).expanduser().resolve()
    config = path.parent.parent / "config.yaml"
    return config if path.parent.name == "checkpoints" and config.is_file() else None


def read_run(config: Path) -> tuple[str, dict[str, Any]]:
    """Return a run's task and the preprocessing that its net was trained with: those of `KEYS` that it has.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        content = yaml.load(config.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        data, task = dict(content["data"]), str(content["task"]["name"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{config}, which says how the weights were trained, cannot be read: {reason}; restore the file, or copy "
            "the weights out of the run's folder and give data.mean and data.std"
        ) from error
    return task, {key: data[key] for key in KEYS if data.get(key) is not None}
