"""Train a net from a composed config, test it, and write its result."""

import contextlib
import csv
import logging
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.utilities import rank_zero_only

from models import load_weights
from models.complexity import complexity
from ops.backend import set_backend
from retinue.evaluation.plots import plot_curves
from retinue.runs.batch_norm import BatchNormStatistics
from retinue.runs.checkpoints import LAST, AtomicCheckpointIO, Checkpoints, find_resume, weights_to_test
from retinue.runs.classifier_map import read_classifier_map
from retinue.runs.config import PRECISIONS, check, per_device_batch, world_size
from retinue.runs.ema import EMA
from retinue.runs.folders import foreign_content, no_empty_folder, refuse_inside_a_run
from retinue.runs.identity import WEIGHTS_DIGESTS, fingerprint, flatten, identity, weights_digests
from retinue.runs.launch import launch, needs_launch, rank, slurm_tasks
from retinue.runs.loggers import MetricsCSV, links
from retinue.runs.preprocessing import resolve_preprocessing, resolved_data
from retinue.runs.progress import TrainingLog
from retinue.runs.replacement import is_undecided, recover, set_aside
from retinue.runs.result_file import (
    CLASSES,
    CONFIG,
    RESULT,
    provenance,
    read_config,
    read_result,
    show_result,
    write_result,
)
from retinue.runs.small_sets import fit_batch
from retinue.runs.status import attempt, locked, recorded_failure
from retinue.tasks.base import Task
from retinue.tasks.optimization import total_epochs
from retinue.utils.arithmetic import ceil_div
from retinue.utils.files import link_or_copy, replacing
from retinue.utils.sizes import model_name, size_pixels

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> dict[str, Any]:
    """Train as composed, on as many devices as the config says; a finished run is not trained again.

    Returns:
        The metrics of `result.json`: `test/top1`, `test/top1_ci95`, ...

    Raises:
        ValueError: the config is contradictory or asks for something that this machine or the project cannot do.
    """
    folder = Path(str(cfg.run_dir))
    with no_empty_folder(folder):
        with recorded_failure(folder, only_in_a_sweep=True):
            check(cfg)
        refuse_inside_a_run(folder)
        if rank() == 0 and is_undecided(folder):
            with locked(folder):
                recover(folder)
        resolve_preprocessing(cfg)
        cfg.rerun = starts_anew(cfg, folder)
        result = None if cfg.rerun else read_result(folder)
        if result is None:
            with attempt(folder), replacing_run(folder):
                if needs_launch(cfg):
                    launch(train_here, cfg)
                    result = read_result(folder)
                else:
                    result = train_here(cfg)
    assert result is not None
    if rank() == 0:
        show_result(result, folder)
    return result["metrics"]


@contextlib.contextmanager
def replacing_run(folder: Path) -> Iterator[None]:
    """Bring back the run that `rerun=true` was to replace if the block fails before the new run has a checkpoint."""
    try:
        yield
    except BaseException:
        if rank() == 0:
            recover(folder)
        raise


