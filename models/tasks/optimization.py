"""Optimiser and learning-rate schedule from a recipe; both are timm's."""

from collections.abc import Mapping

import timm.optim
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn
from torch.optim import Optimizer

from ops.registry import nearest


def check_optimizer(recipe: Mapping) -> None:
    """Raises ValueError for an optimiser that timm does not have."""
    name, known = recipe["optimizer"]["name"], [str(each) for each in timm.optim.list_optimizers()]
    if name not in known:
        raise ValueError(f"no optimiser is called {name!r}.{nearest(name, known)} There are: {', '.join(known)}")


def create_optimizer(model: nn.Module, recipe: Mapping) -> Optimizer:
    """The recipe's optimiser: no weight decay on norms, biases and what `model.no_weight_decay()` names.

    The learning rate is `optimizer.lr` times batch_size / optimizer.lr_batch_size. With `layer_decay`, a layer's rate
    is that factor to the power of its distance from the classifier (BEiT, arXiv:2106.08254).
    """
    settings = {key: value for key, value in recipe["optimizer"].items() if value is not None}
    settings["lr"] *= batch_scale(recipe)
    del settings["lr_batch_size"]
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    return timm.optim.create_optimizer_v2(model, opt=settings.pop("name"), **settings)


def create_schedule(optimizer: Optimizer, recipe: Mapping, steps_per_epoch: int) -> CosineLRScheduler:
    """Linear warm-up, then a cosine to `schedule.min_lr`, by optimiser step."""
    schedule, scale = recipe["schedule"], batch_scale(recipe)
    total = recipe["epochs"] * steps_per_epoch
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, total),
        lr_min=schedule["min_lr"] * scale,
        warmup_t=min(round(schedule["warmup_epochs"] * steps_per_epoch), total),
        warmup_lr_init=schedule["warmup_lr"] * scale,
        t_in_epochs=False,
    )


def batch_scale(recipe: Mapping) -> float:
    """All learning rates of a recipe are for `lr_batch_size` images a step and are linear in the batch size."""
    return recipe["batch_size"] / recipe["optimizer"]["lr_batch_size"]
