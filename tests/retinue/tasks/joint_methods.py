"""The joint-embedding methods with a net of a few weights."""

from typing import Any

import torch
from torch import Tensor, nn

from retinue.tasks.methods.dino import DINO
from retinue.tasks.methods.lejepa import LeJEPA
from retinue.tasks.methods.method import Method
from retinue.tasks.methods.moco import MoCo
from retinue.tasks.methods.simclr import SimCLR
from retinue.tasks.methods.vicreg import VICReg

CONTRASTIVE = {"hidden": 8, "dim": 4, "limits": (0.1, 2.0), "penalty": 0.1}
MOMENTUM = {"layers": 2, "momentum": 0.9, "freeze_stem": False}
METHODS: dict[str, tuple[type[Method], dict]] = {
    "simclr": (SimCLR, {**CONTRASTIVE, "heads": 1, "temperature": 0.1}),
    "amcl_simclr": (SimCLR, {**CONTRASTIVE, "heads": 2, "temperature": "adaptive"}),
    "moco_v3": (MoCo, {**CONTRASTIVE, **MOMENTUM, "heads": 1, "temperature": 0.2}),
    "amcl_moco_v3": (MoCo, {**CONTRASTIVE, **MOMENTUM, "heads": 2, "temperature": "adaptive"}),
    "dino": (
        DINO,
        {
            "epochs": 4, "global_views": 2, "prototypes": 16, "hidden": 8, "bottleneck": 4, "unit_prototypes": False,
            "student_temperature": 0.1, "teacher_temperature": (0.04, 0.07), "warmup_epochs": 3, "freeze_epochs": 1,
            "momentum": 0.9, "center_momentum": 0.9, "final_weight_decay": 0.4,
        },
    ),
    "lejepa": (LeJEPA, {"global_views": 2, "hidden": 8, "dim": 4, "directions": 32, "weight": 0.05}),
    "vicreg": (VICReg, {"hidden": 8, "dim": 4, "similarity": 25.0, "variance": 25.0, "covariance": 1.0}),
}  # fmt: skip


class Net(nn.Module):
    """Backbone of one convolution with the part of timm's interface that the methods use."""

    num_features = 6

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, self.num_features, 4, 4)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stem(x).tanh()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x.mean((2, 3))


def build(name: str, net: nn.Module | None = None) -> Any:
    torch.manual_seed(0)
    method, arguments = METHODS[name]
    return method(Net() if net is None else net, image_size=(16, 16), in_chans=3, views=(), **arguments)


def batch_of(name: str, images: int = 8) -> dict[str, Any]:
    """Return random views of some images: two of 16 pixels, and two of 8 pixels where the method takes local ones."""
    sizes = (16, 16, 8, 8) if name in ("dino", "lejepa") else (16, 16)
    generator = torch.Generator().manual_seed(1)
    return {"views": [{"image": torch.randn(images, 3, size, size, generator=generator)} for size in sizes]}
