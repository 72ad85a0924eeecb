"""Panoptic segmentors of mmdetection under one interface of plain tensors.

mmdetection: arXiv:1906.07155, https://github.com/open-mmlab/mmdetection (3.3.0)
"""

from typing import Any

from torch import Tensor

from models.openmmlab.detector import Detector


class PanopticSegmentor(Detector):
    """Panoptic segmentor of mmdetection, mixed with the package's class by `build_panoptic`.

    The objects of `loss` are all segments of an image, things and stuff, with their masks; the things' labels are lower
    than those of the stuff.
    """

    @property
    def masks(self) -> bool:
        return True

    def segments(self, image: Tensor, sizes: Tensor, original_sizes: Tensor) -> list[tuple[Tensor, dict[int, int]]]:
        """Predict the segments of images.

        Args:
            image: (B, C, H, W).
            sizes: (B, 2), height and width of each image without its padding.
            original_sizes: (B, 2), height and width before the images were resized.

        Returns:
            For each image, the id of the segment at each pixel, int64 (H0, W0), 0 for no segment, and the label of each
            segment by its id, 1, 2, ...
        """
        from mmdet.evaluation.functional import INSTANCE_OFFSET

        net: Any = self
        package: Any = super(Detector, self)
        results = []
        for sample in package.predict(image, self._samples(image, sizes, original_sizes), rescale=True):
            # The code of a pixel is its label, for things plus a multiple of the offset; K is the label of no segment.
            codes, ids = sample.pred_panoptic_seg.sem_seg[0].unique(return_inverse=True)
            labels = (codes % INSTANCE_OFFSET).tolist()
            no_segment = ids == labels.index(net.num_classes) if net.num_classes in labels else ids < 0
            segments = {i: label for i, label in enumerate(labels, 1) if label != net.num_classes}
            results.append(((ids + 1).masked_fill(no_segment, 0), segments))
        return results
