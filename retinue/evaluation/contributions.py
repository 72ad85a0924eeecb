"""Contributions of each test image to the figures of a test, from which nets are compared image by image."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from retinue.evaluation import detection_matches, manipulation, medical, multi_label, panoptic, segmentation
from retinue.evaluation.detection_matches import Matches
from retinue.utils.files import replacing

# File in a run's folder.
FILE = "test_images.npz"

# Average precisions, which are biased in small sets (`retinue.evaluation.statistics.half_sample_intervals`).
BIASED = ("map", *(f"{kind}_{name}" for kind in ("box", "mask") for name in detection_matches.FIGURES))

# Function from how often each image counts, (N,), to the figures by name.
Figures = Callable[[np.ndarray], dict[str, float]]


@dataclass(frozen=True)
class Contributions:
    """Contributions of N test images.

    Attributes:
        task: name of the task.
        images: name of each image, (N,).
        arrays: what the task's figures follow from, by name. Classification: whether each image is right (`top1`,
            `top5`), its `loss`, `brier` score and `label`. Multi-label classification: the attributes of `Scores`
            except `index`. Segmentation: `areas` (N, 3, K) of `segmentation.areas`, with two classes `pixel_auc` (N,),
            and with medical figures `distances` (N, K) and the label `background`, -1 for none. Panoptic: `counts`
            (N, 4, K) of `panoptic.match`, and `num_things`. Detection: the attributes of `Matches`, of boxes as
            `box_...` and of masks as `mask_...`. BossNAS: `agreement`. Pretraining: whether each image is right by its
            neighbours (`knn_top1`) and by the linear probe (`probe_top1`).
    """

    task: str
    images: np.ndarray
    arrays: Mapping[str, np.ndarray]

    @cached_property
    def figures(self) -> Figures:
        """Function that computes the figures of the set in which each image counts a given number of times."""
        return TASKS[self.task](self.arrays)

    def observed(self) -> dict[str, float]:
        """Return the figures of the test; NaN for an undefined one."""
        return self.figures(np.ones(len(self.images)))

    def write(self, folder: Path) -> None:
        """Write the file of a run's folder, in one piece."""
        with replacing(folder / FILE) as temporary:
            # JSON, unlike an array of text, takes as much space as the longest name for no other name.
            names = np.frombuffer(json.dumps(self.images.tolist()).encode(), np.uint8)
            content: dict[str, Any] = {"task": np.array(self.task), "images": names, **self.arrays}
            np.savez_compressed(temporary, **content)

    @staticmethod
    def read(folder: Path) -> Contributions:
        """Read the file of a run's folder.

        Raises:
            ValueError: there is no such file, or it is damaged.
        """
        path = folder / FILE
        if not path.exists():
            raise ValueError(
                f"{path} is missing: the run is from an older version; evaluate it by eval.py run={folder}"
            )
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            task, images = str(arrays.pop("task")), np.array(json.loads(arrays.pop("images").tobytes()))
            test = Contributions(task, images, arrays)
            # Arrays that are missing are found here.
            _ = test.figures
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} cannot be read: {error}; evaluate the run by eval.py run={folder}") from None
        return test


def _classification(arrays: Mapping[str, np.ndarray]) -> Figures:
    sums = np.stack([arrays[name].astype(np.float64) for name in ("top1", "top5", "loss", "brier")], 1)
    label, num_classes = arrays["label"], int(arrays["label"].max()) + 1

    def figures(draws: np.ndarray) -> dict[str, float]:
        top1, top5, loss, brier = (draws @ sums / draws.sum()).tolist()
        counts = np.bincount(label, draws, num_classes)
        accuracy = segmentation.divide(np.bincount(label, draws * sums[:, 0], num_classes), counts)
        mean = float(np.nanmean(accuracy))
        return {"top1": top1, "top5": top5, "loss": loss, "brier": brier, "mean_class_accuracy": mean}

    return figures


def _bossnas(arrays: Mapping[str, np.ndarray]) -> Figures:
    agreement = arrays["agreement"].astype(np.float64)
    return lambda draws: {"agreement": float(draws @ agreement / draws.sum())}


def _segmentation(arrays: Mapping[str, np.ndarray]) -> Figures:
    areas = arrays["areas"]
    flat = areas.reshape(len(areas), -1).astype(np.float64)
    of_images = medical.figures_of(arrays) if "distances" in arrays else lambda draws: {}
    of_pixels = manipulation.figures_of(arrays) if "pixel_auc" in arrays else lambda draws: {}

    def figures(draws: np.ndarray) -> dict[str, float]:
        rates = segmentation.rates((draws @ flat).reshape(areas.shape[1:]))
        return dict(zip(segmentation.FIGURES, rates.tolist(), strict=True)) | of_images(draws) | of_pixels(draws)

    return figures


def _panoptic(arrays: Mapping[str, np.ndarray]) -> Figures:
    counts, num_things = arrays["counts"], int(arrays["num_things"])
    flat = counts.reshape(len(counts), -1)
    return lambda draws: panoptic.figures((draws @ flat).reshape(counts.shape[1:]), num_things)


def _detection(arrays: Mapping[str, np.ndarray]) -> Figures:
    kinds = [kind for kind in ("box", "mask") if f"{kind}_shape" in arrays]
    matches = {
        kind: Matches.from_arrays({name.removeprefix(f"{kind}_"): values for name, values in arrays.items()})
        for kind in kinds
    }

    def figures(draws: np.ndarray) -> dict[str, float]:
        values = {kind: matches[kind].figures(draws)[: len(detection_matches.FIGURES)].tolist() for kind in kinds}
        return {
            f"{kind}_{name}": value
            for kind in kinds
            for name, value in zip(detection_matches.FIGURES, values[kind], strict=True)
        }

    return figures


def _pretraining(arrays: Mapping[str, np.ndarray]) -> Figures:
    return lambda draws: {name: float(draws @ hits / draws.sum()) for name, hits in arrays.items()}


# Functions from the arrays to `Figures`, by the task's name.
TASKS: dict[str, Callable[[Mapping[str, np.ndarray]], Figures]] = {
    "classification": _classification,
    "multi_label": multi_label.figures_of,
    "segmentation": _segmentation,
    "panoptic": _panoptic,
    "detection": _detection,
    "bossnas": _bossnas,
    "pretraining": _pretraining,
}
