"""Pictures of what a composed config gives to its net: batches of training and validation, and the schedule."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from datamodules.batch import channel_values
from retinue.evaluation.browse_plots import View, draw_views, plot_schedule
from retinue.evaluation.segmentation_plots import class_colours, overlay
from retinue.runs.config import check, per_device_batch, world_size
from retinue.runs.preprocessing import resolve_preprocessing
from retinue.runs.small_sets import fit_batch
from retinue.runs.training import build_data
from retinue.tasks.optimization import create_optimizer, create_schedule, total_epochs

# Tasks whose batches can be drawn.
TASKS = ("classification", "multi_label", "detection", "segmentation")
# Smallest share of a class in a mixed target that is written above the image, and the largest number of classes.
MIN_SHARE, MAX_CLASSES = 0.02, 3
# Number of moments at which the schedule is plotted.
MOMENTS = 2000
# Settings of an optimiser that a schedule may change -> their names in the plot.
SETTINGS = {"lr": "learning rate", "weight_decay": "weight decay", "momentum": "momentum"}


def browse(cfg: DictConfig, batches: int, images: int, epoch: int, out: Path) -> list[Path]:
    """Draw the first batches of an epoch and of the validation, and plot the schedule.

    Args:
        cfg: composed config of `train.py`. The batches are those that the first process of its run receives.
        batches: number of batches of each kind.
        images: largest number of images of a batch that are drawn.
        epoch: epoch of the training batches, from 0.
        out: folder of the pictures.

    Returns:
        The files `train-<n>.png`, `val-<n>.png` and `schedule.png`.

    Raises:
        ValueError: the config is wrong, or its batches cannot be drawn.
    """
    if cfg.task.name not in TASKS:
        raise ValueError(f"browse.py is for {', '.join(TASKS)}, not task={cfg.task.name}")
    check(cfg)
    resolve_preprocessing(cfg)
    data = build_data(cfg)
    if data.has_bands:
        raise ValueError("browse.py draws colour images, not images of bands")
    fit_batch(cfg, len(data.images("train")))
    data.batch_size = per_device_batch(cfg)
    train, val = data.train_dataloader(), data.val_dataloader()
    train.set_epoch(epoch)
    files = []
    for split, loader in (("train", train), ("val", val)):
        for number, batch in enumerate(itertools.islice(loader, batches), start=1):
            views = list(itertools.islice(views_of(data.on_after_batch_transfer(batch, 0), split, data), images))
            place = f"epoch {epoch}, " if split == "train" else ""
            path = out / f"{split}-{number}.png"
            title = f"{cfg.data.name}, {split}: {place}batch {number} of {len(loader)}, {len(batch['index'])} images"
            draw_views(path, title, views, data.class_names)
            files.append(path)
    epochs, settings = schedule_of(cfg, len(train) // world_size(cfg))
    plot_schedule(out / "schedule.png", epochs, settings)
    return [*files, out / "schedule.png"]


def views_of(batch: dict[str, Any], split: str, data: Any) -> Iterator[View]:
    """Yield the images of a batch as the net receives them, with their truth; padding is left out."""
    for i, index in enumerate(batch["index"].tolist()):
        if index < 0:
            continue
        image = to_pixels(batch["image"][i], data.mean, data.std)
        if "label" in batch:
            yield View(image, caption_of(batch, i, data.class_names))
        elif "mask" in batch:
            yield segmentation_view(image, batch["mask"][i], len(data.class_names))
        else:
            height, width = batch["sizes"][i].tolist()
            yield detection_view(image, batch, i, (height, width), split, data)


def to_pixels(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Return a normalised image (C, H, W) as uint8 (H, W, 3)."""
    pixels = image.float().permute(1, 2, 0) * channel_values(std, image.device) + channel_values(mean, image.device)
    whole = (255 * pixels).round().clamp(0, 255).byte().cpu().numpy()
    return np.broadcast_to(whole, (*whole.shape[:2], 3))


