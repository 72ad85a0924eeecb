"""Selfie: Self-supervised Pretraining for Image Embedding (Trinh, Luong and Le, 2019, arXiv:1906.02940).

Written after the paper. The authors' code was not available, so the size of the attention pooling is our choice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from models.masking import patchify, split_by_mask, take
from retinue.tasks.methods.method import LARGE, Method


class Selfie(Method):
    """Choose, for each masked place of an image, the right patch among all masked patches of the image.

    The first stages of the backbone embed each patch on its own. Attention pooling summarises the visible patches, and
    the summary plus a place's embedding is compared with the masked patches by scalar products.

    Args:
        backbone: Net that takes images as small as a patch.
        stages: Number of stages, or blocks of a plain net, that embed patches. None means all but the last, as in the
            paper.
        depth: Blocks of the attention pooling.
        heads: Attention heads of the attention pooling; they divide the channels of the last stage that is used.
        arguments: As those of `Method`.

    Raises:
        ValueError: The net has no such number of stages, or does not take images of a patch's size.
    """

    def __init__(
        self, backbone: nn.Module, *, stages: int | None = None, depth: int = 3, heads: int = 4, **arguments: Any
    ):
        super().__init__(backbone, **arguments)
        info = self.backbone.feature_info
        self.stages = max(1, len(info) - 1) if stages is None else stages
        if not 1 <= self.stages <= len(info):
            raise ValueError(f"method.stages must be from 1 to {len(info)}, not {self.stages}")
        dim = info[self.stages - 1]["num_chs"]
        if dim % heads:
            raise ValueError(f"method.heads must divide the {dim} channels of stage {self.stages}, not {heads}")
        rows, columns = self.views[0].grid
        self.query = nn.Parameter(torch.empty(1, 1, dim))
        self.row = nn.Parameter(torch.empty(rows, 1, dim))
        self.column = nn.Parameter(torch.empty(1, columns, dim))
        for table in (self.query, self.row, self.column):
            trunc_normal_(table, std=0.02)
        self.pooling = nn.Sequential(*(Block(dim, heads, qkv_bias=True) for _ in range(depth)), nn.LayerNorm(dim))

    @staticmethod
    def mask_patch(side: int) -> int:
        return 32 if side >= LARGE else side // 4

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"query", "row", "column"}

    def forward(self, batch: dict[str, Any], progress: float) -> dict[str, Tensor]:
        (view,) = batch["views"]
        visible, masked = split_by_mask(view["mask"], self.views[0].masked)
        patches = patchify(view["image"], self.views[0].grid)
        features = self.embed(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
        query = self.query.to(features.dtype).expand(len(features), -1, -1)
        summary = self.pooling(torch.cat([query, take(features, visible)], dim=1))[:, :1]
        places = (self.row + self.column).flatten(0, 1)[masked]
        logits = (summary + places) @ take(features, masked).mT
        # The right patch of the masked place i is the masked patch i.
        target = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        return {"loss": loss, "top1": (logits.argmax(2) == target).float().mean()}

    def embed(self, patches: Tensor) -> Tensor:
        """Return the mean (N, D) of the map of each patch (N, C, h, w) after the stages."""
        maps = self.backbone.forward_intermediates(
            patches, indices=[self.stages - 1], stop_early=True, intermediates_only=True, output_fmt="NCHW"
        )
        return maps[0].mean((2, 3))
