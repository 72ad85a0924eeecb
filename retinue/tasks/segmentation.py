"""Semantic segmentation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.openmmlab.build import Segmentor, build_segmentor
from retinue.evaluation.plots import draw_confusion
from retinue.evaluation.segmentation import PixelCounts, areas, confusion_matrix, figures, summarize, write_iou_csv
from retinue.evaluation.segmentation_plots import draw_prediction, plot_class_iou
from retinue.tasks.dense import DenseTask
from retinue.utils.suggestions import nearest

MODES = ("whole", "slide")


@dataclass(frozen=True)
class Inference:
    """From an image to scores of its pixels, by mmsegmentation's rules.

    Args:
        mode: whole: the image goes through the net in one piece; slide: in windows, whose logits are averaged where
            they overlap.
        crop: (height, width) of a window; the last ones of a row and a column end with the image.
        stride: steps between windows.
        scales, flip: average the softmax over the image in these sizes, and over each and its mirror image.
        multiple: enlarge images to sides that are multiples of this.

    Raises:
        ValueError: a value is out of its range.
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
        """Scores (K, *size) of an image (C, h, w), of which the highest is the class.

        Args:
            logits: from images (1, C, h, w) to logits (1, K, h, w).
        """
        views = [(scale, mirror) for scale in self.scales for mirror in ((False, True) if self.flip else (False,))]
        total: Any = 0.0
        for scale, mirror in views:
            view = self._resize(image[None], scale)
            scores = self._logits(logits, view.flip(-1) if mirror else view)
            scores = resize(scores.flip(-1) if mirror else scores, size)
            total = total + scores.softmax(1) if len(views) > 1 else scores
        return total[0]

    def _resize(self, image: Tensor, scale: float) -> Tensor:
        multiple = self.multiple or 1
        height, width = (-(-int(side * scale + 0.5) // multiple) * multiple for side in image.shape[-2:])
        return resize(image, (max(1, height), max(1, width)))

    def _logits(self, logits: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
        if self.mode == "whole":
            return logits(image).float()
        H, W = image.shape[-2:]
        total: Any = None
        times = image.new_zeros(H, W, dtype=torch.float32)
        for top, bottom in windows(H, self.crop[0], self.stride[0]):
            for left, right in windows(W, self.crop[1], self.stride[1]):
                scores = logits(image[..., top:bottom, left:right]).float()
                total = scores.new_zeros(*scores.shape[:2], H, W) if total is None else total
                total[..., top:bottom, left:right] += scores
                times[top:bottom, left:right] += 1
        return total / times


def windows(length: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """Starts and ends of windows `stride` apart over a side of an image; the last one ends with it."""
    count = max(0, -(-(length - crop) // stride)) + 1
    ends = [min(i * stride + crop, length) for i in range(count)]
    return [(max(0, end - crop), end) for end in ends]


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, without smoothing: what mmsegmentation's images and logits go through."""
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


class Segmentation(DenseTask):
    """The losses of the segmentor's heads; mean intersection over union.

    A validation takes the test's `mode`, `crop`, `stride` and `multiple`, at one scale and without flipping.

    Args:
        test: how images are read in a test, the fields of `Inference`.
    """

    model: Segmentor
    methods = ("loss", "logits")

    def __init__(self, model: nn.Module, recipe: Mapping, *, num_classes: int, test: Mapping, **kwargs):
        super().__init__(model, recipe, **kwargs)
        self.num_classes = num_classes
        self.inference = Inference(**test)
        self._val: Tensor | None = None
        self._counts = PixelCounts(num_classes)
        self._pictures: dict[int, Any] = {}  # predictions (H, W) uint8 to be drawn, by index
        self.counts: PixelCounts | None = None  # of all ranks, after a test
        self.pictures: dict[int, Any] = {}

    @staticmethod
    def build_net(cfg: Any, datamodule: Any) -> nn.Module:
        return build_segmentor(cfg, datamodule)

    def test_figures(self, datamodule: Any) -> dict[str, Any]:
        assert self.counts is not None
        return summarize(self.counts, datamodule.class_names)

    def write_report(self, folder: Path, datamodule: Any) -> None:
        """`iou.csv`, `per_class.png`, `confusion.png`, and the first `save_images` of evenly spread `images/*.png`."""
        assert self.counts is not None
        classes, images = datamodule.class_names, datamodule.images("test")
        write_iou_csv(folder / "iou.csv", self.counts, classes)
        plot_class_iou(folder / "per_class.png", self.counts, classes)
        draw_confusion(folder / "confusion.png", self.counts.confusion, classes, "pixels")
        for index, prediction in sorted(self.pictures.items()):
            sample = images[index]
            draw_prediction(self.picture(folder, images, index), sample["image"], sample["mask"], prediction, classes)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.summed(self.model.loss(batch["image"], batch["mask"]), len(batch["image"]))

    def predictions(self, batch: dict[str, Any], inference: Inference) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Index, prediction (H, W) and true mask (H, W) of the images of a batch, one by one: what comes out does not
        depend on the batch, and logits of many classes take much memory."""
        for index, image, mask in zip(batch["index"].tolist(), batch["image"], batch["mask"], strict=True):
            scores = inference(self.model.logits, image, tuple(mask.shape))  # pyright: ignore[reportArgumentType]
            if index >= 0:  # padding goes through the net, too: ranks that share its weights keep step
                yield index, scores.argmax(0), mask

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if self._val is None:
            self._val = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64, device=self.device)
        for _, prediction, mask in self.predictions(batch, replace(self.inference, scales=(1.0,), flip=False)):
            self._val += confusion_matrix(prediction, mask, self.num_classes)

    def on_validation_epoch_end(self) -> None:
        assert self._val is not None
        confusion = self.trainer.strategy.reduce(self._val, reduce_op="sum")
        self._val = None
        self.val_figures = {f"val/{name}": value for name, value in figures(areas(confusion.cpu().numpy())).items()}
        self.log_dict(self.val_figures, logger=False)  # for callbacks that monitor

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        images = len(self.trainer.datamodule.images("test"))  # pyright: ignore[reportAttributeAccessIssue]
        every = max(1, images // max(1, self.save_images))
        for index, prediction, mask in self.predictions(batch, self.inference):
            self._counts.add(index, confusion_matrix(prediction, mask, self.num_classes).cpu().numpy())
            if index % every == 0 and index < every * self.save_images:
                self._pictures[index] = prediction.to(torch.uint8).cpu().numpy()

    def on_test_epoch_end(self) -> None:
        parts: list[Any] = [(self._counts, self._pictures)]
        if self.trainer.world_size > 1:
            parts = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, (self._counts, self._pictures))
        self._counts, self._pictures = PixelCounts(self.num_classes), {}
        self.counts, self.pictures = PixelCounts(self.num_classes), {}
        for counts, pictures in parts:
            self.counts.merge(counts)
            self.pictures |= pictures
