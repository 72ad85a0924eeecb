"""Segmentors of mmsegmentation, and backbones under our own decoders, with one interface of plain tensors.

mmsegmentation: https://github.com/open-mmlab/mmsegmentation (1.2.2)
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from models.dense import DenseBackbone
from models.openmmlab.interface import DensePredictor, sum_losses
from models.openmmlab.meta import on_meta
from retinue.utils.masks import IGNORED


class Segmentor(DensePredictor):
    """Segmentor of mmsegmentation, mixed with the package's class by `build_segmentor`.

    It takes normalised images (B, C, H, W) of any size.
    """

    masks = False
    decode_head: nn.Module

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

    def set_progress(self, share: float) -> None:
        """Tell the head which share of the training's steps is done, if its loss depends on this share."""
        follow = getattr(self.decode_head, "set_progress", None)
        if follow is not None:
            follow(share)

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
    """Backbone under one of our own decoders (`models/heads/`), trained by cross-entropy.

    Args:
        backbone: The backbone.
        create_decoder: Function from the numbers of channels of the maps to the decoder.
        maps: Number of maps that the decoder reads; None for those of the backbone. For a backbone with fewer, the last
            map is subsampled by 2 for each missing map.
    """

    def __init__(
        self, backbone: DenseBackbone, create_decoder: Callable[[list[int]], nn.Module], maps: int | None = None
    ):
        super().__init__()
        self.backbone = backbone
        self.missing_maps = 0 if maps is None else maps - len(backbone.channels)
        self.decode_head = create_decoder(backbone.channels + backbone.channels[-1:] * self.missing_maps)

    def loss(self, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Compute the cross-entropy, averaged as mmsegmentation does: ignored pixels add 0 and count as pixels.

        Args:
            image: (B, C, H, W).
            mask: Classes (B, H, W); pixels of 255 are ignored.
        """
        total = F.cross_entropy(self.logits(image).float(), mask, ignore_index=IGNORED, reduction="sum")
        return {"loss_ce": total / mask.numel()}

    def logits(self, image: Tensor) -> Tensor:
        """Compute the logits (B, K, H, W): the decoder's output, upsampled to the images' size."""
        maps = [*self.backbone(image)]
        for _ in range(self.missing_maps):
            maps.append(F.max_pool2d(maps[-1], 1, stride=2))
        logits = self.decode_head(maps)
        return F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)
