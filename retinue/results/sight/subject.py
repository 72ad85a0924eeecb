"""Net and images that are looked at, and what the user chooses beside them."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from models import load_weights
from ops.backend import set_backend
from retinue.evaluation.sight.attention import capture
from retinue.evaluation.sight.rows import attention_rows
from retinue.runs.config import check, with_run
from retinue.runs.many import compose_evaluation
from retinue.runs.preprocessing import resolved_data
from retinue.runs.training import build_data, build_task, quiet_libraries
from retinue.utils.paths import CONF
from retinue.utils.sizes import model_name, size_pixels
from retinue.utils.suggestions import nearest

# Number of blocks that a picture of images shows, unless the user names blocks.
SHOWN_BLOCKS = 4


@dataclass(frozen=True)
class Subject:
    """Net and test images that are looked at.

    Attributes:
        net: Classifier in evaluation mode, with frozen parameters.
        images: Normalised images (B, C, h, w).
        labels: Their classes, int64 (B,).
        photos: The images as colours from 0 to 1, (B, h, w, 3).
        title: Net, data and weights in one line.
    """

    net: Any
    images: Tensor
    labels: Tensor
    photos: np.ndarray
    title: str


@dataclass(frozen=True)
class Choices:
    """Choices of the user beside the net; `scripts/see.py` explains each.

    Attributes:
        pictures: Number of images that are drawn, and of which attention is computed.
        query: Place of the query as shares of the height and width, from 0 to 1; None for the first extra token.
        blocks: Names of blocks or attention modules; None for a choice.
        method: Method of class activation.
        other: Second net of CKA; None for the same net.
        resized: The same net and images at further sizes, by size in px.
    """

    pictures: int = 4
    query: tuple[float, float] | None = (0.5, 0.5)
    blocks: Sequence[str] | None = None
    method: str = "gradcam"
    other: Subject | None = None
    resized: Mapping[int, Subject] = field(default_factory=dict)


def read_query(query: Sequence[str]) -> tuple[float, float] | None:
    """Return a place as shares of the height and width, or None for the class token.

    Raises:
        ValueError: The query is neither two numbers from 0 to 1 nor `class`.
    """
    if list(query) == ["class"]:
        return None
    try:
        y, x = map(float, query)
        if not (0 <= y <= 1 and 0 <= x <= 1):
            raise ValueError
    except ValueError:
        raise ValueError(f"query must be class, or [y,x] from 0 to 1, not [{','.join(query)}]") from None
    return y, x


def load(run: Path | None, overrides: Sequence[str], number: int, device: torch.device) -> Subject:
    """Build a net with its weights, and read the first test images.

    Args:
        run: Folder of a run; None for a net that the overrides choose, untrained unless they name `weights`.
        overrides: Overrides of eval.py.
        number: Number of test images; all if there are fewer.
        device: Device that computes.

    Raises:
        ValueError: There is no such run, an override is wrong, or the net is no classifier.
    """
    if run is not None:
        cfg = compose_evaluation(run, overrides)
    else:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("eval", [*overrides, "run_dir=."])
        cfg = with_run(cfg, overrides, ())
    check(cfg)
    if cfg.task.name not in ("classification", "multi_label"):
        raise ValueError(f"see.py is for task=classification or multi_label, not task={cfg.task.name}")
    quiet_libraries()
    set_backend(cfg.ops.backend)
    pl.seed_everything(cfg.seed, verbose=False)
    datamodule = build_data(cfg)
    net: Any = build_task(cfg, datamodule).model
    trained = bool(cfg.weights or cfg.model.get("pretrained"))
    if cfg.weights:
        load_weights(net, cfg.weights)
    net.to(device).eval().requires_grad_(False)
    images, labels = _read(datamodule, number, device)
    data = resolved_data(cfg)
    title = f"{model_name(cfg.model, size_pixels(data))} on {cfg.data.name}"
    return Subject(net, images, labels, _photos(images, data), title if trained else f"{title}, untrained")


def _read(datamodule: Any, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in datamodule.ordered_dataloader("test"):
        batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        batch = datamodule.on_after_batch_transfer(batch, 0)
        readable = batch["index"] >= 0
        images.append(batch["image"][readable].float())
        labels.append(batch["label"][readable])
        if sum(map(len, images)) >= number:
            break
    return torch.cat(images)[:number], torch.cat(labels)[:number]


def _photos(images: Tensor, data: Mapping[str, Any]) -> np.ndarray:
    mean, std = (torch.tensor(list(data[key]), device=images.device).view(1, -1, 1, 1) for key in ("mean", "std"))
    colours = (images * std + mean).clamp(0, 1)
    # Images of one or of many bands are shown as their mean.
    colours = colours if colours.shape[1] == 3 else colours.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return colours.permute(0, 2, 3, 1).cpu().numpy()


def choose_blocks(names: Sequence[str], wanted: Sequence[str] | None, number: int | None = None) -> list[str]:
    """Return the wanted names, or `number` of all names, evenly spread with the last one; None takes all.

    Raises:
        ValueError: A wanted name is not among the names.
    """
    for name in wanted or ():
        if name not in names:
            raise ValueError(f"there is no block {name!r}.{nearest(name, names)} There are: {', '.join(names)}")
    if wanted is not None:
        return list(wanted)
    count = len(names) if number is None else min(number, len(names))
    return [names[(i + 1) * len(names) // count - 1] for i in range(count)]


def choose_attention(subject: Subject, wanted: Sequence[str] | None, number: int | None = None) -> list[str]:
    """Return the wanted attention modules, or `number` of those whose attention can be shown; None takes all.

    Modules whose attention cannot be shown are left out with a line on standard error, unless they are wanted.

    Raises:
        ValueError: A wanted name is unknown, or no module's attention can be shown.
    """
    calls = capture(subject.net, subject.images[:1])
    if wanted is not None:
        return choose_blocks(list(calls), wanted)
    shown, reason = [], ""
    for name, call in calls.items():
        try:
            attention_rows(call, [call.extra])
        except ValueError as error:
            reason = f"{name}: {error}"
            print(reason, file=sys.stderr)
        else:
            shown.append(name)
    if not shown:
        raise ValueError(f"no module's attention can be shown; {reason}")
    return choose_blocks(shown, None, number)
