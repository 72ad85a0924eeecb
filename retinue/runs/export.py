"""Export the net of a run, or of a config with weights, with its preprocessing, its classes and its source."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import nn

import retinue
from datamodules.classes import Classes
from models import exporting
from models.merging import contiguous
from models.preprocessing import KEYS
from retinue.runs.config import allow_run_keys, check, with_run
from retinue.runs.evaluation import load_task, prepare
from retinue.runs.identity import fingerprint, weights_digest
from retinue.runs.prediction import find_classes
from retinue.runs.preprocessing import resolved_data
from retinue.runs.result_file import git_commit
from retinue.utils.files import replacing
from retinue.utils.paths import CONF
from retinue.utils.sizes import resolve, size_pixels

# Tasks whose nets map images to logits of fixed classes.
TASKS = ("classification", "multi_label", "segmentation")
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}


class Exportable(NamedTuple):
    """A net in evaluation mode with its weights, and what a file says about it.

    Attributes:
        net: The net, from normalised images (B, C, H, W) to logits (B, K), or (B, K, H, W) for a segmentor.
        shape: (C, H, W) of an image.
        classes: Classes of the logits.
        architecture: Registry name of the net, and its arguments.
        metadata: JSON texts by key: `task`, `preprocessing`, `classes`, `source`.
    """

    net: nn.Module
    shape: tuple[int, int, int]
    classes: Classes
    architecture: tuple[str, dict[str, Any]]
    metadata: dict[str, str]


def compose_net(overrides: Sequence[str]) -> DictConfig:
    """Compose the config of a net from arguments of eval.py, such as `run=DIR`, or `model=` and `weights=`.

    Raises:
        ValueError: There is no such run, or an argument is wrong.
    """
    choices = allow_run_keys(overrides)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("eval", [*choices, "run_dir=export"])
    cfg = with_run(cfg, choices, ())
    check(cfg)
    return cfg


def load_net(cfg: DictConfig) -> Exportable:
    """Build the net of a config with its weights; the images of the data are not needed.

    Raises:
        ValueError: The task's outputs are no logits, there are no weights, or the classes are unknown.
    """
    if cfg.task.name not in TASKS:
        more = ": boxes follow from loops whose length depends on the image" if cfg.task.name == "detection" else ""
        raise ValueError(f"export.py is for {', '.join(TASKS)}, not task={cfg.task.name}{more}")
    prepare(cfg)
    data, classes = resolved_data(cfg), find_classes(cfg)
    size = data["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    # A task reads these facts of its data module to build a net.
    facts = SimpleNamespace(
        class_names=classes.names, num_classes=len(classes.names), in_chans=data["in_chans"],
        image_size=size if isinstance(size, int) else (height, width),
    )  # fmt: skip
    net = load_task(cfg, facts).model.eval().requires_grad_(False)
    architecture = resolve(cfg.model, size_pixels(data), under_head=cfg.task.name == "segmentation")
    source = {
        "retinue": retinue.__version__,
        "git_commit": git_commit(),
        "model": architecture[0],
        "weights": cfg.weights,
        "weights_sha256": weights_digest(cfg.weights) if cfg.weights else None,
        "data": cfg.data.name,
        "config_sha256": fingerprint(cfg),
    }
    preprocessing = {key: data[key] for key in KEYS if data.get(key) is not None} | {"in_chans": data["in_chans"]}
    entries = {
        "task": cfg.task.name,
        "preprocessing": preprocessing,
        "classes": {"names": list(classes.names), "ids": list(classes.ids), "subset": classes.subset},
        "source": source,
    }
    metadata = {key: json.dumps(entry, ensure_ascii=False) for key, entry in entries.items()}
    return Exportable(net, (data["in_chans"], height, width), classes, architecture, metadata)


def export(exportable: Exportable, path: Path, format: str, dynamic_size: bool = False) -> str:
    """Write a net to a file, after the file has given the net's outputs; return one line on the check.

    Args:
        exportable: The net.
        path: The file, whose folders are made as needed. It is written whole or not at all.
        format: A key of `SUFFIXES`.
        dynamic_size: Let the height and width of the images vary.

    Raises:
        ValueError: The net cannot be exported, or the file does not give the net's outputs.
    """
    net, shape = exportable.net, exportable.shape
    with replacing(path) as temporary:
        if format == "safetensors":
            state = contiguous(net.state_dict())
            save_file(state, temporary, exportable.metadata)
            written = load_file(temporary)
            if written.keys() != state.keys() or not all(torch.equal(written[key], state[key]) for key in state):
                raise ValueError(f"{path}: the written weights differ from those of the net")
            return f"{len(state)} weights, read back and equal"
        program = exporting.trace(net, shape, dynamic_size)
        variable = exporting.variable_dimensions(program)
        if dynamic_size and not {2, 3} <= variable:
            raise ValueError(f"{type(net).__name__} is traced for one size of images only: dynamic_size=false")
        # The trace may not see what the conversion changes.
        if format == "onnx":
            exporting.save_onnx(copy.deepcopy(program), temporary, exportable.metadata)
            graph = exporting.load_onnx(temporary)
        else:
            exporting.save_program(program, temporary, exportable.metadata)
            graph = exporting.load_program(temporary)
        agreement = exporting.check(net, graph, shape, variable)
    return describe(agreement, variable)


def describe(agreement: exporting.Agreement, variable: set[int]) -> str:
    """Return one line on what varies and how well a graph agrees with its net."""
    number = "any number" if 0 in variable else "1"
    size = "any size" if {2, 3} <= variable else "one size"
    shapes = ", ".join("x".join(map(str, shape)) for shape in agreement.shapes)
    same = "the same classes" if agreement.same_class == 1 else f"{agreement.same_class:.3%} of the classes the same"
    return f"{number} of images of {size}; relative error {agreement.error:.1e}, {same} for {shapes}"
