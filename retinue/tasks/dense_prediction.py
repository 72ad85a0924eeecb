"""Base of detection and segmentation: a task whose net is a backbone under a head."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from models.classifier_rows import ClassifierRows
from models.openmmlab.build import DensePredictor
from models.unpickling import read_weights
from models.weights import load_weights, unwrap
from retinue.tasks.base import Task
from retinue.tasks.dense_distillation import DenseTeacher, Recorder, levels, part_of
from retinue.tasks.map_distillation import MapDistillation


class DensePredictionTask(Task):
    """Task whose net computes its own losses: a dictionary of scalars, which are added up.

    Args:
        model: The net.
        recipe: As in `Task`.
        distillation: `teacher` (a checkpoint in a run's folder; null for none), `part` (whose maps are compared) and
            `maps` (arguments of `MapDistillation`). None for no teacher.
        kwargs: Further arguments of `Task`.

    Attributes:
        methods: Methods of the net, other than `forward`, that the task calls.
    """

    model: DensePredictor
    methods: tuple[str, ...] = ("loss",)

    def __init__(self, model: nn.Module, recipe: Mapping, *, distillation: Mapping | None = None, **kwargs):
        super().__init__(model, recipe, **kwargs)
        self.distillation = distillation
        # Both exist in training with a teacher only.
        self.teacher: DenseTeacher | None = None
        self._recorder: Recorder | None = None

    def prepare_training(self, datamodule: Any) -> None:
        if self.distillation is None or self.distillation["teacher"] is None:
            return
        part = self.distillation["part"]
        teacher = DenseTeacher(self.distillation["teacher"], type(self).__name__, self.build_net, part)
        if part == "logits" and teacher.classes != list(datamodule.class_names):
            raise ValueError(
                "task.distillation.part=logits needs a teacher of the same classes in the same order: the teacher has "
                f"{', '.join(teacher.classes)}"
            )
        self.map_distillation = MapDistillation(
            levels(self.model, part), teacher.levels, project=part != "logits", **self.distillation["maps"]
        )
        self.teacher, self._recorder = teacher, Recorder(part_of(self.model, part))

    def start_from(
        self, weights: str | Path, drop_classifier: bool, classifier_rows: ClassifierRows | None = None
    ) -> None:
        """Load weights of a whole detector or segmentor, or of its backbone.

        Args:
            weights: A weights file of a whole net, or a classifier's for the backbone.
            drop_classifier: Load the weights of the backbone only, even if the file is of a whole net.
            classifier_rows: Not used, since no classifier is loaded.

        Raises:
            ValueError: The file cannot be read, or its weights do not fit.
        """
        names, _ = unwrap(read_weights(weights), self.model.state_dict())
        whole = self.model.is_whole(names) and not drop_classifier
        load_weights(self.model if whole else self.model.backbone, weights)

    @property
    def compiled_part(self) -> tuple[nn.Module, bool]:
        # Shapes in the heads change from image to image, and each new shape would be compiled again.
        return self.model.backbone, False

    def configure_model(self) -> None:
        super().configure_model()
        # FSDP gathers the weights for `forward` and for registered methods only.
        if isinstance(self.model, FSDPModule):
            for method in self.methods:
                register_fsdp_forward_method(self.model, method)

    @staticmethod
    def picture_path(folder: Path, images: Any, index: int) -> Path:
        """Return the path of an image's picture in the report in `folder`; `images.name(index)` is the image's name."""
        name = re.sub(r"[^\w.-]+", "_", str(Path(images.name(index)).with_suffix("")))
        return folder / "images" / f"{name}.png"

    def distillation_losses(self, image: Tensor) -> dict[str, Tensor]:
        """Return the weighted loss `loss_maps` for images (B, C, H, W) whose other losses were just computed.

        Without a teacher the result is empty.
        """
        if self.map_distillation is None or self.teacher is None or self._recorder is None:
            return {}
        datamodule: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        own, others = self._recorder.take(), self.teacher.maps(image, datamodule.mean, datamodule.std)
        loss = self.map_distillation(
            [own[i] for i in self.map_distillation.student_indices],
            [others[i] for i in self.map_distillation.teacher_indices],
        )
        return {"loss_maps": self.map_distillation.weight * loss}

    def sum_losses(self, losses: dict[str, Tensor], images: int) -> Tensor:
        """Return the sum of a batch's losses, and track each loss by its name; `images` is the batch size."""
        loss = torch.stack(list(losses.values())).sum()
        self.track(loss, images, **losses)
        return loss