def caption_of(batch: dict[str, Any], i: int, class_names: Any) -> str:
    """Return the classes of an image, with their shares if the target is mixed."""
    label = batch["label"][i]
    if "target" in batch:
        shares, classes = batch["target"][i].topk(min(MAX_CLASSES, len(class_names)))
        pairs = zip(shares.tolist(), classes.tolist(), strict=True)
        return ", ".join(f"{class_names[k]} {share:.2f}" for share, k in pairs if share >= MIN_SHARE)
    if label.ndim:
        return ", ".join(str(class_names[k]) for k in label.nonzero().flatten().tolist()) or "no class"
    return str(class_names[int(label)])


def segmentation_view(image: np.ndarray, mask: Tensor, num_classes: int) -> View:
    """Return an image beside the same image with the colours of its classes."""
    height, width = image.shape[:2]
    # In evaluation the mask has the size of its file.
    fitted = nn.functional.interpolate(mask[None, None].float(), (height, width), mode="nearest-exact")
    labels = fitted[0, 0].long().cpu().numpy()
    return View(np.concatenate([image, overlay(image, labels, class_colours(num_classes))], 1))


def detection_view(
    image: np.ndarray, batch: dict[str, Any], i: int, size: tuple[int, int], split: str, data: Any
) -> View:
    """Return an image with its objects; in evaluation the batch has none, so they are the data's, resized.

    Args:
        image: uint8 (H, W, 3), padded.
        batch: the batch.
        i: position of the image in the batch.
        size: height and width of the image without its padding.
        split: train or val.
        data: the data module.
    """
    if "boxes" in batch:
        boxes, labels = batch["boxes"][i].cpu().numpy(), batch["labels"][i].cpu().numpy()
        masks = batch["masks"][i].cpu().numpy() if "masks" in batch else None
    else:
        index, masks = data.images(split).index, None
        of_image = (index.image_index == int(batch["index"][i])) & ~(index.degenerate | index.crowd)
        original = batch["original_sizes"][i].tolist()
        scale = np.array([size[1] / original[1], size[0] / original[0]] * 2)
        x, y, w, h = index.boxes[of_image].T
        boxes, labels = np.stack([x, y, x + w, y + h], 1) * scale, index.labels[of_image]
    height, width = size
    masks = None if masks is None else masks[:, :height, :width]
    caption = f"{len(boxes)} object{'' if len(boxes) == 1 else 's'}"
    return View(image[:height, :width], caption, boxes, labels, masks)


def schedule_of(cfg: DictConfig, batches: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the optimiser's settings over the training that its schedule changes; the learning rate always.

    Factors of single layers (`layer_decay`, `backbone_factor`) are left out.

    Args:
        cfg: composed config.
        batches: number of batches of a process in an epoch.

    Returns:
        Moments in epochs (T,), and the values (T,) by the setting's name.
    """
    recipe: Any = OmegaConf.to_container(cfg.recipe, resolve=True)
    for key in ("layer_decay", "backbone_factor"):
        recipe["optimizer"].pop(key, None)
    limit = cfg.trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    steps_per_epoch = max(1, math.ceil(batches / cfg.trainer.accumulate_grad_batches))
    # The schedule acts on the optimiser's groups, whatever their parameters are.
    optimizer = create_optimizer(nn.Linear(1, 1), recipe)
    schedule = create_schedule(optimizer, recipe, steps_per_epoch)
    steps = total_epochs(recipe, steps_per_epoch) * steps_per_epoch
    moments = np.unique(np.linspace(0, steps - 1, min(steps, MOMENTS)).round().astype(int))
    [*_, group] = sorted(optimizer.param_groups, key=lambda group: group.get("weight_decay", 0))
    values: dict[str, list[float]] = {name: [] for key, name in SETTINGS.items() if key in group}
    for step in moments.tolist():
        schedule.step_update(step)
        for key, name in SETTINGS.items():
            if key in group:
                values[name].append(float(group[key]))
    settings = {name: np.array(column) for name, column in values.items()}
    changing = {name: column for name, column in settings.items() if name == SETTINGS["lr"] or np.ptp(column) > 0}
    return moments / steps_per_epoch, changing
