"""MAE: Masked Autoencoders Are Scalable Vision Learners (He et al., CVPR 2022, arXiv:2111.06377).

Written after the paper, section 3 and appendix A.1.
"""

from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from models.masking import patchify, resize_mask, split_by_mask, take
from models.visible_tokens import VisibleTokens, sincos_positions
from retinue.tasks.methods.method import LARGE, Method


class MAE(Method):
    """Encode the visible patches alone, and predict the pixels of the masked patches by a small decoder.

    Args:
        backbone: ViT-shaped net with full attention.
        dim: Channels of the decoder. None means 512, for images whose shorter side is below 128 pixels 128.
        depth: Blocks of the decoder. None means 8, for such small images 2.
        heads: Attention heads of the decoder. None means 16, for such small images 4.
        normalise: The targets are each patch's pixels with mean 0 and deviation 1.
        arguments: As those of `Method`.

    Raises:
        ValueError: The net is no ViT with full attention, or the images are no whole number of its patches.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        normalise: bool = True,
        **arguments: Any,
    ):
        super().__init__(backbone, **arguments)
        small = min(self.image_size) < LARGE
        dim, depth, heads = dim or (128 if small else 512), depth or (2 if small else 8), heads or (4 if small else 16)
        self.normalise = normalise
        self.visible_tokens = VisibleTokens(backbone)
        self.extra, self.grid = self.visible_tokens.extra, self.visible_tokens.grid
        patch = self.backbone.feature_info[-1]["reduction"]
        if tuple(patch * side for side in self.grid) != tuple(self.image_size):
            height, width = self.image_size
            raise ValueError(f"method=mae needs images of whole patches of {patch} pixels, not {height} x {width}")
        rows, columns = self.views[0].grid
        self.masked = self.views[0].masked * self.grid[0] * self.grid[1] // (rows * columns)
        self.embed = nn.Linear(self.backbone.num_features, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        trunc_normal_(self.mask_token, std=0.02)
        self.positions: Tensor
        self.register_buffer("positions", sincos_positions(self.grid, dim, self.extra), persistent=False)
        self.blocks = nn.Sequential(*(Block(dim, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, patch**2 * self.in_chans)

    @staticmethod
    def mask_patch(side: int) -> int:
        return 16 if side >= LARGE else side // 8

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"mask_token"}

    def forward(self, batch: dict[str, Any], progress: float) -> dict[str, Tensor]:
        (view,) = batch["views"]
        mask = resize_mask(view["mask"], self.grid)
        visible, masked = split_by_mask(mask, self.masked)
        tokens = self.visible_tokens(self.backbone, view["image"], visible)
        target = patchify(view["image"], self.grid).flatten(2)
        if self.normalise:
            target = normalise_patches(target)
        error = (self.decode(tokens, visible, masked) - take(target, masked)).square()
        return {"loss": error.mean()}

    def decode(self, tokens: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Return the predicted pixels of the masked patches, (B, m, C * h * w).

        Args:
            tokens: (B, E + n, C), the encoder's.
            visible: int64 (B, n), indices of the visible patches.
            masked: int64 (B, m), indices of the masked patches.
        """
        x = self.embed(tokens)
        patches = torch.cat([x[:, self.extra :], self.mask_token.to(x.dtype).expand(*masked.shape, -1)], dim=1)
        # Bring the patches back to their places.
        patches = take(patches, torch.cat([visible, masked], dim=1).argsort(dim=1))
        x = self.blocks(torch.cat([x[:, : self.extra], patches], dim=1) + self.positions)
        return self.predict(self.norm(take(x[:, self.extra :], masked)))


def normalise_patches(patches: Tensor) -> Tensor:
    """Return patches (B, N, P) with mean 0 and, by the unbiased variance plus 1e-6, deviation 1."""
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()
