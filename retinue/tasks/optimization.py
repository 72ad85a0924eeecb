"""Optimiser and learning-rate schedule from a recipe; both are timm's."""

import math
from collections.abc import Mapping
from typing import Any

import timm.optim
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.poly_lr import PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from retinue.utils.suggestions import nearest

SCHEDULES = ("cosine", "step", "poly")


def check_optimizer(recipe: Mapping) -> None:
    """Raises ValueError for an optimiser that timm does not have, or a schedule that is not here."""
    name, known = recipe["optimizer"]["name"], [str(each) for each in timm.optim.list_optimizers()]
    if name not in known:
        raise ValueError(f"no optimiser is called {name!r}.{nearest(name, known)} There are: {', '.join(known)}")
    schedule = recipe["schedule"]
    if schedule["kind"] not in SCHEDULES:
        raise ValueError(f"recipe.schedule.kind must be {', '.join(SCHEDULES)}, not {schedule['kind']!r}")
    if schedule["kind"] == "step" and not schedule.get("milestones"):
        raise ValueError("recipe.schedule.kind=step needs recipe.schedule.milestones, such as [8, 11] (epochs)")


def create_optimizer(model: nn.Module, recipe: Mapping) -> Optimizer:
    """The recipe's optimiser: no weight decay on norms, biases and what `model.no_weight_decay()` names.

    The learning rate is `optimizer.lr` times batch_size / optimizer.lr_batch_size. With `layer_decay`, a layer's rate
    is that factor to the power of its distance from the classifier (BEiT, arXiv:2106.08254); with `backbone_factor`,
    the rates of `model.backbone` are that factor of the heads'.
    """
    settings = {key: value for key, value in recipe["optimizer"].items() if value is not None}
    settings["lr"] *= batch_scale(recipe)
    del settings["lr_batch_size"]
    factor = settings.pop("backbone_factor", None)
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    optimizer = timm.optim.create_optimizer_v2(model, opt=settings.pop("name"), **settings)
    if factor is not None:
        _slow_down(optimizer, model.backbone, factor)  # pyright: ignore[reportArgumentType]
    return optimizer


def _slow_down(optimizer: Optimizer, backbone: nn.Module, factor: float) -> None:
    """Split each group of parameters into the backbone's, whose rate is scaled, and the others."""
    slow = {id(parameter) for parameter in backbone.parameters()}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        scale = group.get("lr_scale", 1.0)
        for mine, relative in ((True, factor), (False, 1.0)):
            chosen = [parameter for parameter in group["params"] if (id(parameter) in slow) == mine]
            if chosen:
                groups.append(group | {"params": chosen, "lr_scale": scale * relative})  # which the schedule applies
    optimizer.param_groups[:] = groups


def create_schedule(optimizer: Optimizer, recipe: Mapping, steps_per_epoch: int) -> Scheduler:
    """Linear warm-up, then `schedule.kind`, by optimiser step.

    cosine falls to `min_lr`; poly falls to it as (1 - t / T) ** `power`; step multiplies by `gamma` after each epoch
    of `milestones`. The warm-up takes `warmup_epochs`, or `warmup_steps`.
    """
    schedule, scale = recipe["schedule"], batch_scale(recipe)
    total = total_epochs(recipe, steps_per_epoch) * steps_per_epoch
    warmup = schedule.get("warmup_steps")
    warmup = round(schedule["warmup_epochs"] * steps_per_epoch) if warmup is None else warmup
    common: dict[str, Any] = {
        "warmup_t": min(warmup, total),
        "warmup_lr_init": schedule["warmup_lr"] * scale,
        "t_in_epochs": False,
    }
    if schedule["kind"] == "step":
        milestones = [
            round(epoch * steps_per_epoch) + 1 for epoch in schedule["milestones"]
        ]  # timm's come a step early
        return MultiStepLRScheduler(optimizer, milestones, schedule["gamma"], warmup_prefix=False, **common)
    common |= {"t_initial": max(1, total), "lr_min": schedule["min_lr"] * scale}
    if schedule["kind"] == "poly":
        return PolyLRScheduler(optimizer, power=schedule["power"], **common)
    return CosineLRScheduler(optimizer, **common)


def total_epochs(recipe: Mapping, steps_per_epoch: int) -> int:
    """The recipe's `epochs`, or the fewest whole ones that have its `steps`."""
    steps = recipe.get("steps")
    return recipe["epochs"] if steps is None else math.ceil(steps / max(1, steps_per_epoch))


def batch_scale(recipe: Mapping) -> float:
    """All learning rates of a recipe are for `lr_batch_size` images a step and are linear in the batch size."""
    return recipe["batch_size"] / recipe["optimizer"]["lr_batch_size"]
