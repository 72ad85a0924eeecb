"""SimMIM: a Simple Framework for Masked Image Modeling (Xie et al., CVPR 2022, arXiv:2111.09886).

Written after the paper and the authors' repository, microsoft/SimMIM (MIT).
"""

from typing import Any

from torch import Tensor, nn

from models.masking import MaskedStem, last_map, mask_pixels
from retinue.tasks.methods.method import Method


class SimMIM(Method):
    """Predict the pixels of masked patches from the last map by one linear layer, with an L1 loss.

    Args:
        backbone: Net with a patch embedding, hierarchical or plain.
        arguments: As those of `Method`.

    Raises:
        ValueError: The net has no patch embedding to mask.
    """

    renames = ((r"^encoder\.mask_token$", "masked_stem.token"), (r"^encoder\.", "backbone."))

    def __init__(self, backbone: nn.Module, **arguments: Any):
        super().__init__(backbone, **arguments)
        self.masked_stem = MaskedStem(backbone, self.image_size, self.in_chans)
        stride = self.backbone.feature_info[-1]["reduction"]
        self.decoder = nn.Sequential(
            nn.Conv2d(self.masked_stem.map_channels, stride**2 * self.in_chans, 1), nn.PixelShuffle(stride)
        )

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"masked_stem.token"}

    def forward(self, batch: dict[str, Any], progress: float) -> dict[str, Tensor]:
        (view,) = batch["views"]
        return {"loss": masked_l1(self.reconstruct(view["image"], view["mask"]), view["image"], view["mask"])}

    def reconstruct(self, image: Tensor, mask: Tensor) -> Tensor:
        """Return the predicted image (B, C, H, W) of an image whose patches in `mask` (B, rows, columns) are masked."""
        with self.masked_stem.masking(mask):
            prediction = self.decoder(last_map(self.backbone, image))
        # The last map may reach beyond the image, where a net rounds sizes up.
        return prediction[..., : image.shape[2], : image.shape[3]]


def masked_l1(prediction: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Return the mean absolute difference over the values of masked pixels.

    Args:
        prediction: (B, C, H, W).
        image: (B, C, H, W).
        mask: bool (B, rows, columns), True where patches are masked.
    """
    pixels = mask_pixels(mask, image)
    return ((prediction - image).abs() * pixels).sum() / (pixels.sum() + 1e-5) / image.shape[1]
