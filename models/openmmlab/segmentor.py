"""Segmentors of mmsegmentation, and backbones under our own decoders, with one interface of plain tensors.

mmsegmentation: https://github.com/open-mmlab/mmsegmentation (1.2.2)
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from models.dense import DenseBackbone
from models.heads.losses import PixelLoss
from models.openmmlab.interface import DensePredictor, sum_losses
from models.openmmlab.meta import on_meta
from retinue.utils.masks import IGNORED


class Segmentor(DensePredictor):
    """Segmentor of mmsegmentation, mixed with the package's class by `build_segmentor`.

    It takes normalised images (B, C, H, W) of any size.
    """

    masks = False

    def loss(self, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Compute the losses by name, to be added up; `sum_losses` says which losses share a name.

        Args:
            image: (B, C, H, W).
            mask: Classes (B, H, W); pixels of 255 are ignored.
        """
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        samples = [SegDataSample(metainfo=metainfo) for metainfo in self._metainfo(image)]
        for sample, classes in zip(samples, mask, strict=True):
            sample.gt_sem_seg = PixelData(data=classes[None])
        package: Any = super()
        return sum_losses(package.loss(image, samples))

    def logits(self, image: Tensor) -> Tensor:
        """Compute a score of each class for each pixel, (B, K, H, W).

        Mask2Former's scores are not logits: each is the sum of its masks, weighted by their probabilities of the class.
        """
        package: Any = super()
        return package.encode_decode(image, self._metainfo(image))

    def forward(self, image: Tensor) -> Tensor:
        """Compute `logits`, on the meta device too, where multiply-accumulates are counted."""
        with on_meta(image):
            return self.logits(image)

    @staticmethod
    def _metainfo(image: Tensor) -> list[dict[str, Any]]:
        """Return mmsegmentation's metadata of each image, which say that the image is neither padded nor resized."""
        size = tuple(image.shape[2:])
        return [{"img_shape": size, "ori_shape": size, "pad_shape": size}] * len(image)


class DecoderSegmentor(Segmentor):
    """Backbone under one of our own decoders (`models/heads/`).

    A decoder reads four maps. For a backbone with fewer, the last map is subsampled by 2 for each missing map.

    Args:
        backbone: Backbone with at most four maps.
        create_decoder: Function from the numbers of channels of the four maps to the decoder.
        losses: Losses of training; by default cross-entropy as mmsegmentation averages it.
    """

    def __init__(
        self,
        backbone: DenseBackbone,
        create_decoder: Callable[[list[int]], nn.Module],
        losses: Sequence[PixelLoss] = (),
    ):
        super().__init__()
        self.backbone = backbone
        self.missing_maps = 4 - len(backbone.channels)
        self.decode_head = create_decoder(backbone.channels + backbone.channels[-1:] * self.missing_maps)
        self.losses = nn.ModuleList(losses)

    def loss(self, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Compute the `losses`, by default the cross-entropy, averaged as mmsegmentation does.

        In mmsegmentation's mean of the cross-entropy, ignored pixels add 0 and count as pixels.

        Args:
            image: (B, C, H, W).
            mask: Classes (B, H, W); pixels of 255 are ignored.
        """
        logits = self.logits(image).float()
        if self.losses:
            return {str(loss.loss_name): loss(logits, mask) for loss in self.losses}
        return {"loss_ce": F.cross_entropy(logits, mask, ignore_index=IGNORED, reduction="sum") / mask.numel()}

    def logits(self, image: Tensor) -> Tensor:
        """Compute the logits (B, K, H, W): the decoder's output, upsampled to the images' size."""
        maps = [*self.backbone(image)]
        for _ in range(self.missing_maps):
            maps.append(F.max_pool2d(maps[-1], 1, stride=2))
        logits = self.decode_head(maps)
        return F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)
