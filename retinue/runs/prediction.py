"""Predict images without labels, and write the predictions, pictures and a short table."""

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.utils import get_class
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from datamodules.classes import Classes
from datamodules.unlabelled import UNLABELLED
from models.preprocessing import run_config
from retinue.runs.config import check, per_device_batch, world_size
from retinue.runs.evaluation import load_task, prepare
from retinue.runs.folders import no_empty_folder, refuse_inside_a_run, refuse_over_a_run
from retinue.runs.launch import launch, needs_launch
from retinue.runs.preprocessing import resolved_data
from retinue.runs.result_file import CLASSES
from retinue.runs.training import build_data, build_trainer
from retinue.utils.tasks import CLASSIFIERS

log = logging.getLogger(__name__)

# Numbers of images in the table, and of broken images that the last warning names.
MAX_ROWS, MAX_NAMED = 10, 5
# Keys of `data` that prepare the images of all tasks, and those of a classifier.
PREPARATION = ("image_size", "mean", "std", "in_chans", "num_workers")
CROP = ("crop_pct", "crop_mode", "interpolation")


def predict(cfg: DictConfig) -> None:
    """Predict the images that `cfg.images` names, write what the task predicts, and print a table.

    Raises:
        ValueError: there are no images or no weights, or the classes of the net are unknown.
    """
    folder = Path(str(cfg.run_dir))
    with no_empty_folder(folder):
        refuse_over_a_run(folder)
        refuse_inside_a_run(folder)
        check(cfg)
        if needs_launch(cfg):
            launch(predict_here, cfg)
        else:
            predict_here(cfg)


def predict_here(cfg: DictConfig) -> None:
    """Predict in this process, which may be one rank of several; rank 0 writes the files and prints the table.

    Raises:
        ValueError: there are no images or no weights, the classes are unknown, or all images are broken.
    """
    folder = Path(cfg.run_dir)
    prepare(cfg)
    datamodule = build_unlabelled(cfg)
    if cfg.pictures and datamodule.has_bands:
        raise ValueError("pictures=true is for colour images, not for images of bands")
    task = load_task(cfg, datamodule)
    task.predictions_folder = folder
    strategy = "ddp" if world_size(cfg) > 1 else "auto"
    trainer = build_trainer(cfg, logger=False, strategy=strategy, callbacks=[PredictionProgress()])
    trainer.predict(task, datamodule=datamodule, return_predictions=False)
    if not trainer.is_global_zero:
        return
    # Ranks give their images one after the other.
    names, described = datamodule.names("test"), dict(sorted(task.describe_predictions(datamodule).items()))
    broken = [name for index, name in enumerate(names) if index not in described]
    if not described:
        raise ValueError(f"images={cfg.images}: none of the {len(names)} images can be read, such as {names[0]}")
    task.write_predictions(folder, datamodule)
    if cfg.pictures:
        for index in described:
            task.draw_prediction(folder / "images" / f"{datamodule.images('test').stem(index)}.png", index, datamodule)
    if broken:
        more = ", ..." if len(broken) > MAX_NAMED else ""
        log.warning(
            "%d of %d images are broken and have no prediction: %s%s",
            len(broken), len(names), ", ".join(broken[:MAX_NAMED]), more,
        )  # fmt: skip
    show({names[index]: text for index, text in described.items()}, folder)


def build_unlabelled(cfg: DictConfig) -> Any:
    """Return the data module of the images, prepared as the test images of `cfg.data` are.

    Raises:
        ValueError: the task is not one that predicts, there are no images, or the classes of the net are unknown.
    """
    if cfg.task.name not in UNLABELLED:
        raise ValueError(f"predict.py is for {', '.join(UNLABELLED)}, not task={cfg.task.name}")
    if cfg.images is None:
        raise ValueError("images=DIR is needed: a folder of images, a pattern such as 'photos/**/*.jpg', or a file")
    data, is_classifier = resolved_data(cfg), cfg.task.name in CLASSIFIERS
    keys = PREPARATION + CROP if is_classifier else PREPARATION
    arguments = {key: data[key] for key in keys}
    if "bands" in data:
        arguments["bands"] = data["bands"]
    batch_size = per_device_batch(cfg)
    return UNLABELLED[cfg.task.name](images=cfg.images, classes=find_classes(cfg), batch_size=batch_size, **arguments)


def find_classes(cfg: DictConfig) -> Classes:
    """Return the classes of the net: those that its run has kept, or those of its data.

    Raises:
        ValueError: the run has kept none, and the data cannot be read.
    """
    config = run_config(cfg.weights) if cfg.weights else None
    if config is not None and (config.parent / CLASSES).is_file():
        return Classes.read(config.parent / CLASSES)
    published = get_class(cfg.data._target_).published_classes()
    if published is not None and cfg.data.get("root") is None:
        return published
    try:
        return build_data(cfg).classes_of_net
    except ValueError as error:
        raise ValueError(f"the classes of the net are those of its data, which cannot be read: {error}") from None


class PredictionProgress(Callback):
    """Show a bar of the images on a terminal; elsewhere nothing."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and sys.stderr.isatty():
            self._bar = Progress(
                *Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(),
                console=Console(stderr=True),
            )  # fmt: skip
            datamodule: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            self._bar.add_task("images", total=len(datamodule.images("test")))
            self._bar.start()

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *position: int
    ) -> None:
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], len(batch["index"]) * trainer.world_size)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def show(described: Mapping[str, str], folder: Path) -> None:
    """Print the predictions of the first images, followed by the folder.

    Args:
        described: prediction of each image in a few words, by the image's name.
        folder: folder of the predictions.
    """
    table = Table(title=f"{len(described):,} images", show_header=False, title_justify="left")
    for name, text in list(described.items())[:MAX_ROWS]:
        # A file system's names need not be UTF-8, which a terminal cannot show.
        table.add_row(os.fsencode(name).decode(errors="replace"), text)
    console = Console(markup=False)
    console.print(table)
    if len(described) > MAX_ROWS:
        console.print(f"and {len(described) - MAX_ROWS:,} more", highlight=False)
    console.print(str(folder), soft_wrap=True, highlight=False)
