"""The panel `panel=robustness`: a classifier's accuracy on changed test images and on ImageNet's other test sets."""

import copy
import json
import logging
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from datamodules.corruption_levels import BENCHMARK, PATCHES
from datamodules.imagenet import ImageNet, synsets
from models.complexity import complexity
from retinue.evaluation.attacks import Ball, fgsm, pgd
from retinue.evaluation.classification import Predictions, check_finite
from retinue.evaluation.robustness import Row, group_figures
from retinue.runs.config import world_size
from retinue.runs.training import build_data, build_trainer

log = logging.getLogger(__name__)

# Test set -> class of its data module, and the label set of timm that has its classes (None: all classes).
SETS = {
    "v2": ("datamodules.imagenet_variants.ImageNetV2", None),
    "a": ("datamodules.imagenet.ImageNet", "imagenet_a"),
    "r": ("datamodules.imagenet.ImageNet", "imagenet_r"),
    "sketch": ("datamodules.imagenet.ImageNet", None),
    "objectnet": ("datamodules.imagenet_variants.ObjectNet", None),
}
# Side in pixels of the images of ImageNet-C, which are not resized.
IMAGENET_C_SIDE = 224
# Number in the name of an image of ImageNet's validation split.
VAL_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


def check_panel(cfg: DictConfig, datamodule: Any) -> None:
    """Refuse a panel for another task, or with test sets whose classes the net does not have.

    Raises:
        ValueError: the config asks for such a panel.
    """
    if cfg.task.name != "classification":
        raise ValueError(f"panel={cfg.panel.name} is for task=classification, not task={cfg.task.name}")
    given = [f"panel.sets.{name}" for name, folder in cfg.panel.sets.items() if folder is not None]
    if given and not has_imagenet_classes(datamodule):
        raise ValueError(f"{given[0]} needs data=imagenet with its 1,000 classes, not data={cfg.data.name}")


def has_imagenet_classes(datamodule: Any) -> bool:
    """Tell whether the data are ImageNet's, with its 1,000 classes in their order."""
    return isinstance(datamodule, ImageNet) and datamodule.wnids == synsets()


