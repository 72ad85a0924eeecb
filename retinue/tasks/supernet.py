"""Task of training a supernet, whose weights many architectures share: ViT-ResNAS (2021, arXiv:2109.00642).

Written after the paper and what the authors' repository, yilunliao/vit-search, computes; none of its code is here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from models.supernets.vit_resnas import ViTResNASSupernet
from retinue.tasks.classification import Classification


class Supernet(Classification):
    """Classification by a net that draws architectures; the figures are those of the largest architecture.

    In the first epochs the drawn sizes grow from the largest to all of the space, and heads and hidden channels are
    sorted by the size of their weights at the beginning of each epoch, so that narrow architectures get the most useful
    ones. Unlike in the authors' code, what the optimiser keeps of a weight moves with it.

    Args:
        model: The supernet.
        recipe: As in `Classification`; without an average of the weights, since their order changes.
        warmup_epochs: Number of these first epochs.
        kwargs: Further arguments of `Classification`.

    Raises:
        ValueError: The net is no supernet, the recipe has an average of the weights, or maps are distilled.
    """

    model: ViTResNASSupernet  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, model: nn.Module, recipe: Mapping, *, warmup_epochs: int, **kwargs):
        if not isinstance(model, ViTResNASSupernet):
            raise ValueError(f"task=supernet needs model=vit_resnas_supernet, not a {type(model).__name__}")
        if recipe["ema"]["decay"] is not None:
            raise ValueError("task=supernet sorts the weights anew, so they have no average: recipe.ema.decay=null")
        super().__init__(model, recipe, **kwargs)
        if self.map_settings is not None:
            raise ValueError(
                "task=supernet draws widths, so its maps are not compared: task.distillation.maps.loss=null"
            )
        self.warmup_epochs = warmup_epochs

    @staticmethod
    def data_arguments(cfg: Any) -> dict[str, Any]:
        return {"holdout": cfg.task.holdout}

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.current_epoch <= self.warmup_epochs:
            self.sort_channels()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.model.share = min(1.0, self.current_epoch / self.warmup_epochs) if self.warmup_epochs else 1.0

    @torch.no_grad()
    def sort_channels(self) -> None:
        """Sort heads and hidden channels, those with the largest weights first, with their state in the optimiser."""
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        for parameter, dim, order in list(self.model.importance_orders()):
            state = optimizer.state.get(parameter, {}).values()
            for tensor in (parameter, *(value for value in state if isinstance(value, torch.Tensor))):
                if tensor.shape == parameter.shape:
                    tensor.copy_(tensor.index_select(dim, order))
