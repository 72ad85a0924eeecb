"""Task of BossNAS: one block of a supernet learns without labels (Li et al., ICCV 2021, arXiv:2103.12424).

Written after the paper and what the authors' repository, changlin31/BossNAS, computes; none of its code is here.
"""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.factory import create_model
from models.supernets.hytra import HyTraSupernet
from models.supernets.hytra_space import Path as NetPath
from retinue.evaluation.contributions import Contributions
from retinue.evaluation.statistics import mean_ci95
from retinue.tasks.base import Task
from retinue.utils.files import replacing

# Number of paths that a validation compares, evenly from the list of all.
VALIDATED_PATHS = 8


class BossNAS(Task):
    """Ensemble bootstrapping: a path's prediction from one view of an image approaches the ensemble's of another view.

    The figure is the agreement, the mean cosine of the paths' predictions and their ensemble for unchanged images. It
    says that the training goes on, not how good the best path is.

    Args:
        model: The supernets, as `build_net` returns them.
        recipe: As in `Task`; `augment.repeats` is the number of views of an image, half of them for each of the two
            sides, and each step trains one path for each pair of views.
        num_classes: Is not used.
        momentum: Weight of the old average in the target's moving average, at the start; it rises to 1 as a cosine.
        kwargs: Further arguments of `Task`.

    Raises:
        ValueError: The net is no supernet of BossNAS, or the recipe's views do not pair or mix images.
    """

    model: HyTraSupernet  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, model: nn.Module, recipe: Mapping, *, num_classes: int, momentum: float, **kwargs):
        if not isinstance(model, HyTraSupernet):
            raise ValueError(f"task=bossnas needs model=hytra_supernet, not a {type(model).__name__}")
        views = recipe["augment"]["repeats"]
        if views % 2:
            raise ValueError(f"task=bossnas pairs the views of an image: recipe.augment.repeats={views} must be even")
        if recipe["augment"]["mixup"] or recipe["augment"]["cutmix"]:
            raise ValueError("task=bossnas compares images, so recipe.augment.mixup and cutmix must be 0")
        super().__init__(model, recipe, **kwargs)
        self.views, self.momentum = views, momentum
        chosen = np.linspace(0, len(model.paths) - 1, min(VALIDATED_PATHS, len(model.paths))).round().astype(int)
        self.validated = [model.paths[i] for i in chosen]
        # Sums of this rank in the current validation: (agreement, images).
        self._val_sums = torch.zeros(2, dtype=torch.float64)
        self._test_batches: list[tuple[np.ndarray, np.ndarray]] = []
        # Agreement of each test image, by its position, after a test.
        self.agreement = np.zeros(0)

    @staticmethod
    def build_net(cfg: Any, datamodule: Any) -> nn.Module:
        return create_model(cfg.model, 0, datamodule.in_chans, datamodule.image_size)

    @staticmethod
    def data_arguments(cfg: Any) -> dict[str, Any]:
        return {"holdout": cfg.task.holdout}

    def draw_paths(self) -> list[NetPath]:
        """Draw different paths, one for each pair of views, by torch's global generator of the CPU."""
        paths = self.model.paths
        order = torch.randperm(len(paths)).repeat(math.ceil(self.views / 2 / len(paths)))
        return [paths[i] for i in order[: self.views // 2].tolist()]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        # The copies of an image follow each other.
        views = batch["image"].unflatten(0, (-1, self.views)).unbind(1)
        half = self.views // 2
        loss = self.model.loss(views[:half], views[half:], self.draw_paths())
        self.track(loss, len(views[0]))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Here rather than at the end of the batch, since callbacks save checkpoints before that.
        self.move_target(self.trainer.global_step / (self.steps_per_epoch() * (self.trainer.max_epochs or 1)))

    @torch.no_grad()
    def move_target(self, progress: float) -> None:
        """Move the target towards the online weights; `progress` is the share of the training that is done."""
        rate = (1 - self.momentum) * (math.cos(math.pi * progress) + 1) / 2
        for online, target in self.model.trained_pairs():
            target.lerp_(online, rate)

    def agree(self, images: Tensor) -> Tensor:
        """Return the mean cosine of some paths' predictions and their ensemble, (B,), for images (B, C, H, W)."""
        distances = self.model.rate(images, images, self.validated).mean(0)
        return 1 - distances / 4

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        agreement = self.agree(batch["image"]).double().sum().cpu()
        self._val_sums += torch.stack([agreement, torch.tensor(len(batch["image"]), dtype=torch.float64)])

    def on_validation_epoch_end(self) -> None:
        total, images = self._val_sums.tolist()
        self._val_sums.zero_()
        self.val_figures = {"val/agreement": total / images}
        # Callbacks that monitor a figure read it from Lightning's log.
        self.log_dict(self.val_figures, logger=False)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._test_batches.append((batch["index"].cpu().numpy(), self.agree(batch["image"]).float().cpu().numpy()))

    def on_test_epoch_end(self) -> None:
        index, agreement = (np.concatenate(parts) for parts in zip(*self._test_batches, strict=True))
        self._test_batches = []
        self.agreement = agreement[np.argsort(index)]

    def test_figures(self, datamodule: Any) -> dict[str, Any]:
        mean, half_width = mean_ci95(self.agreement.tolist())
        interval = [mean - half_width, mean + half_width]
        return {"n": len(self.agreement), "agreement": mean, "agreement_ci95": interval}

    def contributions(self, datamodule: Any) -> Contributions:
        return Contributions("bossnas", np.array(datamodule.names("test")), {"agreement": self.agreement})

    def write_report(self, folder: Path, datamodule: Any) -> None:
        """Write `agreement.csv`, the agreement for each test image."""
        with replacing(folder / "agreement.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("image", "agreement"))
            writer.writerows(zip(datamodule.names("test"), self.agreement.tolist(), strict=True))
