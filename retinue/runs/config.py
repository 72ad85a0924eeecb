"""Check a composed config, resolve its interpolations, and merge it with a run's config for inference."""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from retinue.runs.default_recipe import recipe_for
from retinue.runs.folders import EVALUATIONS, PREDICTIONS, PROBINGS
from retinue.runs.identity import WEIGHTS_DIGESTS, fingerprint, run_folder
from retinue.runs.preprocessing import resolve_preprocessing, resolved_data
from retinue.runs.result_file import CONFIG, read_config
from retinue.runs.schema import PROGRAMS, check_values, program_of
from retinue.utils.openmmlab_packages import require_openmmlab
from retinue.utils.paths import CONF
from retinue.utils.sizes import model_name, size_pixels
from retinue.utils.suggestions import nearest

# Our names of precisions -> Lightning's.
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def register_resolvers() -> None:
    """Register the interpolations that conf/ uses; call this before Hydra composes."""
    OmegaConf.register_new_resolver("recipe_for", recipe_for, replace=True)
    OmegaConf.register_new_resolver("at_most", at_most, replace=True)
    OmegaConf.register_new_resolver("by_kind", by_kind, replace=True)
    folders = {
        "run_folder": run_folder, "evaluation_folder": evaluation_folder, "prediction_folder": prediction_folder,
        "probing_folder": probing_folder,
    }  # fmt: skip
    for name, folder in folders.items():
        resolver = partial(_checked_folder, folder)
        OmegaConf.register_new_resolver(name, lambda *, _root_, resolver=resolver: resolver(_root_), replace=True)


def at_most(length: float, limit: Any) -> float:
    """Return the shorter of two lengths, for a recipe whose warm-up is to end within any training; see `check_values`.

    Args:
        length: the length, in epochs.
        limit: the length of the training in epochs; a value that is no number is left to the schema.
    """
    return min(length, limit) if isinstance(limit, int) and limit > 0 else length


def by_kind(kind: str, small: Any, other: Any) -> Any:
    """Return the value of a method for small data or for other data: the papers' values are for a million images.

    Args:
        kind: the kind of the data, such as small or imagenet.
        small: the value for small data.
        other: the value for other data.
    """
    return small if kind == "small" else other


def _checked_folder(folder: Callable[[DictConfig], str], cfg: DictConfig) -> str:
    """Return the folder of a config that Hydra is composing; a value from which none follows is refused in one line."""
    try:
        return folder(cfg)
    except Exception:
        check_values(cfg)
        raise


def per_device_batch(cfg: DictConfig) -> int:
    """Return the number of images in one batch of one device.

    All devices and accumulated batches together give recipe.batch_size images a step.

    Raises:
        ValueError: recipe.batch_size cannot be divided evenly.
    """
    total, shares = cfg.recipe.batch_size, world_size(cfg) * cfg.trainer.accumulate_grad_batches
    if total % shares:
        divisible = max(1, round(total / shares)) * shares
        raise ValueError(
            f"recipe.batch_size={total} (images a step, over all devices) cannot be shared by {world_size(cfg)} "
            f"devices x {cfg.trainer.accumulate_grad_batches} accumulated batches; the nearest that can: {divisible}"
        )
    return total // shares


def world_size(cfg: DictConfig) -> int:
    """Return the number of devices on all machines, which is the number of processes."""
    return cfg.trainer.devices * cfg.trainer.num_nodes


def check(cfg: DictConfig) -> None:
    """Refuse a config that would fail only later.

    Raises:
        ValueError: the message says what is expected, what the config has, and the nearest value that works.
    """
    import torch

    check_values(cfg)
    if cfg.head.get("library", "own") != "own":
        require_openmmlab(f"task={cfg.task.name} head={cfg.head.name}")
    devices, accelerator = cfg.trainer.devices, cfg.trainer.accelerator
    gpus = torch.cuda.device_count()
    if accelerator in ("gpu", "cuda") and devices > gpus:
        possible = f"trainer.devices={gpus}" if gpus else "trainer=cpu"
        raise ValueError(f"trainer.devices={devices}, but this machine has {gpus} GPUs; it can run with {possible}")
    on_a_cpu = accelerator == "cpu" or (accelerator == "auto" and not (gpus or torch.backends.mps.is_available()))
    if on_a_cpu and cfg.trainer.precision == "fp16":
        raise ValueError("trainer.precision=fp16 needs a GPU; a CPU takes fp32, or bf16 for mixed precision")
    if on_a_cpu and cfg.trainer.strategy == "fsdp" and torch.__version__ < "2.11":
        raise ValueError(
            f"trainer.strategy=fsdp on CPUs needs torch 2.11 or newer, not {torch.__version__}, since torch 2.8 sums "
            "the gradients of the processes where FSDP asks for their mean; trainer.strategy=ddp works"
        )
    distills_maps = all(OmegaConf.select(cfg, f"task.distillation.{key}") for key in ("teacher", "maps.loss"))
    if cfg.trainer.strategy == "fsdp" and distills_maps:
        raise ValueError("task.distillation.maps has projections that fsdp does not shard: trainer.strategy=ddp")
    per_device_batch(cfg)


def evaluation_folder(cfg: DictConfig) -> str:
    """Return the folder of an evaluation: `evaluation/<8 hex>` in the folder of the run that it evaluates.

    An evaluation of other weights has the folder `outputs/evaluation/<data>/<model>/<8 hex>`.
    """
    return _inference_folder(cfg, EVALUATIONS)


