"""Contract of a method of self-supervised pretraining."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.views import Shape
from retinue.tasks.methods.multi_crop import pooled

# Shorter side, in pixels, from which images count as large: smaller ones have smaller patches and decoders by default.
LARGE = 128


class Method(nn.Module):
    """A backbone, what is trained along with it, and the loss.

    A method is one file here with a subclass, and one yaml in `conf/method/` with its `_target_`, `name`, default
    `recipe`, the `views` of an image that it takes (`datamodules.views.View`) and arguments of the class. A subclass
    adds its modules (decoder, projector, teacher, ...) and defines `forward`. All of them are part of the checkpoint.

    The backbone is what remains: its features are evaluated, and other tasks take its weights from the checkpoint,
    where their names begin with `backbone.`. A method with a momentum teacher whose weights are to remain has the
    teacher as `backbone`, without gradients, and trains a copy.

    Args:
        backbone: Net from the registry without a classifier, with timm's interface.
        image_size: (height, width) of the images in pixels.
        in_chans: Number of image channels.
        views: Size and mask of each view, in the order of the batch's views.

    Attributes:
        trained: Name of the module that is trained as the backbone.
        copies: Names of further copies of the backbone, which begin with the same weights.
    """

    trained = "backbone"
    copies: tuple[str, ...] = ()

    def __init__(self, backbone: nn.Module, *, image_size: tuple[int, int], in_chans: int, views: Sequence[Shape]):
        super().__init__()
        self.backbone: Any = backbone
        self.image_size, self.in_chans, self.views = image_size, in_chans, views

    @staticmethod
    def mask_patch(side: int) -> int:
        """Return the side of a mask's patch by default, for images of this shorter side, in pixels."""
        return 32 if side >= LARGE else side // 8

    def forward(self, batch: dict[str, Any], progress: float) -> dict[str, Tensor]:
        """Compute the losses of a batch, scalars by name: `loss` is minimised, the others are only logged.

        Nothing may change here but by gradients, since an evaluation calls it too, then in evaluation mode and with
        batches of unequal sizes on the processes: collective operations are for training mode only
        (`retinue.tasks.methods.processes.gather`).

        Args:
            batch: A batch of `datamodules.pretraining.PretrainingData`.
            progress: Share of the training's optimiser steps that are done, from 0 to 1.
        """
        raise NotImplementedError

    def before_step(self, optimizer: Optimizer, progress: float) -> None:
        """Change the optimiser's groups or the gradients before each optimiser step, by a schedule of the method.

        Args:
            optimizer: The optimiser, whose groups are part of the checkpoint.
            progress: Share of the training's optimiser steps that are done, without this one.
        """

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Do what follows each optimiser step, such as updating a momentum teacher.

        Args:
            progress: Share of the training's optimiser steps that are done, this one included.
        """

    def features(self, image: Tensor) -> Tensor:
        """Return the features (B, D) of images (B, C, H, W) that are evaluated: those that a classifier would read."""
        return pooled(self.backbone, image)

    @property
    def feature_dim(self) -> int:
        """Number of channels of `features`; a classifier with hidden layers reads more than `num_features`."""
        return getattr(self.backbone, "head_hidden_size", self.backbone.num_features)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that take no weight decay beside norms and biases (timm's interface)."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        return {f"{self.trained}.{name}" for name in names}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        trained: Any = self.get_submodule(self.trained)
        trained.set_grad_checkpointing(enable)
