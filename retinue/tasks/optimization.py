"""Optimiser and learning-rate schedule of a recipe, built by timm."""

import inspect
import logging
import math
from collections.abc import Mapping
from typing import Any

import timm.optim
from pytorch_lightning.utilities import rank_zero_only
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.poly_lr import PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils.agc import adaptive_clip_grad
from torch import nn
from torch.optim import Optimizer

from models.openmmlab.interface import NET_PREFIX, DensePredictor
from models.weights import classifier_of
from retinue.tasks.plateau import PlateauScheduler
from retinue.utils.suggestions import nearest

log = logging.getLogger(__name__)

SCHEDULES = ("cosine", "step", "poly", "plateau")
# timm's optimisers that orthogonalise the updates of matrices.
MUON = ("muon", "nmuon", "adamuon", "nadamuon")


def check_optimizer(recipe: Mapping) -> None:
    """Check that timm has the recipe's optimiser, and that the schedule is one of `SCHEDULES`.

    Raises:
        ValueError: The optimiser or the schedule is unknown, a step schedule has no milestones, or a plateau schedule
            no patience or gamma, or `after_warmup` is set for one of these two.
    """
    name, known = recipe["optimizer"]["name"], [str(entry) for entry in timm.optim.list_optimizers()]
    if name not in known:
        raise ValueError(f"no optimiser is called {name!r}.{nearest(name, known)} There are: {', '.join(known)}")
    schedule = recipe["schedule"]
    if schedule["kind"] not in SCHEDULES:
        raise ValueError(f"recipe.schedule.kind must be {', '.join(SCHEDULES)}, not {schedule['kind']!r}")
    if schedule["kind"] == "step" and not schedule.get("milestones"):
        raise ValueError("recipe.schedule.kind=step needs recipe.schedule.milestones, such as [8, 11] (epochs)")
    if schedule["kind"] == "plateau" and None in (schedule.get("patience"), schedule.get("gamma")):
        raise ValueError("recipe.schedule.kind=plateau needs recipe.schedule.patience and gamma, such as 5 and 0.1")
    if schedule["kind"] in ("step", "plateau") and schedule.get("after_warmup"):
        raise ValueError(f"recipe.schedule.after_warmup is for kind=cosine and poly, not {schedule['kind']}")


def create_optimizer(model: nn.Module, recipe: Mapping, companion: nn.Module | None = None) -> Optimizer:
    """Create the recipe's optimiser.

    Norms, biases and the parameters that `model.no_weight_decay()` names take no weight decay. The learning rate is
    `optimizer.lr` * `batch_scale`. Two factors change it by layer:

    - `optimizer.layer_decay`: a layer's rate is multiplied by this factor to the power of the layer's distance from the
      classifier (BEiT, arXiv:2106.08254).
    - `optimizer.backbone_factor`: the rates of `model.backbone` are multiplied by this factor.

    The other keys of `optimizer` are arguments of `timm.optim.create_optimizer_v2`; null ones are left out. On a GPU,
    an optimiser with a fused form updates all weights in a few kernels. The optimisers of `MUON` take the parameters
    that `hidden_matrices` names; AdamW, which is a part of these optimisers, takes all others.

    Args:
        model: The net.
        recipe: A composed `conf/recipe/*.yaml`.
        companion: Module beside the net that learns too, such as projections for a teacher; without the two factors.

    Raises:
        ValueError: The optimiser is one of `MUON`, and the net has no hidden matrix.
    """
    settings = {key: value for key, value in recipe["optimizer"].items() if value is not None}
    settings["lr"] *= batch_scale(recipe)
    for key in ("lr_batch_size", "lr_scaling"):
        settings.pop(key, None)
    factor = settings.pop("backbone_factor", None)
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    name = settings.pop("name")
    if on_gpu(model) and has_fused_form(name):
        settings.setdefault("fused", True)
    if name in MUON:
        settings["fallback_list"] = parameters_for_adamw(model, name)
    optimizer = timm.optim.create_optimizer_v2(model, opt=name, **settings)
    # A fused optimiser would scale fp16 gradients back by itself, after they were clipped. Let the scaler do it before.
    optimizer._step_supports_amp_scaling = False  # pyright: ignore[reportAttributeAccessIssue]
    if factor is not None:
        _scale_backbone_rates(optimizer, model.backbone, factor)  # pyright: ignore[reportArgumentType]
    if companion is not None and any(parameter.requires_grad for parameter in companion.parameters()):
        plain = {k: v for k, v in recipe["optimizer"].items() if k not in ("layer_decay", "backbone_factor")}
        for group in create_optimizer(companion, {**recipe, "optimizer": plain}).param_groups:
            optimizer.add_param_group(group)
    return optimizer