def prediction_folder(cfg: DictConfig) -> str:
    """Return the folder of predictions: the chosen one, or the one beside those of evaluations."""
    return _inference_folder(cfg, PREDICTIONS) if cfg.save is None else str(Path(cfg.save).expanduser())


def probing_folder(cfg: DictConfig) -> str:
    """Return the folder of a probe's result, beside those of evaluations: `probing/<8 hex>` in the folder of a run."""
    return _inference_folder(cfg, PROBINGS)


def _inference_folder(cfg: DictConfig, kind: str) -> str:
    digest = fingerprint(cfg)[:8]
    if cfg.run is not None:
        return f"{_run_folder(cfg.run)}/{kind}/{digest}"
    return f"outputs/{kind}/{cfg.data.name}/{model_name(cfg.model, size_pixels(resolved_data(cfg)))}/{digest}"


def allow_run_keys(arguments: Sequence[str]) -> list[str]:
    """Prefix overrides of a run's keys with `++`, so that Hydra accepts keys that the command's yaml lacks.

    Args:
        arguments: command line of `eval.py` or `predict.py`. Without `run=DIR` it is returned unchanged.
    """
    names = {argument.split("=")[0] for argument in arguments}
    if "run" not in names:
        return list(arguments)
    # A group that the command line chooses brings its own keys.
    groups = "|".join({"data", "head", "model", "recipe", "task"} - names)
    return [f"++{text}" if re.match(rf"({groups})\.[\w.]+=", text) else text for text in arguments]


def with_run(cfg: DictConfig, overrides: Sequence[str], groups: Iterable[str]) -> DictConfig:
    """Return the config that `eval.py` or `predict.py` uses: with `run=DIR`, the run's config and its best weights.

    The preprocessing that the config leaves open is filled in.

    The trainer is the command's, since a run from eight GPUs may be evaluated on a laptop; its precision is the run's.

    Args:
        cfg: config of the command, which is changed.
        overrides: overrides of the command; they win over the run's config.
        groups: config groups that the command has chosen.

    Raises:
        ValueError: a value of the command is wrong, there is no such run, it has no checkpoint, or its config lacks an
            overridden key.
    """
    check_values(cfg)
    if cfg.run is not None:
        folder = _run_folder(cfg.run)
        run_cfg, path = read_config(folder), folder / CONFIG
        assert run_cfg is not None
        # A run of an earlier version lacks keys that its task has now.
        task_defaults = OmegaConf.load(CONF / "task" / f"{run_cfg.task.name}.yaml")
        run_cfg.task = OmegaConf.merge(task_defaults, run_cfg.task)
        # So does its net: `model` has here the keys that every net has.
        run_cfg.model = OmegaConf.merge(OmegaConf.load(CONF / "eval.yaml").model, run_cfg.model)
        if run_cfg.data.get("task") == "classification":
            run_cfg.data.setdefault("corrupt", None)
        # The digests are those of the files that the run started from.
        run_cfg.pop(WEIGHTS_DIGESTS, None)
        given = [override.split("=")[0].lstrip("+~").split("@")[0] for override in overrides]
        if not {"trainer", "trainer.precision"} & set(given):
            cfg.trainer.precision = run_cfg.trainer.precision
        for key in (override[2:].split("=")[0] for override in overrides if override.startswith("++")):
            section, _, name = key.rpartition(".")
            known = OmegaConf.select(run_cfg, section)
            known_names = list(map(str, known)) if OmegaConf.is_dict(known) else []
            if name not in known_names:
                raise ValueError(f"there is no key {key!r} in {path}.{nearest(name, known_names)}")
        own_keys = set(PROGRAMS[program_of(cfg)].model_fields) - {"seed", "weights"}
        for key in {*own_keys, *given} - {"run"}:
            section = key.split(".")[0] if key in groups else key
            OmegaConf.update(run_cfg, section, OmegaConf.select(cfg, section), force_add=True)
        if cfg.weights is None:
            run_cfg.weights = str(best_checkpoint(folder))
        cfg = run_cfg
    cfg.trainer.accumulate_grad_batches = 1
    batch_size = cfg.task.eval_batch if cfg.batch_size is None else cfg.batch_size
    cfg.recipe.batch_size = batch_size * world_size(cfg)
    resolve_preprocessing(cfg)
    return cfg


def best_checkpoint(run: Path) -> Path:
    """Return the file with the weights of a run that are tested, or so far the newest ones.

    Raises:
        ValueError: the run has no checkpoint yet.
    """
    # retinue.runs.checkpoints has the same names.
    for name in ("average.safetensors", "best.ckpt", "last.ckpt"):
        if (run / "checkpoints" / name).exists():
            return run / "checkpoints" / name
    raise ValueError(f"{run} has no checkpoint yet")


def _run_folder(run: Any) -> Path:
    """Return the folder of the run `run=...`, relative to the working folder if the run lies below it.

    Raises:
        ValueError: there is no run in the folder.
    """
    if not isinstance(run, str) or not (Path(run) / CONFIG).is_file():
        raise ValueError(f"run={run} is no run folder: it has no {CONFIG}")
    # Different spellings of a folder, such as a/../X/, must lead to the same folder of evaluations.
    path = Path(run).resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