def train_here(cfg: DictConfig) -> dict[str, Any]:
    """Train in this process, test the best weights and write `result.json`; return the result.

    This process may be one rank of several. Training goes on from the newest checkpoint of the run's folder, if any.
    """
    folder, began = Path(cfg.run_dir), time.monotonic()
    quiet_libraries()
    set_backend(cfg.ops.backend)
    pl.seed_everything(cfg.seed, verbose=False)
    datamodule = build_data(cfg)
    images = len(datamodule.images("train"))
    fit_batch(cfg, images)
    if cfg.recipe.batch_size > images:
        raise ValueError(
            f"recipe.batch_size={cfg.recipe.batch_size} is more than the {images} training images, so a step would be "
            f"smaller than its learning rate is made for; recipe.batch_size={images} is the largest"
        )
    datamodule.batch_size = per_device_batch(cfg)
    check_limits(cfg, datamodule)
    task = build_task(cfg, datamodule)
    check_sizes(task, datamodule)
    task.prepare_training(datamodule)
    checkpoints = folder / "checkpoints"
    resume, step = (None, 0) if cfg.rerun else find_resume(checkpoints, task.state_dict())
    if resume is None and cfg.weights:
        task.start_from(cfg.weights, cfg.drop_classifier, read_classifier_map(cfg.classifier_map, datamodule))
    if task.frozen_modules and not (cfg.weights or cfg.model.get("pretrained")):
        log.warning("recipe.freeze keeps initial weights; weights=FILE or model.pretrained=true loads trained ones")
    # Everything before this point can fail without leaving a folder behind; from here on files are written.
    if rank_zero_only.rank == 0:
        if cfg.rerun:
            set_aside(folder)
        save_config(cfg, folder)
        datamodule.classes_of_net.write(folder / CLASSES)
        if resume and resume.name != LAST:
            # The next checkpoint would make the unreadable last.ckpt the previous one.
            link_or_copy(resume, checkpoints / LAST)
    if resume:
        log.warning("going on from %s, step %d", resume, step)

    training_log = TrainingLog()
    callbacks: list[pl.Callback] = [instantiate(spec) for spec in cfg.callbacks.values()]
    if cfg.recipe.ema.decay is not None:
        callbacks.append(EMA(cfg.recipe.ema.decay, cfg.recipe.ema.warmup))
    statistics = BatchNormStatistics()
    kept = [count for count in (cfg.checkpoint.get("top_k"), cfg.recipe.get("average_best")) if count is not None]
    settings = dict(cfg.checkpoint) | {"top_k": max(kept, default=None)}
    saving = Checkpoints(checkpoints, f"val/{cfg.task.figure}", **settings)
    callbacks += [statistics, training_log, saving]
    loggers = [MetricsCSV(folder / "metrics.csv", step)]
    loggers += [instantiate(spec, from_step=step) for spec in cfg.logger.values()]
    steps_per_epoch = images // cfg.recipe.batch_size
    epochs = total_epochs(cfg.recipe, steps_per_epoch)
    trainer = build_trainer(cfg, max_epochs=epochs, callbacks=callbacks, logger=loggers)
    trainer.fit(task, datamodule=datamodule, ckpt_path=resume, weights_only=True)
    epochs, steps = trainer.current_epoch, trainer.global_step

    # A strategy may have sharded the net of the trained task, so build a new one for the test.
    task = build_task(cfg, datamodule)
    averaged = saving.best_epochs[: cfg.recipe.get("average_best") or 0]
    load_weights(task.model, weights_to_test(saving, averaged))
    metrics = test(cfg, task, datamodule)
    params, macs = task.complexity(datamodule)
    result = {
        "status": "finished",
        **result_labels(cfg),
        "seed": cfg.seed,
        "metrics": metrics,
        "params": params,
        "macs": macs,
        **task.frozen_note,
        "epochs": epochs,
        "steps": steps,
        **({"averaged_epochs": averaged} if averaged else {}),
        "seconds": round(training_log.seconds, 2),
        "session_seconds": round(time.monotonic() - began, 2),
        "images_per_second": training_log.images_per_second,
        "precision": cfg.trainer.precision,
        **statistics.note,
        **datamodule.note,
        **links(loggers),
        **provenance(),
        "config_sha256": fingerprint(cfg),
    }
    if trainer.is_global_zero:
        # A fault of metrics.csv or of a picture must not cost the result.
        write_result(folder, result)
        draw_curves(folder)
    return result


def draw_curves(folder: Path) -> None:
    """Draw `curves.png` from `metrics.csv`; if that fails, say so and go on."""
    try:
        plot_curves(folder / "curves.png", folder / "metrics.csv")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        log.warning("%s cannot be drawn from metrics.csv: %s", folder / "curves.png", " ".join(str(error).split()))