def hidden_matrices(model: nn.Module) -> set[str]:
    """Return the names of the weights of linear layers and 1 x 1 convolutions, without those of the classifier.

    Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) is made for these: matrices between hidden
    features. Patch embeddings and other larger convolutions, tables of positions, tokens, norms and biases are none.
    Under a head, the matrices are those of the backbone.
    """
    layers = dict(model.named_modules())
    weights = {name: layers[name.rpartition(".")[0]] for name, _ in model.named_parameters() if name.endswith("weight")}
    matrices = {
        name
        for name, layer in weights.items()
        if isinstance(layer, nn.Linear)
        or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1)
    }
    if isinstance(model, DensePredictor):
        return {name for name in matrices if name.startswith(NET_PREFIX)}
    return matrices - classifier_of(model, matrices)


def parameters_for_adamw(model: nn.Module, name: str) -> list[str]:
    """Return the names of the parameters that an optimiser of `MUON` called `name` leaves to AdamW.

    Raises:
        ValueError: The net has no hidden matrix that could be trained by Muon.
    """
    matrices = hidden_matrices(model)
    others = [name for name, _ in model.named_parameters() if name not in matrices]
    if not any(parameter.requires_grad for name, parameter in model.named_parameters() if name in matrices):
        raise ValueError(
            f"recipe.optimizer.name={name} is for weights of linear layers and 1 x 1 convolutions, and the net trains "
            "none; recipe.optimizer.name=adamw trains any net"
        )
    return others


def clip_adaptively(model: nn.Module, factor: float) -> None:
    """Clip gradients relative to the weights by adaptive gradient clipping (AGC, arXiv:2102.06171, section 4).

    The norm of the gradient of each output unit becomes at most `factor` times the norm of the unit's weights, which
    counts as at least 1e-3. The classifier's gradients stay as they are.

    Args:
        model: The net, whose gradients are changed in place.
        factor: Largest ratio of the two norms, 0.01 in the paper.
    """
    parameters = dict(model.named_parameters())
    classifier = classifier_of(model, parameters)
    adaptive_clip_grad([parameter for name, parameter in parameters.items() if name not in classifier], factor)


def on_gpu(model: nn.Module) -> bool:
    """Tell whether all parameters are on CUDA devices."""
    return all(parameter.is_cuda for parameter in model.parameters())


def has_fused_form(name: str) -> bool:
    """Tell whether the optimiser that timm has under a name takes the argument `fused`."""
    if name not in timm.optim.list_optimizers():
        return False
    return "fused" in inspect.signature(timm.optim.get_optimizer_class(name, bind_defaults=False)).parameters


def _scale_backbone_rates(optimizer: Optimizer, backbone: nn.Module, factor: float) -> None:
    """Split each parameter group in two: the backbone's parameters, whose rate is scaled by `factor`, and the others.

    The schedule multiplies rates by a group's `lr_scale`.
    """
    backbone_ids = {id(parameter) for parameter in backbone.parameters()}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        scale = group.get("lr_scale", 1.0)
        in_backbone = [parameter for parameter in group["params"] if id(parameter) in backbone_ids]
        in_head = [parameter for parameter in group["params"] if id(parameter) not in backbone_ids]
        if in_backbone:
            groups.append(group | {"params": in_backbone, "lr_scale": scale * factor})
        if in_head:
            groups.append(group | {"params": in_head, "lr_scale": scale})
    optimizer.param_groups[:] = groups


