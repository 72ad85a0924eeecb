"""Task of object detection and instance segmentation."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from models.complexity import complexity
from models.openmmlab.build import Detector, build_detector
from models.openmmlab.config import learns_masks
from retinue.evaluation.contributions import Contributions
from retinue.evaluation.detection import (
    Accuracy,
    ImageDetections,
    average,
    coco_results,
    evaluate,
    merge,
    per_class,
    write_results,
)
from retinue.evaluation.detection_confusion import BACKGROUND, confusion_matrix
from retinue.evaluation.detection_matches import FIGURES as AP_FIGURES
from retinue.evaluation.detection_matches import HALF_SAMPLES
from retinue.evaluation.detection_plots import (
    MIN_DRAWN_SCORE,
    plot_class_ap,
    plot_detections,
    plot_precision_by_class,
    plot_precision_by_size,
    plot_precision_recall,
    write_precision_csv,
)
from retinue.evaluation.lvis import evaluate_federated
from retinue.evaluation.plots import draw_confusion
from retinue.tasks.dense_prediction import DensePredictionTask
from retinue.tasks.detection_inference import DetectionInference
from retinue.utils.arithmetic import round_up
from retinue.utils.files import write_text

# Figures of a validation and of each of several test sets; a test reports all twelve of COCO's.
VALIDATION_FIGURES = ("ap", "ap50", "ap75")


class Detection(DensePredictionTask):
    """Detection by the detector's own losses; the figures are COCO's average precision of boxes and masks.

    Masks are evaluated if the detector predicts them and the data have them. A validation computes average precision
    and no losses, since their inputs (sampled proposals, noised queries) exist in training only; it does not augment.

    Args:
        model: The detector, already built for the data's classes.
        recipe: As in `Task`.
        num_classes: Not used; all tasks receive it.
        test: How images become detections in a test: the fields of `DetectionInference`. None means no augmentation.
        kwargs: Further arguments of `Task`.

    Attributes:
        detections: Detections of all ranks in the test split, after a test.
        accuracies: Accuracy of boxes ("box") and masks ("mask"), after a test; the mean over the sets if the test split
            has several.
        set_accuracies: The same for each of several test sets, by the set's name.
    """

    model: Detector
    methods = ("loss", "predict")

    def __init__(self, model: nn.Module, recipe: Mapping, *, num_classes: int, test: Mapping | None = None, **kwargs):
        super().__init__(model, recipe, **kwargs)
        self.inference = DetectionInference(**(test or {}))
        # Detections of this rank in the current evaluation.
        self._rank_detections: list[ImageDetections] = []
        self.detections: list[ImageDetections] = []
        self.accuracies: dict[str, Accuracy] = {}
        self.set_accuracies: dict[str, dict[str, Accuracy]] = {}

    @staticmethod
    def build_net(cfg: Any, datamodule: Any) -> nn.Module:
        return build_detector(cfg, datamodule)

    @staticmethod
    def data_arguments(cfg: Any) -> dict[str, Any]:
        """Return `read_masks`, so that the data module reads masks only for a detector that learns them."""
        return {"read_masks": learns_masks(cfg.head, cfg.data.kind == "small")}

    def complexity(self, datamodule: Any) -> tuple[int, int]:
        """Return the number of parameters, and the multiply-accumulates for one image of the data's size.

        The image is padded to multiples of 32 pixels, as a batch is.
        """
        height, width = (round_up(side, 32) for side in datamodule.image_size)
        return complexity(self.model, (height, width), datamodule.in_chans)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = self.model.loss(
            batch["image"], batch["sizes"], batch["boxes"], batch["labels"], batch.get("masks"), batch["ignored"]
        )
        return self.sum_losses(losses | self.distillation_losses(batch["image"]), len(batch["image"]))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._detect(batch, DetectionInference())

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._detect(batch, self.inference)

    predict_step = test_step

    def _detect(self, batch: dict[str, Any], inference: DetectionInference) -> None:
        original_sizes = batch["original_sizes"]
        predictions = inference(self.model.predict, batch["image"], batch["sizes"], original_sizes)
        # Images that pad the last batch of a rank have the index -1.
        self._rank_detections += [
            ImageDetections.from_tensors(index, *prediction, size=size)
            for index, prediction, size in zip(
                batch["index"].tolist(), predictions, original_sizes.tolist(), strict=True
            )
            if index >= 0
        ]

    def on_validation_epoch_end(self) -> None:
        datamodule = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        accuracies, _ = self._evaluate(self._gather(), datamodule, "val")
        # A figure is None if the data have no objects for it. NaN then makes no checkpoint the best one.
        self.val_figures = {
            f"val/{kind}_{name}": math.nan if (value := accuracy.figures[name]) is None else value
            for kind, accuracy in accuracies.items()
            for name in VALIDATION_FIGURES
        }
        # Callbacks that monitor a figure read it from Lightning's log.
        self.log_dict(self.val_figures, logger=False)

    def on_test_epoch_end(self) -> None:
        datamodule = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self.detections = self._gather()
        self.accuracies, self.set_accuracies = self._evaluate(self.detections, datamodule, "test")

    def on_predict_epoch_end(self) -> None:
        self.detections = self._gather()

    def _gather(self) -> list[ImageDetections]:
        """Return the detections of all ranks, each image once, and forget those of this rank."""
        own, self._rank_detections = self._rank_detections, []
        return merge(image for part in self.gather(own) for image in part)

    def _evaluate(
        self, detections: list[ImageDetections], datamodule: Any, split: str
    ) -> tuple[dict[str, Accuracy], dict[str, dict[str, Accuracy]]]:
        """Compute COCO's figures of a split (LVIS's if it is federated), and those of each set if it joins several.

        Every rank computes them: if one rank did, the others would only wait for it.

        Returns:
            Accuracies by kind, `box` or `mask`, averaged over the sets; and accuracies of each set by name and kind.
        """
        images, categories = datamodule.images(split), datamodule.category_ids
        ids = images.ids.tolist()
        kinds = ("box", "mask") if self.model.masks and datamodule.has_masks else ("box",)

        rules = evaluate if images.index.federated is None else evaluate_federated

        def accuracies(part: list[ImageDetections]) -> dict[str, Accuracy]:
            evaluated = [ids[image.index] for image in part]
            results = coco_results(part, ids, categories)
            return {kind: rules(kind, results, images.truth, evaluated, categories) for kind in kinds}

        rows = {
            name: [row for row, image in enumerate(detections) if image.index in positions]
            for name, positions in datamodule.sets(split).items()
        }
        if not rows:
            return accuracies(detections), {}
        sets = {name: accuracies([detections[row] for row in part]) for name, part in rows.items()}
        places = [np.array(part, int) for part in rows.values()]
        averages = {
            kind: average([accuracy[kind] for accuracy in sets.values()], places, len(detections)) for kind in kinds
        }
        return averages, sets

    def test_figures(self, datamodule: Any) -> dict[str, Any]:
        """Return the number `n` of images, the figures of boxes and masks, and the figures by set and by class.

        Names are `box_ap`, ..., `mask_ap`, ...; `per_class` is a dictionary by class. If the test split joins several
        sets, the figures are means over the sets, and the figures of a set have its name: `hidden/n`, `hidden/box_ap`.
        Average precision, also at 50 and 75 % and of each class, has an interval `<name>_ci95` from half-samples of
        the images; it is None where the figure is, and for a single image.
        """
        images = datamodule.images("test")
        figures: dict[str, Any] = {
            f"{kind}_{name}": value
            for kind, accuracy in self.accuracies.items()
            for name, value in accuracy.figures.items()
        }
        intervals = {kind: accuracy.matches.intervals() for kind, accuracy in self.accuracies.items()}
        for kind, pairs in intervals.items():
            figures |= name_intervals(f"{kind}_", pairs)
        figures["ci_methods"] = dict.fromkeys(
            [f"{kind}_{name}" for kind in intervals for name in AP_FIGURES],
            f"half-samples of the images, accumulated anew, less the bias, {HALF_SAMPLES} half-samples, seed 0",
        )
        for name, positions in datamodule.sets("test").items():
            figures[f"{name}/n"] = sum(image.index in positions for image in self.detections)
            for kind, accuracy in self.set_accuracies[name].items():
                figures |= {f"{name}/{kind}_{figure}": accuracy.figures[figure] for figure in VALIDATION_FIGURES}
                figures |= name_intervals(f"{name}/{kind}_", accuracy.matches.intervals())
        evaluated = images.ids[[image.index for image in self.detections]].tolist()
        classes = per_class(self.accuracies, images.truth, evaluated, datamodule.category_ids, datamodule.class_names)
        for kind, pairs in intervals.items():
            for row, pair in zip(classes.values(), pairs[len(AP_FIGURES) :], strict=True):
                row[f"{kind}_ap_ci95"] = interval_or_none(pair)
        return {"n": len(self.detections), **figures, "per_class": classes}

    def contributions(self, datamodule: Any) -> Contributions:
        names = [datamodule.images("test").name(image.index) for image in self.detections]
        arrays = {
            f"{kind}_{name}": values
            for kind, accuracy in self.accuracies.items()
            for name, values in accuracy.matches.arrays().items()
        }
        return Contributions("detection", np.array(names), arrays)

    def write_report(self, folder: Path, datamodule: Any) -> None:
        """Write the predictions, `pr_*.png`, `pr_curves.csv`, `per_class.png`, `confusion.*` and `images/*.png`.

        The last are pictures of `save_images` images, evenly spread over the split.
        """
        images, names, categories = datamodule.images("test"), datamodule.class_names, datamodule.category_ids
        ids = images.ids.tolist()
        self.write_predictions(folder, datamodule)
        plot_precision_recall(folder / "pr_curves.png", self.accuracies)
        plot_precision_by_size(folder / "pr_sizes.png", self.accuracies)
        plot_precision_by_class(folder / "pr_classes.png", self.accuracies, names)
        write_precision_csv(folder / "pr_curves.csv", self.accuracies, names)
        pairs = confusion_matrix(self.detections, images.truth, ids, categories, min_score=MIN_DRAWN_SCORE)
        draw_confusion(folder / "confusion.png", pairs, [*names, BACKGROUND], "boxes")
        plot_class_ap(folder / "per_class.png", self.accuracies, names)

        step = max(1, len(self.detections) // max(1, self.save_images))
        drawn = self.detections[::step][: self.save_images]
        objects = {ids[detections.index]: [] for detections in drawn}
        for annotation in images.truth["annotations"]:
            if annotation["image_id"] in objects:
                objects[annotation["image_id"]].append(annotation)
        for detections in drawn:
            index = detections.index
            path, image, truth = self.picture_path(folder, images, index), images[index]["image"], objects[ids[index]]
            plot_detections(path, image, detections, truth, categories, names)

    def write_predictions(self, folder: Path, datamodule: Any) -> None:
        """Write `detections.json`, in COCO's results format, and `detection_ids.json`.

        The second has the images and categories in COCO's format, which name the ids in the first.
        """
        images, categories = datamodule.images("test"), datamodule.category_ids
        ids = images.ids.tolist()
        write_results(folder / "detections.json", coco_results(self.detections, ids, categories))
        names_of_ids = {
            "images": [
                {
                    "id": ids[image.index],
                    "height": image.size[0],
                    "width": image.size[1],
                    "file_name": images.name(image.index),
                }
                for image in self.detections
            ],
            "categories": [
                {"id": category, "name": name}
                for category, name in zip(categories, datamodule.class_names, strict=True)
            ],
        }
        write_text(folder / "detection_ids.json", json.dumps(names_of_ids))

    def describe_predictions(self, datamodule: Any) -> dict[int, str]:
        descriptions = {}
        for image in self.detections:
            counts = Counter(image.labels[image.scores >= MIN_DRAWN_SCORE].tolist())
            objects = ", ".join(f"{count} {datamodule.class_names[label]}" for label, count in counts.most_common(5))
            descriptions[image.index] = objects or f"nothing with a score of {MIN_DRAWN_SCORE} or more"
        return descriptions

    def draw_prediction(self, path: Path, index: int, datamodule: Any) -> None:
        image = datamodule.images("test").image(index)
        [detections] = (detections for detections in self.detections if detections.index == index)
        plot_detections(path, image, detections, None, datamodule.category_ids, datamodule.class_names)


def name_intervals(prefix: str, intervals: np.ndarray) -> dict[str, list[float] | None]:
    """Return the intervals of `ap`, `ap50` and `ap75` as `<prefix>ap_ci95`, ..., from those of `Matches.intervals`."""
    overall = zip(AP_FIGURES, intervals[: len(AP_FIGURES)], strict=True)
    return {f"{prefix}{name}_ci95": interval_or_none(pair) for name, pair in overall}


def interval_or_none(pair: np.ndarray) -> list[float] | None:
    """Return the ends of an interval, or None for an undefined one, which JSON lacks."""
    return None if np.isnan(pair).any() else pair.tolist()