def check_limits(cfg: DictConfig, datamodule: pl.LightningDataModule) -> None:
    """Refuse a share of the batches that is less than one batch.

    Raises:
        ValueError: `trainer.limit_train_batches` or `trainer.limit_val_batches` is such a share.
    """
    # A data module that belongs to no trainer yet has the batches of all devices; validation pads the last ones.
    batches = {
        "train": len(datamodule.train_dataloader()) // world_size(cfg),
        "val": ceil_div(len(datamodule.val_dataloader()), world_size(cfg)),
    }
    for split, count in batches.items():
        share = cfg.trainer[f"limit_{split}_batches"]
        if isinstance(share, float) and share < 1 and int(share * count) == 0:
            raise ValueError(
                f"trainer.limit_{split}_batches={share:g} of {count} batches is less than one; "
                f"trainer.limit_{split}_batches=1 takes one batch"
            )


def check_sizes(task: Task, datamodule: Any) -> None:
    """Refuse sizes of training images that the net does not take.

    Raises:
        ValueError: `recipe.augment.sizes` has such a size.
    """
    for size in datamodule.size_schedule.sizes if datamodule.size_schedule else ():
        try:
            complexity(task.model, size, datamodule.in_chans)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"recipe.augment.sizes: the net takes no images of {size} px ({reason})") from error


def result_labels(cfg: DictConfig) -> dict[str, str]:
    """Return the labels of a result: `task`, `model`, `data`, and where there are any `method` and `head`."""
    head = {"head": cfg.head.name} if cfg.head.name else {}
    method = {"method": cfg.method.name} if "method" in cfg else {}
    net = model_name(cfg.model, size_pixels(cfg.data))
    return {"task": cfg.task.name, **method, "model": net, **head, "data": cfg.data.name}


def test(cfg: DictConfig, task: Task, datamodule: pl.LightningDataModule) -> dict[str, Any]:
    """Return the figures of the task's net on the test split: `test/top1`, `test/top1_ci95`, ...

    What each image adds to them is written into the run's folder, for comparisons with other runs.
    """
    strategy = "ddp" if world_size(cfg) > 1 else "auto"
    build_trainer(cfg, logger=False, strategy=strategy).test(task, datamodule=datamodule, verbose=False)
    figures = {f"test/{name}": value for name, value in task.test_figures(datamodule).items()}
    if task.trainer.is_global_zero:
        contributions = task.contributions(datamodule)
        if contributions is not None:
            contributions.write(Path(cfg.run_dir))
    return figures


def build_data(cfg: DictConfig) -> Any:
    """Return the LightningDataModule of `cfg.data`, with the recipe's augmentation and no open preprocessing."""
    task: Any = get_class(cfg.task._target_)
    datamodule = instantiate(
        _arguments(OmegaConf.create(resolved_data(cfg)), "name", "task", "kind", "own"),
        augment=OmegaConf.to_container(cfg.recipe.augment, resolve=True),
        batch_size=per_device_batch(cfg),
        seed=cfg.seed,
        **task.data_arguments(cfg),
        _convert_="all",
    )
    return task.adapt_data(cfg, datamodule)


def build_task(cfg: DictConfig, datamodule: Any) -> Any:
    """Return the LightningModule of `cfg.task` with its net."""
    return instantiate(
        _arguments(cfg.task, "name", "eval_batch", "losses", "class_weights", "holdout"),
        model=get_class(cfg.task._target_).build_net(cfg, datamodule),
        recipe=OmegaConf.to_container(cfg.recipe, resolve=True),
        num_classes=datamodule.num_classes,
        _convert_="all",
        _recursive_=False,
    )


