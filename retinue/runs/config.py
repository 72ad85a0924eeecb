"""What the config means: the recipe that goes with the data, the run's identity and folder, and its checks."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from retinue.runs.default_recipe import recipe_for
from retinue.runs.identity import fingerprint, run_folder
from retinue.utils.paths import CONF
from retinue.utils.sizes import model_name, size_pixels


def register_resolvers() -> None:
    """The interpolations that conf/ uses; to be called before Hydra composes."""
    OmegaConf.register_new_resolver("recipe_for", recipe_for, replace=True)
    OmegaConf.register_new_resolver("run_folder", lambda *, _root_: run_folder(_root_), replace=True)
    OmegaConf.register_new_resolver("evaluation_folder", lambda *, _root_: evaluation_folder(_root_), replace=True)


def per_device_batch(cfg: DictConfig) -> int:
    """Images in one batch of one device, so that all devices and accumulated batches give recipe.batch_size.

    Raises:
        ValueError: recipe.batch_size cannot be shared out evenly.
    """
    total, shares = cfg.recipe.batch_size, world_size(cfg) * cfg.trainer.accumulate_grad_batches
    if total % shares:
        near = max(1, round(total / shares)) * shares
        raise ValueError(
            f"recipe.batch_size={total} (images a step, over all devices) cannot be shared by {world_size(cfg)} "
            f"devices x {cfg.trainer.accumulate_grad_batches} accumulated batches; the nearest that can: {near}"
        )
    return total // shares


def world_size(cfg: DictConfig) -> int:
    return cfg.trainer.devices * cfg.trainer.num_nodes


def check(cfg: DictConfig) -> None:
    """Refuse what could only fail later.

    Raises:
        ValueError: with what was expected, what came and the nearest that works.
    """
    import torch

    if cfg.data.task != cfg.task.name:
        raise ValueError(f"data={cfg.data.name} is for task={cfg.data.task}, not task={cfg.task.name}")
    if cfg.head.get("task", cfg.task.name) != cfg.task.name:
        others = [path.stem for path in sorted((CONF / "head").glob("*.yaml")) if _is_for(path, cfg.task.name)]
        takes = f"which has {', '.join(others)}" if others else "which takes none"
        raise ValueError(f"head={cfg.head.name} is for task={cfg.head.task}, not task={cfg.task.name}, {takes}")
    if cfg.recipe.get("task", cfg.task.name) != cfg.task.name:
        raise ValueError(f"this recipe is for task={cfg.recipe.task}, not task={cfg.task.name}, which has its own")
    devices, accelerator = cfg.trainer.devices, cfg.trainer.accelerator
    if not isinstance(devices, int) or devices < 1:
        raise ValueError(f"trainer.devices must be a number of devices, 1 or more, not {devices!r}")
    gpus = torch.cuda.device_count()
    if accelerator in ("gpu", "cuda") and devices > gpus:
        instead = f"trainer.devices={gpus}" if gpus else "trainer=cpu"
        raise ValueError(f"trainer.devices={devices}, but this machine has {gpus} GPUs; it can run with {instead}")
    if cfg.trainer.precision not in PRECISIONS:
        raise ValueError(f"trainer.precision must be one of {', '.join(PRECISIONS)}, not {cfg.trainer.precision!r}")
    if cfg.trainer.strategy == "fsdp" and cfg.recipe.ema.decay is not None:
        raise ValueError("trainer.strategy=fsdp has no average of the weights: recipe.ema.decay=null, or trainer=ddp")
    epochs, steps = cfg.recipe.epochs, cfg.recipe.get("steps")
    if (epochs is None) == (steps is None):
        given = f"recipe.epochs={epochs} and recipe.steps={steps}".replace("None", "null")
        raise ValueError(f"a recipe has a number of epochs or of steps, and the other is null; not {given}")
    name, length = ("epochs", epochs) if steps is None else ("steps", steps)
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"recipe.{name} must be a whole number, 1 or more, not {length!r}")
    per_device_batch(cfg)


def _is_for(head: Path, task: str) -> bool:
    return not head.stem.startswith("default_") and yaml.safe_load(head.read_text())["task"] == task


PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}  # ours -> Lightning's


def evaluation_folder(cfg: DictConfig) -> str:
    """Where `eval.py` writes: below the run that it evaluates, or `outputs/evaluation/<data>/<model>/<8 hex>`."""
    digest = fingerprint(cfg)[:8]
    if cfg.run is not None:
        return f"{_run_config(cfg.run).parent}/evaluation/{digest}"
    return f"outputs/evaluation/{cfg.data.name}/{model_name(cfg.model, size_pixels(cfg.data))}/{digest}"


def beside_a_run(arguments: Sequence[str]) -> list[str]:
    """A command line on which keys of the run's config, which the command's own need not have, are Hydra's `++`."""
    names = {argument.split("=")[0] for argument in arguments}
    if "run" not in names:
        return list(arguments)
    # a group that is named brings its own keys
    groups = "|".join({"data", "head", "model", "recipe", "task"} - names)
    return [f"++{one}" if re.match(rf"({groups})\.[\w.]+=", one) else one for one in arguments]


def with_run(cfg: DictConfig, overrides: Sequence[str], groups: Iterable[str]) -> DictConfig:
    """What `eval.py` evaluates: with `run=DIR` that run's config and best weights, under the keys given in `overrides`.

    The trainer is the command's, since a run from eight GPUs may be evaluated on a laptop; its precision is the run's.
    """
    from retinue.utils.suggestions import nearest

    if cfg.run is not None:
        run = _run_config(cfg.run).parent
        there = OmegaConf.load(run / "config.yaml")
        assert isinstance(there, DictConfig)
        given = [override.split("=")[0].lstrip("+~").split("@")[0] for override in overrides]
        if not {"trainer", "trainer.precision"} & set(given):
            cfg.trainer.precision = there.trainer.precision
        for key in (override[2:].split("=")[0] for override in overrides if override.startswith("++")):
            section, _, name = key.rpartition(".")
            known = OmegaConf.select(there, section)
            if name not in (known or {}):
                hint = nearest(name, map(str, known or ()))
                raise ValueError(f"there is no key {key!r} in {run}/config.yaml.{hint}")
        for key in {"trainer", "batch_size", "save_images", "ops", "run_dir", *given} - {"run"}:
            section = key.split(".")[0] if key in groups else key
            OmegaConf.update(there, section, OmegaConf.select(cfg, section), force_add=True)
        best = [path for name in ("best.ckpt", "last.ckpt") if (path := run / "checkpoints" / name).exists()]
        if cfg.weights is None:
            if not best:
                raise ValueError(f"{run} has no checkpoint yet")
            there.weights = str(best[0])
        cfg = there
    cfg.trainer.accumulate_grad_batches = 1
    cfg.recipe.batch_size = (cfg.batch_size or cfg.task.eval_batch) * world_size(cfg)
    return cfg


def _run_config(run: str) -> Path:
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise ValueError(f"run={run} is no run folder: it has no config.yaml")
    return path
