"""Evaluate a net on the test split, and write its figures, predictions and pictures."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig

from models import load_weights
from ops.backend import set_backend
from retinue.runs.config import check, world_size
from retinue.runs.folders import no_empty_folder, refuse_inside_a_run, refuse_over_a_run
from retinue.runs.identity import fingerprint
from retinue.runs.launch import launch, needs_launch, rank
from retinue.runs.preprocessing import resolved_data
from retinue.runs.result_file import provenance, read_result, show_result, write_result
from retinue.runs.robustness import Panel, check_panel
from retinue.runs.training import build_data, build_task, build_trainer, quiet_libraries, result_labels, test
from retinue.tasks.calibration import TemperatureScaling


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate on the test split; write `result.json` and the task's predictions and pictures.

    Returns:
        The metrics: `test/top1`, `test/top1_ci95`, ...

    Raises:
        ValueError: weights, model and data do not fit together.
    """
    folder = Path(str(cfg.run_dir))
    with no_empty_folder(folder):
        refuse_over_a_run(folder)
        refuse_inside_a_run(folder)
        check(cfg)
        if needs_launch(cfg):
            launch(evaluate_here, cfg)
            result = read_result(folder)
        else:
            result = evaluate_here(cfg)
    assert result is not None
    if rank() == 0:
        show_result(result, folder)
    return result["metrics"]


def evaluate_here(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate in this process, which may be one rank of several; write the files and return the result.

    Raises:
        ValueError: there are no weights to evaluate, or they do not fit the model.
    """
    folder = Path(cfg.run_dir)
    prepare(cfg)
    if cfg.save_maps and cfg.task.name not in ("segmentation", "panoptic"):
        raise ValueError(f"save_maps=true is for task=segmentation or panoptic, not task={cfg.task.name}")
    if cfg.calibrate and cfg.task.name != "classification":
        raise ValueError(f"calibrate=true is for task=classification, not task={cfg.task.name}")
    datamodule = build_data(cfg)
    if cfg.get("panel"):
        check_panel(cfg, datamodule)
    task = load_task(cfg, datamodule)
    task.save_images = cfg.save_images
    task.predictions_folder = folder if cfg.save_predictions or cfg.save_maps else None
    if cfg.calibrate:
        calibrate(cfg, task, datamodule)
    metrics = test(cfg, task, datamodule)
    facts = {}
    if cfg.get("panel"):
        figures, facts = Panel(cfg, task, datamodule).run()
        metrics |= figures
    params, macs = task.complexity(datamodule)
    result = {
        "status": "finished",
        **result_labels(cfg),
        "weights": cfg.weights,
        "image_size": resolved_data(cfg)["image_size"],
        "metrics": metrics,
        **facts,
        "params": params,
        "macs": macs,
        "precision": cfg.trainer.precision,
        **datamodule.note,
        **provenance(),
        "config_sha256": fingerprint(cfg),
    }
    if task.trainer.is_global_zero:
        # A fault of a picture must not cost the result.
        write_result(folder, result)
        task.write_report(folder, datamodule)
    return result


def prepare(cfg: DictConfig) -> None:
    """Prepare this process for inference.

    Raises:
        ValueError: there are no weights.
    """
    quiet_libraries()
    set_backend(cfg.ops.backend)
    pl.seed_everything(cfg.seed, verbose=False)
    if not cfg.weights and not cfg.model.get("pretrained"):
        raise ValueError("there are no weights: give run=DIR, weights=FILE, or model=timm model.pretrained=true")


def calibrate(cfg: DictConfig, task: Any, datamodule: Any) -> None:
    """Fit the temperature of a classification task to the validation split.

    Raises:
        ValueError: the test images are those of the validation split, or there is no validation split.
    """
    if not {"val", "test"} <= set(datamodule.splits):
        raise ValueError(
            f"calibrate=true needs validation images that are not the test images: data={cfg.data.name} has the splits "
            f"{', '.join(datamodule.splits)}"
        )
    strategy = "ddp" if world_size(cfg) > 1 else "auto"
    trainer = build_trainer(cfg, logger=False, strategy=strategy)
    trainer.validate(TemperatureScaling(task), datamodule=datamodule, verbose=False)


def load_task(cfg: DictConfig, datamodule: Any) -> Any:
    """Return the LightningModule of `cfg.task` with the weights of `cfg.weights`, if any."""
    task = build_task(cfg, datamodule)
    if cfg.weights:
        load_weights(task.model, cfg.weights)
    return task
