"""Task of panoptic segmentation."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from datamodules.coco_panoptic import segment_ids
from models.openmmlab.build import build_panoptic
from models.openmmlab.panoptic import PanopticSegmentor
from retinue.evaluation.contributions import Contributions
from retinue.evaluation.panoptic import Segments, figures, match, summarize, write_pq_csv, write_segments
from retinue.evaluation.segmentation_plots import draw_prediction
from retinue.tasks.detection import Detection
from retinue.utils.files import write_text
from retinue.utils.masks import IGNORED


class Panoptic(Detection):
    """Panoptic segmentation, trained as a detector of all segments; the figure is the panoptic quality (PQ).

    Args:
        model: The panoptic segmentor, already built for the data's classes.
        recipe: As in `Task`.
        num_classes: Number of classes.
        kwargs: Further arguments of `Task`.

    Attributes:
        counts: Counts (4, K) of each image of the test split, of all ranks, after a test.
    """

    model: PanopticSegmentor  # pyright: ignore[reportIncompatibleVariableOverride]
    methods = ("loss", "segments")

    def __init__(self, model: nn.Module, recipe: Mapping, *, num_classes: int, **kwargs):
        super().__init__(model, recipe, num_classes=num_classes, **kwargs)
        self.num_classes = num_classes
        # Counts, results in COCO's format and labels of pixels to draw, by image, of this rank in this evaluation.
        self._rank_images: tuple[dict[int, Any], ...] = ({}, {}, {})
        self.counts: dict[int, np.ndarray] = {}
        self.results: dict[int, Any] = {}
        self.pictures: dict[int, Any] = {}

    @staticmethod
    def build_net(cfg: Any, datamodule: Any) -> nn.Module:
        return build_panoptic(cfg, datamodule)

    @staticmethod
    def data_arguments(cfg: Any) -> dict[str, Any]:
        return {}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate_batch(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate_batch(batch, "test")

    def _evaluate_batch(self, batch: dict[str, Any], split: str) -> None:
        datamodule = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        images = datamodule.images(split)
        counts, results, pictures = self._rank_images
        step = max(1, len(images) // max(1, self.save_images))
        predictions = self.model.segments(batch["image"], batch["sizes"], batch["original_sizes"])
        for index, (ids, labels) in zip(batch["index"].tolist(), predictions, strict=True):
            # Images that pad the last batch of a rank have the index -1.
            if index < 0:
                continue
            prediction, truth = Segments(ids.cpu().numpy(), labels), true_segments(images.index, index)
            counts[index] = match(prediction, truth, self.num_classes)
            if self.predictions_folder and split == "test":
                results[index] = self._write_segments(images, index, prediction)
            if split == "test" and index % step == 0 and index < step * self.save_images:
                pictures[index] = pixel_labels(truth), pixel_labels(prediction)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        images = self.trainer.datamodule.images("test")  # pyright: ignore[reportAttributeAccessIssue]
        _, results, _ = self._rank_images
        predictions = self.model.segments(batch["image"], batch["sizes"], batch["original_sizes"])
        for index, (ids, labels) in zip(batch["index"].tolist(), predictions, strict=True):
            if index >= 0:
                results[index] = self._write_segments(images, index, Segments(ids.cpu().numpy(), labels))

    def _write_segments(self, images: Any, index: int, prediction: Segments) -> dict[str, Any]:
        """Write the map of an image, and return the image's entry in `panoptic.json`."""
        datamodule = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        info = write_segments(self._map_path(images, index), prediction, datamodule.category_ids)
        return {
            "image_id": int(images.ids[index]), "file_name": f"{images.stem(index)}.png", "segments_info": info,
        }  # fmt: skip

    def _map_path(self, images: Any, index: int) -> Path:
        assert self.predictions_folder is not None
        return self.predictions_folder / "maps" / f"{images.stem(index)}.png"

    def _gather_images(self) -> tuple[dict[int, Any], ...]:
        """Return what all ranks have found, by image, and forget that of this rank."""
        own, self._rank_images = self._rank_images, ({}, {}, {})
        parts = self.gather(own)
        return tuple({index: value for part in parts for index, value in part[i].items()} for i in range(len(own)))

    def on_validation_epoch_end(self) -> None:
        counts, *_ = self._gather_images()
        datamodule = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        total = np.sum(list(counts.values()), axis=0)
        self.val_figures = {f"val/{name}": value for name, value in figures(total, datamodule.num_things).items()}
        # Callbacks that monitor a figure read it from Lightning's log.
        self.log_dict(self.val_figures, logger=False)

    def on_test_epoch_end(self) -> None:
        self.counts, self.results, self.pictures = self._gather_images()

    on_predict_epoch_end = on_test_epoch_end

    def test_figures(self, datamodule: Any) -> dict[str, Any]:
        return summarize(self.counts, datamodule.class_names, datamodule.num_things)

    def contributions(self, datamodule: Any) -> Contributions:
        indices, images = sorted(self.counts), datamodule.images("test")
        names = [images.name(index) for index in indices]
        arrays = {
            "counts": np.stack([self.counts[index] for index in indices]),
            "num_things": np.array(datamodule.num_things),
        }
        return Contributions("panoptic", np.array(names), arrays)

    def write_report(self, folder: Path, datamodule: Any) -> None:
        """Write `pq.csv`, `images/*.png` and, beside the maps, `panoptic.json` in COCO's format of results."""
        write_pq_csv(folder / "pq.csv", self.counts, datamodule.class_names)
        if self.predictions_folder:
            self.write_predictions(folder, datamodule)
        images = datamodule.images("test")
        for index, (truth, prediction) in sorted(self.pictures.items()):
            path = self.picture_path(folder, images, index)
            draw_prediction(path, images[index]["image"], truth, prediction, datamodule.class_names)

    def write_predictions(self, folder: Path, datamodule: Any) -> None:
        """Write `panoptic.json`: the segments in COCO's format of results, and the images and classes of their ids."""
        images, results = datamodule.images("test"), sorted(self.results.items())
        content = {
            "images": [{"id": result["image_id"], "file_name": images.name(index)} for index, result in results],
            "annotations": [result for _, result in results],
            "categories": [
                {"id": id, "name": name, "isthing": int(label < datamodule.num_things)}
                for label, (id, name) in enumerate(zip(datamodule.category_ids, datamodule.class_names, strict=True))
            ],
        }
        write_text(folder / "panoptic.json", json.dumps(content))

    def describe_predictions(self, datamodule: Any) -> dict[int, str]:
        names = dict(zip(datamodule.category_ids, datamodule.class_names, strict=True))
        descriptions = {}
        for index, result in self.results.items():
            counts = Counter(names[segment["category_id"]] for segment in result["segments_info"])
            segments = ", ".join(f"{count} {name}" for name, count in counts.most_common(5))
            descriptions[index] = segments or "no segment"
        return descriptions

    def draw_prediction(self, path: Path, index: int, datamodule: Any) -> None:
        images, labels = datamodule.images("test"), {id: i for i, id in enumerate(datamodule.category_ids)}
        segments = self.results[index]["segments_info"]
        with Image.open(self._map_path(images, index)) as file:
            ids = segment_ids(np.array(file))
        prediction = Segments(ids, {segment["id"]: labels[segment["category_id"]] for segment in segments})
        draw_prediction(path, images.image(index), None, pixel_labels(prediction), datamodule.class_names)


def true_segments(index: Any, image: int) -> Segments:
    """Return the true segments of the image at a position of a `datamodules.coco_panoptic.PanopticIndex`."""
    rows = slice(*index.starts[image : image + 2])
    ids = index.segment_ids[rows]
    labels = dict(zip(ids.tolist(), index.labels[rows].tolist(), strict=True))
    return Segments(index.segment_map(image), labels, frozenset(ids[index.crowd[rows]].tolist()))


def pixel_labels(segments: Segments) -> np.ndarray:
    """Return the label of each pixel, int64 (H, W); 255 outside the segments, as in a mask."""
    ids, positions = np.unique(segments.ids, return_inverse=True)
    labels = np.array([segments.labels.get(int(id), IGNORED) for id in ids])
    return labels[positions].reshape(segments.ids.shape)
