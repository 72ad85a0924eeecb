"""Parts of MAYOR for mmdetection: a mask head that decodes a whole mask at once, and an assigner of anchors.

Paper: Mask is All You Need: Rethinking Mask R-CNN for Dense and Arbitrary-Shaped Scene Text Detection (Qin et al., ACM
Multimedia 2021, arXiv:2109.03426), written after its abstract: the authors published no code, and the sizes of the
layers and the rule of the assigner are ours.

mmdetection: arXiv:1906.07155, https://github.com/open-mmlab/mmdetection (3.3.0). `models.openmmlab.config.library`
imports this module, which registers the classes, after mmdetection.
"""

from typing import Any

import torch
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.task_modules.assigners import AssignResult, MaxIoUAssigner
from mmdet.registry import MODELS, TASK_UTILS
from torch import Tensor, nn


@MODELS.register_module()
class MLPMaskHead(FCNMaskHead):
    """Mask head whose decoder is a multi-layer perceptron, so that each pixel of a mask depends on the whole proposal.

    In dense text, the box of an instance holds parts of other instances. A convolutional decoder sees a part of the
    proposal, which looks the same for each of them. As in mmdetection's other mask heads, the target is the mask of the
    proposal's own instance, and the other instances in the box are background.

    Takes features of proposals (N, in_channels, roi_feat_size, roi_feat_size) and returns logits
    (N, K, mask_size, mask_size), where K is 1 with `class_agnostic`, otherwise the number of classes.

    Args:
        mask_size: Side of a mask; `train_cfg.rcnn.mask_size` must be the same.
        reduced_channels: Number of channels of the map that the decoder reads.
        hidden: Width of the decoder's hidden layer.
        class_agnostic: Predict one mask for all classes. The decoder's last layer grows with the number of masks.
        kwargs: Further arguments of mmdetection's `FCNMaskHead`, but for those of its decoder.
    """

    def __init__(
        self,
        mask_size: int = 28,
        reduced_channels: int = 16,
        hidden: int = 1024,
        class_agnostic: bool = True,
        **kwargs: Any,
    ):
        super().__init__(class_agnostic=class_agnostic, upsample_cfg={"type": None}, **kwargs)
        # The decoder takes the place of the last convolution.
        self.conv_logits = None
        self.mask_size = mask_size
        channels = self.conv_out_channels if self.num_convs else self.in_channels
        height, width = self.roi_feat_size
        masks = 1 if class_agnostic else self.num_classes
        self.reduce = nn.Conv2d(channels, reduced_channels, 1)
        self.decoder = nn.Sequential(
            nn.Linear(reduced_channels * height * width, hidden), nn.ReLU(), nn.Linear(hidden, masks * mask_size**2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x)
        return self.decoder(self.reduce(x).flatten(1)).unflatten(1, (-1, self.mask_size, self.mask_size))


@TASK_UTILS.register_module()
class AdaptiveAssigner(MaxIoUAssigner):
    """Assigner that lowers a ground truth's threshold of IoU until the ground truth has enough anchors.

    An anchor is positive for a ground truth if their IoU is at least the threshold of the ground truth: `pos_iou_thr`,
    or less if fewer than `top_k` anchors reach it, as for long and thin boxes; then it is the `top_k`-th largest IoU.
    If several ground truths claim an anchor, it goes to the one with the lowest threshold, which has the fewest other
    anchors, and among equal thresholds to the one with the largest IoU. An anchor that no ground truth claims is
    negative if its largest IoU is below `neg_iou_thr`, otherwise it is ignored.

    Args:
        top_k: Number of anchors that each ground truth claims at least, if so many overlap with it.
        kwargs: Arguments of mmdetection's `MaxIoUAssigner`; those of its low-quality matches have no effect.
    """

    def __init__(self, top_k: int = 9, **kwargs: Any):
        super().__init__(**kwargs)
        self.top_k = top_k

    def assign_wrt_overlaps(self, overlaps: Tensor, gt_labels: Tensor) -> AssignResult:
        """Assign anchors by their IoU with ground truths.

        Args:
            overlaps: (G, N), IoU of each ground truth and anchor; -1 for anchors in ignored regions.
            gt_labels: (G,).
        """
        num_gts, num_anchors = overlaps.shape
        if not num_gts or not num_anchors:
            return super().assign_wrt_overlaps(overlaps, gt_labels)
        top = overlaps.topk(min(self.top_k, num_anchors), dim=1).values
        thresholds = top[:, -1:].clamp(max=self.pos_iou_thr)  # (G, 1)
        claims = (overlaps >= thresholds) & (overlaps > 0)
        claimed_at = torch.where(claims, thresholds, torch.inf)
        wins = claims & (claimed_at == claimed_at.amin(dim=0))
        winners = torch.where(wins, overlaps, -torch.inf).argmax(dim=0)

        largest = overlaps.amax(dim=0)
        low, high = self.neg_iou_thr if isinstance(self.neg_iou_thr, tuple) else (0, self.neg_iou_thr)
        assigned = torch.full_like(winners, -1)
        assigned[(largest >= low) & (largest < high)] = 0
        is_positive = claims.any(dim=0)
        assigned[is_positive] = winners[is_positive] + 1
        labels = torch.where(is_positive, gt_labels[winners], -1)
        return AssignResult(num_gts, assigned, largest, labels=labels)
