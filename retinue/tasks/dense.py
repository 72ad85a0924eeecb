"""What detection and segmentation share: a backbone under a head."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from models.openmmlab.build import DensePredictor
from models.unpickling import read_weights
from models.weights import load_weights, unwrap
from retinue.tasks.base import Task


class DenseTask(Task):
    """A task whose net computes its own losses by name, to be summed.

    `methods` of the net are called beside `forward`.
    """

    model: DensePredictor
    methods: tuple[str, ...] = ("loss",)

    def start_from(self, weights: str | Path, drop_classifier: bool) -> None:
        """Load the weights of a whole net of this kind, or a backbone's: those of a classifier, or of any net with
        `drop_classifier`."""
        names, _ = unwrap(read_weights(weights), self.model.state_dict())
        whole = self.model.is_whole(names) and not drop_classifier
        load_weights(self.model if whole else self.model.backbone, weights)

    def setup(self, stage: str) -> None:
        if self.compile_model:
            self.model.backbone.compile()  # the heads' shapes change from image to image

    def configure_model(self) -> None:
        super().configure_model()
        if isinstance(self.model, FSDPModule):  # which gathers the weights for `forward` alone
            for method in self.methods:
                register_fsdp_forward_method(self.model, method)

    @staticmethod
    def picture(folder: Path, images: Any, index: int) -> Path:
        """Where the report's picture of an image goes."""
        name = re.sub(r"[^\w.-]+", "_", str(Path(images.name(index)).with_suffix("")))
        return folder / "images" / f"{name}.png"

    def summed(self, losses: dict[str, Tensor], images: int) -> Tensor:
        """The sum of a batch's losses, each of which is tracked under its name."""
        loss = torch.stack(list(losses.values())).sum()
        self.track(loss, images, **losses)
        return loss
