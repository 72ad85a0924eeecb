"""Task of semantic segmentation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from models.openmmlab.build import Segmentor, build_segmentor
from retinue.evaluation import manipulation
from retinue.evaluation.contributions import Contributions
from retinue.evaluation.medical import (
    RATES,
    add_medical_figures,
    image_distances,
    image_rates,
    mean_figures,
    with_counts,
)
from retinue.evaluation.plots import draw_confusion
from retinue.evaluation.segmentation import PixelCounts, areas, confusion_matrix, figures, summarize, write_iou_csv
from retinue.evaluation.segmentation_plots import draw_prediction, plot_class_iou, write_map, write_map_classes
from retinue.tasks.base import NOT_FINITE_ADVICE
from retinue.tasks.dense_prediction import DensePredictionTask
from retinue.utils.arithmetic import ceil_div, round_up
from retinue.utils.suggestions import nearest

MODES = ("whole", "slide")


@dataclass(frozen=True)
class Inference:
    """Rules of mmsegmentation by which an image becomes scores of its pixels.

    Args:
        mode: "whole" runs the net on the whole image, "slide" on windows; where windows overlap, their logits are
            averaged.
        crop: (height, width) of a window in pixels. The last window of a row or column ends with the image.
        stride: Distances (vertical, horizontal) between windows in pixels.
        scales: Factors of the image's size. With several, the softmax is averaged over them.
        flip: Average the softmax over each image and its mirror image.
        multiple: Enlarge images to sides that are multiples of this number of pixels; None does not.

    Raises:
        ValueError: A value is out of its range.
    """

    mode: str = "whole"
    crop: Sequence[int] = (512, 512)
    stride: Sequence[int] = (341, 341)
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    multiple: int | None = None

    def __post_init__(self):
        if self.mode not in MODES:
            hint = nearest(str(self.mode), MODES)
            raise ValueError(f"task.test.mode must be {' or '.join(MODES)}, not {self.mode!r}.{hint}")
        crop, stride = list(self.crop), list(self.stride)
        if len(crop) != 2 or len(stride) != 2 or not all(0 < s <= c for s, c in zip(stride, crop, strict=True)):
            raise ValueError(
                "task.test.crop and task.test.stride are [height, width], a stride from 1 to the crop's side; "
                f"not {crop} and {stride}"
            )
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"task.test.scales must be factors above 0, as [0.5, 1.0, 1.5], not {list(self.scales)}")
        if self.multiple is not None and self.multiple < 1:
            raise ValueError(f"task.test.multiple must be null or a number of pixels, not {self.multiple!r}")

    def __call__(self, logits: Callable[[Tensor], Tensor], image: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the scores (K, *size) of an image; a pixel's class is the one with the highest score.

        Scores are logits, or sums of softmax values with several scales or flipping.

        Args:
            logits: Function from images (1, C, h, w) to logits (1, K, h, w).
            image: (C, h, w).
            size: (height, width) of the result.
        """
        mirrors = (False, True) if self.flip else (False,)
        views = [(scale, mirror) for scale in self.scales for mirror in mirrors]
        total: Any = 0.0
        for scale, mirror in views:
            view = self._resize(image[None], scale)
            scores = self._logits(logits, view.flip(-1) if mirror else view)
            scores = resize(scores.flip(-1) if mirror else scores, size)
            total = total + scores.softmax(1) if len(views) > 1 else scores
        return total[0]

    def _resize(self, image: Tensor, scale: float) -> Tensor:
        """Scale an image (1, C, h, w), with sides that are multiples of `multiple`."""
        multiple = 1 if self.multiple is None else self.multiple
        height, width = (round_up(int(side * scale + 0.5), multiple) for side in image.shape[-2:])
        return resize(image, (max(1, height), max(1, width)))

    def _logits(self, logits: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
        """Compute the logits (1, K, h, w), float32, of an image (1, C, h, w) in one piece or by windows."""
        if self.mode == "whole":
            return logits(image).float()
        H, W = image.shape[-2:]
        total: Any = None
        # Number of windows that cover each pixel.
        counts = image.new_zeros(H, W, dtype=torch.float32)
        for top, bottom in windows(H, self.crop[0], self.stride[0]):
            for left, right in windows(W, self.crop[1], self.stride[1]):
                scores = logits(image[..., top:bottom, left:right]).float()
                total = scores.new_zeros(*scores.shape[:2], H, W) if total is None else total
                total[..., top:bottom, left:right] += scores
                counts[top:bottom, left:right] += 1
        return total / counts


def windows(length: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """Return (start, end) of each window along a side of an image, in pixels; the last window ends with the image.

    Args:
        length: Length of the side.
        crop: Length of a window; a shorter side has one window, which is the side.
        stride: Distance between windows.
    """
    count = max(0, ceil_div(length - crop, stride)) + 1
    ends = [min(i * stride + crop, length) for i in range(count)]
    return [(max(0, end - crop), end) for end in ends]


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (..., h, w) to `size` (height, width) as mmsegmentation does: bilinear, without antialiasing."""
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


class Segmentation(DensePredictionTask):
    """Segmentation by the losses of the segmentor's heads; the figure is the mean intersection over union (mIoU).

    A validation takes the test's `mode`, `crop`, `stride` and `multiple`, at one scale and without flipping.

    Args:
        model: The segmentor.
        recipe: As in `Task`.
        num_classes: Number of classes.
        test: How images become predictions in a test: the fields of `Inference`.
        figures: "medical" adds the figures of `retinue.evaluation.medical`; None does not.
        spacing: Distances between the pixels of a mask (vertical, horizontal) in mm. None measures in pixels.
        kwargs: Further arguments of `Task`.

    Attributes:
        counts: Pixel counts of all ranks for the test split, after a test.
        pictures: Predictions (H, W), uint8, that the report draws, by index in the split, after a test.
        pixels: Number of pixels (K,) of each predicted class by index, after a prediction.
        aucs: Area under the ROC curve of each image by index in the split, after a test with two classes.

    Raises:
        ValueError: A value of `test` is out of its range.
    """

    model: Segmentor
    methods = ("loss", "logits")

    def __init__(
        self,
        model: nn.Module,
        recipe: Mapping,
        *,
        num_classes: int,
        test: Mapping,
        figures: str | None = None,
        spacing: Sequence[float] | None = None,
        **kwargs,
    ):
        super().__init__(model, recipe, **kwargs)
        self.num_classes, self.medical, self.spacing = num_classes, figures == "medical", spacing
        self.inference = Inference(**test)
        # Confusion matrix (K, K) of this rank in the current validation.
        self._val_confusion: Tensor | None = None
        # Number of steps of the training, from its start on.
        self._steps = 0
        # Sums (2, 4, K) of the medical rates of this rank's images in the current validation.
        self._val_rates: Any = 0.0
        # Counts and predictions of this rank in the current test.
        self._rank_counts = PixelCounts(num_classes)
        self._rank_pictures: dict[int, Any] = {}
        self._rank_aucs: dict[int, float] = {}
        self.counts: PixelCounts | None = None
        self.pictures: dict[int, Any] = {}
        # Number of pixels (K,) of each predicted class by index, of this rank and of all ranks.
        self._rank_pixels: dict[int, np.ndarray] = {}
        self.pixels: dict[int, np.ndarray] = {}
        self.aucs: dict[int, float] = {}

    @staticmethod
    def build_net(cfg: Any, datamodule: Any) -> nn.Module:
        return build_segmentor(cfg, datamodule, cfg.task.get("losses"), cfg.task.get("class_weights"))

    def test_figures(self, datamodule: Any) -> dict[str, Any]:
        assert self.counts is not None
        summary = summarize(self.counts, datamodule.class_names)
        if self.aucs:
            indices = sorted(self.aucs)
            areas_of_images = np.stack([self.counts.areas[index] for index in indices])
            of_pixels = manipulation.summarize(areas_of_images, np.array([self.aucs[index] for index in indices]))
            summary = summary | of_pixels | {"ci_methods": summary["ci_methods"] | of_pixels["ci_methods"]}
        if self.medical:
            unit = "px" if self.spacing is None else "mm"
            add_medical_figures(summary, self.counts, datamodule.class_names, datamodule.background, unit)
        return summary

    def contributions(self, datamodule: Any) -> Contributions:
        assert self.counts is not None
        indices, images = sorted(self.counts.areas), datamodule.images("test")
        areas_of_images = np.stack([self.counts.areas[index] for index in indices])
        names = [images.name(index) for index in indices]
        arrays = {"areas": areas_of_images}
        if self.aucs:
            arrays["pixel_auc"] = np.array([self.aucs[index] for index in indices])
        if self.medical:
            background = -1 if datamodule.background is None else datamodule.background
            arrays["distances"] = np.stack([self.counts.distances[index] for index in indices])
            arrays["background"] = np.array(background)
        return Contributions("segmentation", np.array(names), arrays)

    def write_report(self, folder: Path, datamodule: Any) -> None:
        """Write `iou.csv`, `per_class.png`, `confusion.png` and `images/*.png`.

        The last are pictures of `save_images` images, evenly spread over the split. With `predictions_folder`, the test
        has written the maps, and this writes what they mean.
        """
        assert self.counts is not None
        classes, images = datamodule.class_names, datamodule.images("test")
        write_iou_csv(folder / "iou.csv", self.counts, classes)
        plot_class_iou(folder / "per_class.png", self.counts, classes)
        draw_confusion(folder / "confusion.png", self.counts.confusion, classes, "pixels")
        for index, prediction in sorted(self.pictures.items()):
            sample = images[index]
            path = self.picture_path(folder, images, index)
            draw_prediction(path, sample["image"], sample["mask"], prediction, classes)
        if self.predictions_folder:
            self.write_predictions(folder, datamodule)

    def on_train_start(self) -> None:
        self._steps = self.steps_per_epoch() * (self.trainer.max_epochs or 0)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.model.set_progress(self.global_step / self._steps)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = self.model.loss(batch["image"], batch["mask"])
        return self.sum_losses(losses | self.distillation_losses(batch["image"]), len(batch["image"]))

    def predictions(self, batch: dict[str, Any], inference: Inference) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the index, the scores (K, H, W) and the true mask (H, W) of each image of a batch.

        The net runs on one image at a time: so predictions do not depend on the batch, and the logits of many classes
        take less memory.

        Raises:
            ValueError: A score is NaN; argmax would take it for the best class.
        """
        for index, image, mask in zip(batch["index"].tolist(), batch["image"], batch["mask"], strict=True):
            scores = inference(self.model.logits, image, tuple(mask.shape))  # pyright: ignore[reportArgumentType]
            # An image that pads the last batch of a rank has the index -1. The net runs on it all the same, since ranks
            # that share sharded weights (FSDP) must run the net equally often.
            if index >= 0:
                if scores.isnan().any():
                    raise ValueError(f"the scores of image {index} are not finite; {NOT_FINITE_ADVICE}")
                yield index, scores, mask

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if self._val_confusion is None:
            self._val_confusion = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64, device=self.device)
        for _, scores, mask in self.predictions(batch, replace(self.inference, scales=(1.0,), flip=False)):
            confusion = confusion_matrix(scores.argmax(0), mask, self.num_classes)
            self._val_confusion += confusion
            if self.medical:
                self._val_rates += with_counts(image_rates(areas(confusion.cpu().numpy())))

    def on_validation_epoch_end(self) -> None:
        assert self._val_confusion is not None
        confusion = self.trainer.strategy.reduce(self._val_confusion, reduce_op="sum")
        self._val_confusion = None
        self.val_figures = {f"val/{name}": value for name, value in figures(areas(confusion.cpu().numpy())).items()}
        if self.medical:
            rates = torch.as_tensor(self._val_rates, dtype=torch.float64).expand(2, len(RATES), self.num_classes)
            rates = self.trainer.strategy.reduce(rates.clone().to(self.device), reduce_op="sum").cpu().numpy()
            self._val_rates = 0.0
            means, _ = mean_figures(rates, self.trainer.datamodule.background)  # pyright: ignore[reportAttributeAccessIssue]
            self.val_figures |= {f"val/{name}": float(mean) for name, mean in zip(RATES, means, strict=True)}
        # Callbacks that monitor a figure read it from Lightning's log.
        self.log_dict(self.val_figures, logger=False)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        images = self.trainer.datamodule.images("test")  # pyright: ignore[reportAttributeAccessIssue]
        step = max(1, len(images) // max(1, self.save_images))
        for index, scores, mask in self.predictions(batch, self.inference):
            prediction = scores.argmax(0)
            confusion, distances = confusion_matrix(prediction, mask, self.num_classes).cpu().numpy(), None
            if self.num_classes == 2:
                self._rank_aucs[index] = manipulation.pixel_auc(
                    (scores[1] - scores[0]).cpu().numpy(), mask.cpu().numpy()
                )
            if self.medical:
                labels = prediction.cpu().numpy(), mask.cpu().numpy()
                distances = image_distances(*labels, self.num_classes, self.spacing)
            self._rank_counts.add(index, confusion, distances)
            if self.predictions_folder:
                self._write_map(images, index, prediction)
            if index % step == 0 and index < step * self.save_images:
                self._rank_pictures[index] = prediction.to(torch.uint8).cpu().numpy()

    def on_test_epoch_end(self) -> None:
        own = self._rank_counts, self._rank_pictures, self._rank_aucs
        self._rank_counts, self._rank_pictures, self._rank_aucs = PixelCounts(self.num_classes), {}, {}
        self.counts, self.pictures, self.aucs = PixelCounts(self.num_classes), {}, {}
        for counts, pictures, aucs in self.gather(own):
            self.counts.merge(counts)
            self.pictures |= pictures
            self.aucs |= aucs

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        images = self.trainer.datamodule.images("test")  # pyright: ignore[reportAttributeAccessIssue]
        for index, scores, _ in self.predictions(batch, self.inference):
            prediction = scores.argmax(0)
            self._write_map(images, index, prediction)
            self._rank_pixels[index] = prediction.flatten().bincount(minlength=self.num_classes).cpu().numpy()

    def on_predict_epoch_end(self) -> None:
        own, self._rank_pixels = self._rank_pixels, {}
        self.pixels = {index: counts for part in self.gather(own) for index, counts in part.items()}

    def _write_map(self, images: Any, index: int, prediction: Tensor) -> None:
        """Write the map of an image, with the values and, apart from the suffix, the name of the data set's mask."""
        write_map(self._map_path(images, index), prediction.cpu().numpy(), images.mask_values)

    def _map_path(self, images: Any, index: int) -> Path:
        assert self.predictions_folder is not None
        return self.predictions_folder / "maps" / f"{images.stem(index)}.png"

    def write_predictions(self, folder: Path, datamodule: Any) -> None:
        """Write `map_classes.json`, which says what the values in the maps mean; the steps have written the maps."""
        values = datamodule.images("test").mask_values
        write_map_classes(folder / "map_classes.json", datamodule.class_names, values)

    def describe_predictions(self, datamodule: Any) -> dict[int, str]:
        names, descriptions = datamodule.class_names, {}
        for index, counts in self.pixels.items():
            largest = [label for label in np.argsort(-counts, kind="stable")[:5] if counts[label]]
            shares = (f"{names[label]} {100 * counts[label] / counts.sum():.1f} %" for label in largest)
            descriptions[index] = ", ".join(shares)
        return descriptions

    def draw_prediction(self, path: Path, index: int, datamodule: Any) -> None:
        images = datamodule.images("test")
        with Image.open(self._map_path(images, index)) as file:
            values = np.array(file)
        labels = np.zeros(256, np.uint8)
        labels[images.mask_values] = np.arange(self.num_classes)
        draw_prediction(path, images.image(index), None, labels[values], datamodule.class_names)
