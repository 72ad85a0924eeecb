"""Segmentors of mmsegmentation, and backbones under our own decoders, with one interface of plain tensors.

mmsegmentation: https://github.com/open-mmlab/mmsegmentation (1.2.2)
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.dense import DenseBackbone, four_channels, four_maps
from models.heads.losses import PixelLoss
from models.openmmlab.interface import DensePredictor, sum_losses
from models.openmmlab.meta import on_meta
from models.weights import rename_all
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
    """Backbone under one of our own decoders (`models/heads/`).

    A decoder may have these members:

    - `any_maps = True`: the decoder reads the backbone's maps, however many. Other decoders read four: for a backbone
      with fewer, the last map is subsampled by 2 for each missing map.
    - `reads_image = True`: the decoder is called with the maps and the images.
    - `output_weights`: weights of the losses of the decoder's outputs. The decoder then returns a tuple of the logits
      and of auxiliary logits (deep supervision), which may have other sizes and are for training only.
    - `losses(logits, mask)`: returns further losses by name.
    - `net_renames`: turns the authors' names of the weights of backbone and decoder into those of a segmentor.

    Args:
        backbone: The backbone.
        create_decoder: Function from the numbers of channels of the maps to the decoder.
        any_maps: The decoder's attribute of this name.
        losses: Losses of training, in place of the cross-entropy and of the decoder's own losses.
    """

    def __init__(
        self,
        backbone: DenseBackbone,
        create_decoder: Callable[[list[int]], nn.Module],
        any_maps: bool = False,
        losses: Sequence[PixelLoss] = (),
    ):
        super().__init__()
        self.backbone = backbone
        self.any_maps = any_maps
        self.decode_head: Any = create_decoder(backbone.channels if any_maps else four_channels(backbone))
        self.reads_image = getattr(self.decode_head, "reads_image", False)
        self.output_weights = getattr(self.decode_head, "output_weights", (1.0,))
        self.losses = nn.ModuleList(losses)

    def loss(self, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Compute `losses`, or by default the cross-entropy and the decoder's own losses.

        The cross-entropy is averaged as mmsegmentation does: ignored pixels add 0 and count as pixels.

        Args:
            image: (B, C, H, W).
            mask: Classes (B, H, W); pixels of 255 are ignored.

        Returns:
            The losses by name, `loss_ce` by default, weighted by the decoder's `output_weights`. Those of auxiliary
            logits are summed as `aux.<name>`.
        """
        outputs = [to_size_of(logits, image).float() for logits in self.outputs(image)]
        main, *auxiliary = (
            {name: weight * loss for name, loss in self._pixel_losses(logits, mask).items()}
            for logits, weight in zip(outputs, self.output_weights, strict=True)
        )
        losses = dict(main)
        if auxiliary:
            losses |= {f"aux.{name}": torch.stack([terms[name] for terms in auxiliary]).sum() for name in main}
        further_losses: Any = getattr(self.decode_head, "losses", None)
        return losses if self.losses or further_losses is None else losses | further_losses(outputs[0], mask)

    def _pixel_losses(self, logits: Tensor, mask: Tensor) -> dict[str, Tensor]:
        if self.losses:
            return {str(loss.loss_name): loss(logits, mask) for loss in self.losses}
        return {"loss_ce": F.cross_entropy(logits, mask, ignore_index=IGNORED, reduction="sum") / mask.numel()}

    def logits(self, image: Tensor) -> Tensor:
        """Compute the logits (B, K, H, W): the decoder's output, resized to the images' size."""
        return to_size_of(self.outputs(image)[0], image)

    def outputs(self, image: Tensor) -> tuple[Tensor, ...]:
        """Compute the decoder's logits and its auxiliary logits, each at the decoder's size of its own."""
        maps = self.backbone(image)
        maps = [*maps] if self.any_maps else four_maps(maps)
        outputs = self.decode_head(maps, image) if self.reads_image else self.decode_head(maps)
        return (outputs,) if isinstance(outputs, Tensor) else outputs

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of the backbone, and of a decoder's own backbone, in the backward pass."""
        for module in self.modules():
            if isinstance(module, DenseBackbone):
                module.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay that the net and the decoder's modules name."""
        decoder = {
            f"{prefix}.{name}"
            for prefix, module in self.decode_head.named_modules(prefix="decode_head")
            if hasattr(module, "no_weight_decay")
            for name in module.no_weight_decay()
        }
        return super().no_weight_decay() | decoder

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().checkpoint_filter(rename_all(state, self._net_renames))

    def is_whole(self, names: Iterable[str]) -> bool:
        return super().is_whole(rename_all(dict.fromkeys(names), self._net_renames))

    @property
    def _net_renames(self) -> Any:
        return getattr(self.decode_head, "net_renames", ())


def to_size_of(logits: Tensor, image: Tensor) -> Tensor:
    """Resize logits (B, K, h, w) to the height and width of images (B, C, H, W), bilinearly."""
    return F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)
