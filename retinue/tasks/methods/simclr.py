"""SimCLR, and AMCL on it: two views of an image attract each other, and views of other images are repelled.

Papers: A Simple Framework for Contrastive Learning of Visual Representations (Chen et al., ICML 2020,
arXiv:2002.05709); Adaptive Multi-head Contrastive Learning (Wang et al., ECCV 2024, arXiv:2310.05615). Written after
the papers and https://github.com/LeiWangR/cl.
"""

from typing import Any

import torch
from torch import Tensor

from retinue.tasks.methods.contrastive import Contrastive
from retinue.tasks.methods.multi_crop import pooled_views
from retinue.tasks.methods.processes import gather, rank


class SimCLR(Contrastive):
    """SimCLR with any number of heads, and AMCL with temperatures of pairs; the arguments: `Contrastive`."""

    def forward(self, batch: dict[str, Any], progress: float) -> dict[str, Tensor]:
        features = pooled_views(self.backbone, batch["views"])
        own, count = self.projectors(features), len(features)  # (C, 2 · B, D)
        keys = gather(own.transpose(0, 1)).transpose(0, 1) if self.training else own
        first = rank() * count if self.training else 0
        itself = torch.arange(first, first + count, device=own.device)
        return {"loss": self.loss(own, keys, itself.roll(count // 2), itself)}
