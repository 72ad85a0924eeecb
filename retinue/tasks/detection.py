"""Object detection and instance segmentation."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.complexity import complexity
from models.openmmlab.build import Detector, build_detector
from models.openmmlab.config import learns_masks
from retinue.evaluation.detection import (
    Accuracy,
    ImageDetections,
    coco_results,
    evaluate,
    merge,
    per_class,
    write_results,
)
from retinue.evaluation.detection_plots import plot_class_ap, plot_detections, plot_precision_recall
from retinue.tasks.dense import DenseTask

IN_VALIDATION = ("ap", "ap50", "ap75")  # of COCO's twelve figures


class Detection(DenseTask):
    """The detector's own losses; COCO's average precision of boxes and, where there are any, of masks.

    A validation measures average precision alone: what the losses are computed from (sampled proposals, noised queries)
    exists in training only.
    """

    model: Detector
    methods = ("loss", "predict")

    def __init__(self, model: nn.Module, recipe: Mapping, *, num_classes: int, **kwargs):
        super().__init__(model, recipe, **kwargs)  # the detector has been built for the classes
        self._found: list[ImageDetections] = []  # of this rank, in the evaluation that is under way
        self.found: list[ImageDetections] = []  # of all ranks, after a test
        self.accuracies: dict[str, Accuracy] = {}  # of boxes and masks, then

    @staticmethod
    def build_net(cfg: Any, datamodule: Any) -> nn.Module:
        return build_detector(cfg, datamodule)

    @staticmethod
    def data_arguments(cfg: Any) -> dict[str, Any]:
        """Return `read_masks`, so that the data module reads masks only for a detector that learns them."""
        return {"read_masks": learns_masks(cfg.head, cfg.data.kind == "small")}

    def complexity(self, datamodule: Any) -> tuple[int, int]:
        """Parameters, and multiply-accumulates for one image of the data's size, padded as a batch is."""
        height, width = (-(-side // 32) * 32 for side in datamodule.image_size)
        return complexity(self.model, (height, width), datamodule.in_chans)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = self.model.loss(
            batch["image"], batch["sizes"], batch["boxes"], batch["labels"], batch.get("masks"), batch["ignored"]
        )
        return self.summed(losses, len(batch["image"]))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        original_sizes = batch["original_sizes"]
        predictions = self.model.predict(batch["image"], batch["sizes"], original_sizes)
        places = zip(batch["index"].tolist(), predictions, original_sizes.tolist(), strict=True)
        self._found += [ImageDetections.from_tensors(i, *found, size=size) for i, found, size in places if i >= 0]

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        datamodule = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        accuracies = self._evaluate(self._gather(), datamodule, "val")
        # NaN where there is nothing to find: such a figure makes no checkpoint the best one
        self.val_figures = {
            f"val/{kind}_{name}": math.nan if (value := each.figures[name]) is None else value
            for kind, each in accuracies.items()
            for name in IN_VALIDATION
        }
        self.log_dict(self.val_figures, logger=False)  # for callbacks that monitor

    def on_test_epoch_end(self) -> None:
        datamodule = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self.found = self._gather()
        self.accuracies = self._evaluate(self.found, datamodule, "test")

    def _gather(self) -> list[ImageDetections]:
        """What all ranks have found."""
        found, self._found = self._found, []
        if self.trainer.world_size > 1:
            parts: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, found)
            found = [each for part in parts for each in part]
        return merge(found)

    def _evaluate(self, found: list[ImageDetections], datamodule: Any, split: str) -> dict[str, Accuracy]:
        """COCO's figures, on each rank anew: the others would have to wait for one that does it."""
        images, categories = datamodule.images(split), datamodule.category_ids
        ids = images.ids.tolist()
        seen = [ids[each.index] for each in found]
        results = coco_results(found, ids, categories)
        kinds = ("box", "mask") if self.model.masks and datamodule.has_masks else ("box",)
        return {kind: evaluate(kind, results, images.truth, seen, categories) for kind in kinds}

    def test_figures(self, datamodule: Any) -> dict[str, Any]:
        """COCO's twelve of boxes and masks, `n` images, and each class's average precision."""
        images = datamodule.images("test")
        figures = {
            f"{kind}_{name}": value for kind, each in self.accuracies.items() for name, value in each.figures.items()
        }
        seen = images.ids[[each.index for each in self.found]].tolist()
        classes = per_class(self.accuracies, images.truth, seen, datamodule.category_ids, datamodule.class_names)
        return {"n": len(self.found), **figures, "per_class": classes}

    def write_report(self, folder: Path, datamodule: Any) -> None:
        """`detections.json`, `pr_curves.png`, `per_class.png`, and `save_images` of evenly spread `images/*.png`."""
        images, names, categories = datamodule.images("test"), datamodule.class_names, datamodule.category_ids
        ids = images.ids.tolist()
        write_results(folder / "detections.json", coco_results(self.found, ids, categories))
        plot_precision_recall(folder / "pr_curves.png", self.accuracies)
        plot_class_ap(folder / "per_class.png", self.accuracies, names)

        every = max(1, len(self.found) // max(1, self.save_images))
        drawn = self.found[::every][: self.save_images]
        objects = {ids[found.index]: [] for found in drawn}
        for each in images.truth["annotations"]:
            if each["image_id"] in objects:
                objects[each["image_id"]].append(each)
        for found in drawn:
            image, truth = images[found.index]["image"], objects[ids[found.index]]
            plot_detections(self.picture(folder, images, found.index), image, found, truth, categories, names)