def create_schedule(optimizer: Optimizer, recipe: Mapping, steps_per_epoch: int) -> Scheduler:
    """Create the recipe's schedule: a linear warm-up, then `schedule.kind`, by optimiser step.

    - cosine: the rate falls to `min_lr` along half a cosine.
    - poly: the rate falls to `min_lr` as (1 - t / T) ** `power`.
    - step: the rate is multiplied by `gamma` after each epoch of `milestones`.
    - plateau: the rate is multiplied by `gamma`, down to `min_lr`, after more than `patience` validations without a
      better figure.

    The cosine and the polynomial begin at the training's first step, as in timm, or with `after_warmup` at the end of
    the warm-up. The warm-up takes `warmup_steps` optimiser steps if that is set, else `warmup_epochs`. `warmup_lr` and
    `min_lr` are scaled with the batch size as `optimizer.lr` is.

    Args:
        optimizer: The optimiser of `create_optimizer`.
        recipe: A composed `conf/recipe/*.yaml`.
        steps_per_epoch: Number of optimiser steps of an epoch.
    """
    schedule, scale = recipe["schedule"], batch_scale(recipe)
    total = total_epochs(recipe, steps_per_epoch) * steps_per_epoch
    warmup = schedule.get("warmup_steps")
    if warmup is None:
        warmup = round(schedule["warmup_epochs"] * steps_per_epoch)
    if 2 * warmup > total and rank_zero_only.rank == 0:
        in_epochs = schedule.get("warmup_steps") is None
        tenth = f"warmup_epochs={total / steps_per_epoch / 10:.2g}" if in_epochs else f"warmup_steps={total // 10}"
        log.warning(
            "the warm-up takes %d of the run's %d steps, so most steps have less than the recipe's learning rate; "
            "recipe.schedule.%s is a tenth", min(warmup, total), total, tenth,
        )  # fmt: skip
    common: dict[str, Any] = {
        "warmup_t": min(warmup, total),
        "warmup_lr_init": schedule["warmup_lr"] * scale,
        "t_in_epochs": False,
    }
    if schedule["kind"] == "plateau":
        return PlateauScheduler(
            optimizer, schedule["gamma"], schedule["patience"], schedule["min_lr"] * scale,
            warmup_steps=common["warmup_t"], warmup_lr=common["warmup_lr_init"],
        )  # fmt: skip
    if schedule["kind"] == "step":
        # timm changes the rate one step before a milestone.
        milestones = [round(epoch * steps_per_epoch) + 1 for epoch in schedule["milestones"]]
        return MultiStepLRScheduler(optimizer, milestones, schedule["gamma"], warmup_prefix=False, **common)
    after_warmup = bool(schedule.get("after_warmup"))
    steps = total - common["warmup_t"] if after_warmup else total
    common |= {"t_initial": max(1, steps), "lr_min": schedule["min_lr"] * scale, "warmup_prefix": after_warmup}
    if schedule["kind"] == "poly":
        return PolyLRScheduler(optimizer, power=schedule["power"], **common)
    return CosineLRScheduler(optimizer, **common)


def total_epochs(recipe: Mapping, steps_per_epoch: int) -> int:
    """Return the recipe's `epochs`, or the smallest number of whole epochs with at least its `steps`."""
    steps = recipe.get("steps")
    return recipe["epochs"] if steps is None else math.ceil(steps / max(1, steps_per_epoch))


def batch_scale(recipe: Mapping) -> float:
    """Return the factor of all learning rates, which a recipe gives for `lr_batch_size` images per step.

    The factor is the ratio of the two batch sizes, or with `optimizer.lr_scaling` sqrt its square root.
    """
    ratio = recipe["batch_size"] / recipe["optimizer"]["lr_batch_size"]
    return math.sqrt(ratio) if recipe["optimizer"].get("lr_scaling") == "sqrt" else ratio
