"""Base of detection and segmentation: a task whose net is a backbone under a head."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from models.openmmlab.build import DensePredictor
from models.unpickling import read_weights
from models.weights import load_weights, unwrap
from retinue.tasks.base import Task


class DensePredictionTask(Task):
    """Task whose net computes its own losses: a dictionary of scalars, which are added up.

    Attributes:
        methods: Methods of the net, other than `forward`, that the task calls.
    """

    model: DensePredictor
    methods: tuple[str, ...] = ("loss",)

    def start_from(self, weights: str | Path, drop_classifier: bool) -> None:
        """Load weights of a whole detector or segmentor, or of its backbone.

        Args:
            weights: A weights file of a whole net, or a classifier's for the backbone.
            drop_classifier: Load the weights of the backbone only, even if the file is of a whole net.

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

    def sum_losses(self, losses: dict[str, Tensor], images: int) -> Tensor:
        """Return the sum of a batch's losses, and track each loss by its name; `images` is the batch size."""
        loss = torch.stack(list(losses.values())).sum()
        self.track(loss, images, **losses)
        return loss
