"""Detectors of mmdetection under one interface of plain tensors.

mmdetection: arXiv:1906.07155, https://github.com/open-mmlab/mmdetection (3.3.0)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.heads.prototypes import Objects, PrototypeRefinement
from models.openmmlab.interface import DensePredictor, sum_losses
from models.openmmlab.meta import on_meta


class Detections(NamedTuple):
    """Detections in one image, in pixels of the original image of H0 x W0.

    Attributes:
        boxes: (N, 4) xyxy, float32.
        scores: (N,) float32, from 0 to 1.
        labels: (N,) int64, from 0 to the number of classes - 1.
        masks: (N, H0, W0) bool; None if the detector predicts no masks.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None


class Detector(DensePredictor):
    """Detector of mmdetection, mixed with the package's class by `build_detector`.

    Images are normalised, and zero-padded on the right and at the bottom to the batch's common size. `sizes` (B, 2)
    holds the height and width of each image without its padding; boxes are xyxy in pixels.
    """

    @property
    def masks(self) -> bool:
        return bool(getattr(self, "with_mask", False))

    def loss(
        self,
        image: Tensor,
        sizes: Tensor,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        masks: Sequence[Tensor] | None = None,
        ignored: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses by name, to be added up; `sum_losses` says which losses share a name.

        Args:
            image: (B, C, H, W).
            sizes: (B, 2), height and width of each image without its padding.
            boxes: For each image, the boxes (N_i, 4) of its objects.
            labels: For each image, the classes (N_i,), from 0 to K - 1.
            masks: For each image, the masks (N_i, h_i, w_i) of 0 and 1; required if the detector predicts masks.
            ignored: For each image, the boxes (M_i, 4) of crowds, which are not objects to learn. They count as
                background unless the head's assigner has `ignore_iof_thr`; the papers' settings do not have it.
        """
        from mmdet.structures.mask import BitmapMasks
        from mmengine.structures import InstanceData

        H, W = image.shape[2:]
        for part in self.modules():
            if isinstance(part, PrototypeRefinement):
                crowds = [b.new_zeros(0, 4) for b in boxes] if ignored is None else ignored
                part.objects = Objects(boxes, labels, crowds, sizes, (H, W))
        samples = self._samples(image, sizes, sizes)
        for i, sample in enumerate(samples):
            truth: dict[str, Any] = {"bboxes": boxes[i].float(), "labels": labels[i]}
            if self.masks:
                assert masks is not None
                h, w = masks[i].shape[1:]
                padded_masks = F.pad(masks[i], (0, W - w, 0, H - h)).cpu().numpy()
                truth["masks"] = BitmapMasks(padded_masks, H, W)
            sample.gt_instances = InstanceData(**truth)
            crowds = boxes[i].new_zeros(0, 4) if ignored is None else ignored[i].float()
            sample.ignored_instances = InstanceData(bboxes=crowds, labels=labels[i].new_zeros(len(crowds)))
        package: Any = super()
        return sum_losses(package.loss(image, samples))

    def predict(self, image: Tensor, sizes: Tensor, original_sizes: Tensor) -> list[Detections]:
        """Detect objects and return them in pixels of the original images.

        Args:
            image: (B, C, H, W).
            sizes: (B, 2), height and width of each image without its padding.
            original_sizes: (B, 2), height and width before the images were resized.

        Returns:
            The detections of each image.
        """
        package: Any = super()
        samples = package.predict(image, self._samples(image, sizes, original_sizes), rescale=True)
        results = [sample.pred_instances for sample in samples]
        return [
            Detections(r.bboxes.float(), r.scores.float(), r.labels, r.masks if self.masks else None) for r in results
        ]

    def forward(self, image: Tensor) -> Any:
        """Run the parts whose multiply-accumulates count as the cost of images (B, C, H, W) in the papers' tables.

        These are the backbone, the neck, the dense heads on all maps, and the box and mask heads of a full test: a
        two-stage detector scores as many proposals per image as it keeps at most, and segments as many detections as it
        returns at most (1,000 and 100 in the papers' settings). RoIAlign itself has no multiply-accumulates, so zeros
        take the place of the features that it would extract. Use `loss` and `predict` for all other purposes.
        """
        with on_meta(image):
            return self._two_stage_outputs(image) if hasattr(self, "roi_head") else self._one_stage_outputs(image)

    def _one_stage_outputs(self, image: Tensor) -> Any:
        net: Any = self
        size = torch.tensor([list(image.shape[2:])] * len(image))
        # In training mode, DINO would add its denoising queries. `eval()` would change the modes of the parts too.
        training, self.training = self.training, False
        try:
            return net._forward(image, self._samples(image, size, size))
        finally:
            self.training = training

    def _two_stage_outputs(self, image: Tensor) -> list[Any]:
        net: Any = self
        maps = net.extract_feat(image)
        outputs = [*net.rpn_head(maps)]
        counts = {"bbox": net.test_cfg.rpn.max_per_img}
        if self.masks:
            counts["mask"] = net.test_cfg.rcnn.max_per_img
        for kind, count in counts.items():
            heads = _stages(getattr(net.roi_head, f"{kind}_head"))
            extractors = _stages(getattr(net.roi_head, f"{kind}_roi_extractor"))
            for head, extractor in zip(heads, extractors, strict=True):
                height, width = extractor.roi_layers[0].output_size
                outputs.append(head(maps[0].new_zeros(count * len(image), extractor.out_channels, height, width)))
        return outputs

    @staticmethod
    def _samples(image: Tensor, sizes: Tensor, original_sizes: Tensor) -> list[Any]:
        """Return mmdetection's sample of each image: its size, its size with padding, and its original size."""
        from mmdet.structures import DetDataSample

        padded_size = tuple(image.shape[2:])
        return [
            DetDataSample(
                metainfo={
                    "img_shape": (h, w),
                    "batch_input_shape": padded_size,
                    "pad_shape": padded_size,
                    "ori_shape": (h0, w0),
                    "scale_factor": (w / w0, h / h0),
                }
            )
            for (h, w), (h0, w0) in zip(sizes.tolist(), original_sizes.tolist(), strict=True)
        ]


def _stages(module: nn.Module) -> list[Any]:
    """Return the stages of a cascade, or the only module of a detector without one."""
    return list(module) if isinstance(module, nn.ModuleList) else [module]
