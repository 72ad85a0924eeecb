"""Claims of methods of pretraining: which method with which net of ours or timm's reproduces a reference vector."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from models.masking import last_map
from retinue.tasks.methods.simmim import SimMIM, masked_l1


@dataclass(frozen=True)
class SimMIMNet:
    """SimMIM with a net of the registry; the vector has the loss, twice the loss, the last map and the prediction.

    Attributes:
        name: registry name.
        arguments: arguments of `timm.create_model`.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def build(self, vector: Mapping[str, Any]) -> nn.Module:
        """Build the method with its net."""
        _, channels, height, width = vector["input_shape"]
        net = timm.create_model(self.name, num_classes=0, **self.arguments)
        return SimMIM(net, image_size=(height, width), in_chans=channels, views=[])

    def run(self, model: nn.Module, vector: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs in the vector's order."""
        method: Any = model
        side = x.shape[-1] // vector["kwargs"]["mask_patch_size"]
        orders = np.stack([np.random.RandomState(image).permutation(side**2) for image in range(len(x))])
        masked = torch.zeros(len(x), side**2, dtype=torch.bool)
        masked.scatter_(1, torch.from_numpy(orders[:, : math.ceil(vector["kwargs"]["mask_ratio"] * side**2)]), True)
        mask = masked.view(-1, side, side)
        prediction = method.reconstruct(x, mask)
        loss = masked_l1(prediction, x, mask)
        with method.masked_stem.masking(mask):
            features = last_map(method.backbone, x)
        return torch.stack([loss, 2 * loss]), features, prediction


# The options of the authors' ViT; by default timm has no norm before the pooling, so none on the last map either.
BEIT = {
    "use_abs_pos_emb": False, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "init_values": 0.1,
    "use_fc_norm": False,
}  # fmt: skip
METHODS: dict[str, SimMIMNet] = {
    "simmim__swin_tiny_192_w6": SimMIMNet("swin_tiny", {"window": 6}),
    "simmim__swin_base_192_w6": SimMIMNet("swin_base", {"window": 6}),
    "simmim__vit_d192_l4_224": SimMIMNet(
        "beit_base_patch16_224", {"embed_dim": 192, "depth": 4, "num_heads": 3, **BEIT}
    ),
}