def build_trainer(cfg: DictConfig, **overrides: Any) -> pl.Trainer:
    """Return Lightning's Trainer as `cfg.trainer` and the recipe describe it.

    Args:
        cfg: the composed config.
        **overrides: arguments of `pytorch_lightning.Trainer` that replace those of the config.
    """
    settings: dict[str, Any] = dict(cfg.trainer) | {"precision": PRECISIONS[cfg.trainer.precision]}
    settings["max_epochs"] = cfg.recipe.epochs
    if cfg.trainer.strategy == "fsdp":
        settings["strategy"] = ModelParallelStrategy(world_size(cfg), 1, save_distributed_checkpoint=False)
    settings |= overrides
    return pl.Trainer(
        **settings,
        gradient_clip_val=cfg.recipe.clip_grad,
        default_root_dir=cfg.run_dir,
        plugins=[AtomicCheckpointIO(), *cluster_environment()],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def cluster_environment() -> list[ClusterEnvironment]:
    """Return Lightning's plug-in that says who started the processes; an empty list lets Lightning find out.

    In a Slurm job Lightning would take every process for one that srun started. Its own requeueing is off, since it
    leaves `hpc_ckpt_*` files that a later test would load instead of the best weights. Here `Checkpoints` handles the
    signals, and `retinue.runs.slurm` handles the queue.
    """
    if "SLURM_JOB_ID" not in os.environ or TorchElasticEnvironment.detect():
        return []
    by_srun = slurm_tasks() > 1 and "LOCAL_RANK" not in os.environ
    return [SLURMEnvironment(auto_requeue=False) if by_srun else LightningEnvironment()]


def _arguments(section: DictConfig, *labels: str) -> DictConfig:
    """Return a config section without its keys `labels`, which are no arguments of its class."""
    return OmegaConf.masked_copy(section, [str(key) for key in section if key not in labels])


def starts_anew(cfg: DictConfig, folder: Path) -> bool:
    """Tell whether the files in the run's folder must be removed first.

    This is so only with `rerun=true`, and only if the folder holds a different run, a damaged one or a result. An
    unfinished run with the same config goes on from its checkpoint.

    Raises:
        ValueError: the folder holds an evaluation; or with `rerun` false, a run with a different config, or a part of
            a run without its config.
    """
    try:
        saved = read_config(folder)
    except ValueError:
        if not cfg.rerun:
            raise
        return True
    if saved is None:
        foreign = foreign_content(folder, fingerprint(cfg))
        if foreign == "an evaluation":
            raise ValueError(f"{folder} holds {foreign}: choose another hydra.run.dir")
    else:
        changed = difference(saved, cfg)
        foreign = f"a run with {changed}" if changed else None
    if foreign and not cfg.rerun:
        raise ValueError(f"{folder} holds {foreign}: choose another hydra.run.dir, or rerun=true")
    return bool(cfg.rerun and (foreign or (folder / RESULT).exists()))


def difference(saved_cfg: Any, cfg: Any) -> str | None:
    """Return the first key by which two configs give different results, as `key=<saved>, not <new>`, or None."""
    saved, wanted = (dict(flatten(identity(config))) | {"seed": config.seed} for config in (saved_cfg, cfg))
    for key in sorted(saved | wanted):
        if saved.get(key) != wanted.get(key):
            return f"{key}={_show(saved.get(key))}, not {_show(wanted.get(key))}"
    return None


def _show(value: Any) -> str:
    return "null" if value is None else str(value)


def save_config(cfg: DictConfig, folder: Path) -> None:
    """Write the resolved config to the run's folder, with the digests of the weights files that it names."""
    saved: Any = OmegaConf.to_container(cfg, resolve=True)
    saved.pop(WEIGHTS_DIGESTS, None)
    if digests := weights_digests(saved):
        saved[WEIGHTS_DIGESTS] = digests
    with replacing(folder / CONFIG) as path:
        OmegaConf.save(OmegaConf.create(saved), path)


def quiet_libraries() -> None:
    """Silence Lightning's banners and tips, and warnings about behaviour that is intended here."""
    for name in ("pytorch_lightning", "lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        # The config decides on the number of workers.
        ".*does not have many workers.*",
        # TrainingLog logs at the end of every epoch.
        ".*is smaller than the logging interval.*",
        ".*Checkpoint directory .* exists.*",
        ".*in eval mode at the start of training.*",
        ".*srun. command is available.*",
        ".*isinstance.treespec, LeafSpec.*",
        # Tasks collect predictions themselves.
        ".*predict returned None.*",
        # Logged figures have been summed over the ranks already.
        ".*sync_dist=True.*",
    ):
        warnings.filterwarnings("ignore", message)