class Panel:
    """The rows of a panel for one net.

    Args:
        cfg: config of the evaluation.
        task: the task, which has been tested on `datamodule`.
        datamodule: the clean data.

    Attributes:
        rows: the rows so far.
        skipped: reasons why test sets or sizes have no row, by their names.
    """

    def __init__(self, cfg: DictConfig, task: Any, datamodule: Any):
        self.cfg, self.panel, self.task, self.datamodule = cfg, cfg.panel, task, datamodule
        self.clean: Predictions = task.predictions
        self.rows: list[Row] = []
        self.skipped: dict[str, str] = {}

    def run(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Test the net on every row; the task has the clean predictions afterwards.

        Returns:
            The figures of the groups as metrics, and the entries `panel`, `rows` and `skipped` of `result.json`.
        """
        trainer = self.task.trainer
        self.add_corruptions()
        self.add_sizes()
        self.add_attacks()
        if has_imagenet_classes(self.datamodule):
            self.add_real_labels()
            self.add_sets()
            self.add_imagenet_c()
        self.task.predictions, self.task.trainer = self.clean, trainer
        if self.task.trainer.is_global_zero:
            for name, reason in self.skipped.items():
                log.warning("the panel has no %s: %s", name, reason)
        figures = {f"test/{name}": value for name, value in group_figures(self.rows).items()}
        rows = [row.describe() for row in self.rows]
        return figures, {"panel": self.panel.name, "rows": rows, "skipped": self.skipped}

    def add_corruptions(self) -> None:
        """Add the corruptions that are made from the test images."""
        for name in self.panel.corruptions:
            if name in BENCHMARK and self.panel.sets.c is not None:
                continue
            for severity in self.panel.severities:
                changed = copy.copy(self.datamodule)
                changed.corrupt = {"name": name, "severity": severity}
                self.add(name if name in PATCHES else "corruption", name, severity, self.test(changed))

    def add_sizes(self) -> None:
        """Add other sizes of the test images, where the net takes them."""
        own = _sides(self.datamodule.image_size)
        for factor in self.panel.sizes:
            size = [max(8, round(side * factor / 8) * 8) for side in own]
            if size == own:
                continue
            if reason := self.refusal(size):
                self.skipped[f"size {size[0]} x {size[1]}"] = reason
            else:
                self.add("size", "size", size[0] if size[0] == size[1] else size, self.test(self.data(image_size=size)))

    def add_attacks(self) -> None:
        """Add FGSM and PGD on the test images."""
        for name in ("fgsm", "pgd"):
            for epsilon in self.panel.epsilons:
                attack = Attack(name, epsilon / 255, self.panel.pgd_steps, self.datamodule.mean, self.datamodule.std)
                self.add(name, name, epsilon, self.test(self.datamodule, attack))

    def add_real_labels(self) -> None:
        """Add ImageNet ReaL (Beyer et al., arXiv:2006.07159): the clean predictions by the labels of a second look."""
        names = self.datamodule.names("test")
        numbers = {i: VAL_NUMBER.search(names[i]) for i in self.clean.index.tolist()}
        if not all(numbers.values()):
            self.skipped["real"] = "the images are not named as those of ImageNet's validation split"
            return
        path = files("timm.data") / "_info" / "imagenet_real_labels.json"
        labels = json.loads(path.read_text(encoding="utf-8"))
        accepted = {i: labels[int(match[1]) - 1] for i, match in numbers.items() if match}
        self.add_accepted("real", self.clean, accepted, float(self.clean.correct.mean()))

    def add_sets(self) -> None:
        """Add the test sets whose folders are given."""
        for name, (target, classes) in SETS.items():
            if (root := self.folder(name)) is None:
                continue
            changed = self.data(_target_=target, root=root, synsets="imagenet1k", classes=classes, val_labels=None)
            predictions = self.test(changed)
            if name == "objectnet":
                accepted = {i: changed.accepted(i) for i in predictions.index.tolist()}
                known = np.isin(self.clean.label, sorted({label for labels in accepted.values() for label in labels}))
                clean = float(self.clean.correct[known].mean()) if known.any() else float("nan")
                self.add_accepted(name, predictions, accepted, clean)
            elif classes is None:
                self.add(name, name, None, predictions)
            else:
                # The logits of these classes only are compared, on the clean images as well.
                clean = self.test(self.data(synsets="imagenet1k", classes=classes))
                self.add(name, name, None, predictions, float(clean.correct.mean()))

    def add_imagenet_c(self) -> None:
        """Add the corruptions of ImageNet-C, whose images keep their size."""
        if (root := self.folder("c")) is None:
            return
        side = [IMAGENET_C_SIDE, IMAGENET_C_SIDE]
        if reason := self.refusal(side):
            self.skipped["c"] = reason
            return
        for name in BENCHMARK:
            # The archives have a folder for each kind of corruption, such as blur/defocus_blur.
            folder = next((path for path in (Path(root, name), *sorted(Path(root).glob(f"*/{name}"))) if path.is_dir()),
                          None)  # fmt: skip
            for severity in self.panel.severities:
                if folder is None or not (folder / str(severity)).is_dir():
                    self.skipped[f"c/{name}/{severity}"] = f"{root} has no {name}/{severity}"
                    continue
                changed = self.data(
                    root=str(folder / str(severity)), synsets="imagenet1k", classes=None, val_labels=None,
                    image_size=IMAGENET_C_SIDE, crop_pct=1.0, crop_mode="center",
                )  # fmt: skip
                self.add("imagenet_c", name, severity, self.test(changed))

    def folder(self, name: str) -> str | None:
        """Return the folder of a test set, or None if there is none, which is noted."""
        root = self.panel.sets[name]
        if root is not None and Path(root).expanduser().is_dir():
            return str(Path(root).expanduser())
        self.skipped[name] = f"panel.sets.{name}=FOLDER is not given" if root is None else f"{root} is missing"
        return None

    def data(self, **changes: Any) -> Any:
        """Return the data module of the evaluation with other values in the section `data`."""
        cfg = copy.deepcopy(self.cfg)
        for key, value in changes.items():
            OmegaConf.update(cfg, f"data.{key}", value, force_add=True)
        return build_data(cfg)

    def refusal(self, size: Sequence[int]) -> str | None:
        """Return why the net takes no images of this size, or None if it takes them."""
        try:
            complexity(self.task.model, (size[0], size[1]), self.datamodule.in_chans)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return f"the net takes no images of {size[0]} x {size[1]} px ({reason})"
        return None

    def test(self, datamodule: Any, *callbacks: pl.Callback) -> Predictions:
        """Return the net's predictions for the test split of a data module."""
        strategy = "ddp" if world_size(self.cfg) > 1 else "auto"
        # Tensors of the inference mode have no gradients, which attacks follow.
        trainer = build_trainer(
            self.cfg, logger=False, strategy=strategy, callbacks=list(callbacks), inference_mode=not callbacks
        )
        trainer.test(self.task, datamodule=datamodule, verbose=False)
        check_finite(self.task.predictions)
        return self.task.predictions

    def add(self, group: str, name: str, level: Any, predictions: Predictions, clean: float | None = None) -> None:
        """Add a row; without `clean` it is compared with the clean accuracy on the classes of its labels."""
        if clean is None:
            known = np.isin(self.clean.label, np.unique(predictions.label))
            clean = float(self.clean.correct[known].mean()) if known.any() else float("nan")
        self.rows.append(Row(group, name, level, predictions.index, predictions.correct, clean))

    def add_accepted(self, name: str, predictions: Predictions, accepted: dict[int, list[int]], clean: float) -> None:
        """Add a row in which an image may have several right labels; images without any are left out."""
        rows = [row for row, i in enumerate(predictions.index.tolist()) if accepted[i]]
        index, best = predictions.index[rows], predictions.topk[rows, 0]
        correct = np.array([label in accepted[i] for i, label in zip(index.tolist(), best.tolist(), strict=True)])
        self.rows.append(Row(name, name, None, index, correct, clean))


class Attack(pl.Callback):
    """Callback that replaces the images of a test by adversarial ones, in 32-bit precision.

    Args:
        name: fgsm or pgd.
        epsilon: largest change of a value from 0 to 1.
        steps: steps of PGD.
        mean: mean of the channels, by which the images are normalised.
        std: deviation of the channels.
    """

    def __init__(self, name: str, epsilon: float, steps: int, mean: Sequence[float], std: Sequence[float]):
        self.name, self.epsilon, self.steps = name, epsilon, steps
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        image, label = batch["image"], batch["label"]
        ball = Ball(image, self.epsilon, self.mean.to(image), self.std.to(image))
        if self.name == "fgsm":
            batch["image"] = fgsm(pl_module, label, ball)
            return
        # The start follows from the image's position, not from the batches.
        starts = [
            torch.rand(image.shape[1:], generator=torch.Generator().manual_seed(index))
            for index in batch["index"].tolist()
        ]
        batch["image"] = pgd(pl_module, label, ball, torch.stack(starts).to(image) * 2 - 1, self.steps)


def _sides(size: Any) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)
