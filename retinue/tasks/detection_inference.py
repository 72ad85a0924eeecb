"""Test-time augmentation of a detector: an image at several scales and mirrored, merged by non-maximum suppression."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms

from datamodules.detection import SIZE_DIVISOR
from models.openmmlab.detector import Detections
from retinue.utils.arithmetic import round_up

Predict = Callable[[Tensor, Tensor, Tensor], list[Detections]]


@dataclass(frozen=True)
class DetectionInference:
    """Rules of mmdetection's DetTTAModel (https://github.com/open-mmlab/mmdetection, Apache-2.0).

    The detections of all views of an image pass through a non-maximum suppression by class. A mask is that of the view
    from which its box comes; DetTTAModel takes no masks.

    Args:
        scales: Factors of the image's size.
        flip: Detect in the mirror image of each view, too.
        nms_iou: IoU from which the box with the lower score is removed.
        max_per_image: Maximum number of detections of an image.

    Raises:
        ValueError: A value is out of its range.
    """

    scales: Sequence[float] = (1.0,)
    flip: bool = False
    nms_iou: float = 0.5
    max_per_image: int = 100

    def __post_init__(self):
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"task.test.scales must be factors above 0, as [0.8, 1.0, 1.2], not {list(self.scales)}")

    @property
    def is_plain(self) -> bool:
        """True if the only view is the image itself, whose detections are then left as they are."""
        return list(self.scales) == [1.0] and not self.flip

    def __call__(self, predict: Predict, image: Tensor, sizes: Tensor, original_sizes: Tensor) -> list[Detections]:
        """Return the detections of each image, in pixels of the original images.

        Args:
            predict: `Detector.predict`.
            image: (B, C, H, W), padded with zeros at the right and the bottom.
            sizes: (B, 2), height and width of each image without its padding.
            original_sizes: (B, 2), height and width before the images were resized.
        """
        if self.is_plain:
            return predict(image, sizes, original_sizes)
        views: list[list[Detections]] = []
        for scale in self.scales:
            for mirrored in (False, True) if self.flip else (False,):
                view, view_sizes = make_view(image, sizes, scale, mirrored)
                found = predict(view, view_sizes, original_sizes)
                widths = original_sizes[:, 1].tolist()
                views.append([mirror(d, w) for d, w in zip(found, widths, strict=True)] if mirrored else found)
        return [self._merge(of_image) for of_image in zip(*views, strict=True)]

    def _merge(self, views: Sequence[Detections]) -> Detections:
        boxes, scores, labels = (torch.cat([view[i] for view in views]) for i in range(3))  # pyright: ignore[reportCallIssue, reportArgumentType]
        kept = batched_nms(boxes, scores, labels, self.nms_iou)[: self.max_per_image]
        masks = None if views[0].masks is None else torch.cat([view.masks for view in views])[kept]  # pyright: ignore[reportCallIssue, reportArgumentType]
        return Detections(boxes[kept], scores[kept], labels[kept], masks)


def make_view(image: Tensor, sizes: Tensor, scale: float, mirrored: bool) -> tuple[Tensor, Tensor]:
    """Scale and mirror the images of a batch; their padding stays at the right and the bottom.

    Args:
        image: (B, C, H, W), padded with zeros at the right and the bottom.
        sizes: (B, 2), height and width of each image without its padding.
        scale: Factor of the image's size.
        mirrored: Mirror the images horizontally.

    Returns:
        The batch, whose sides are multiples of 32, and the sizes of its images.
    """
    new_sizes = (sizes * scale + 0.5).long().clamp(min=1)
    height, width = (round_up(side, SIZE_DIVISOR) for side in new_sizes.amax(0).tolist())
    view = image.new_zeros(*image.shape[:2], height, width).to(memory_format=torch.channels_last)
    for i, ((h, w), (new_h, new_w)) in enumerate(zip(sizes.tolist(), new_sizes.tolist(), strict=True)):
        content = image[i : i + 1, :, :h, :w]
        if (h, w) != (new_h, new_w):
            content = F.interpolate(content, (new_h, new_w), mode="bilinear", align_corners=False)
        view[i, :, :new_h, :new_w] = (content.flip(-1) if mirrored else content)[0]
    return view, new_sizes


def mirror(detections: Detections, width: int) -> Detections:
    """Return the detections in the mirror image of an image of `width` pixels."""
    x1, y1, x2, y2 = detections.boxes.unbind(1)
    boxes = torch.stack([width - x2, y1, width - x1, y2], 1)
    return detections._replace(boxes=boxes, masks=None if detections.masks is None else detections.masks.flip(-1))
