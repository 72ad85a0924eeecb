"""Heads that the tests of the OpenMMLab bridge build: small configs on the embedded scenes."""

from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from models.openmmlab.build import build_detector, build_segmentor
from retinue.utils.paths import CONF

DETECTORS = ("retinanet", "mask_rcnn", "cascade_mask_rcnn", "dino", "fcos", "rtmdet")
SEGMENTORS = (
    "semantic_fpn", "upernet", "mask2former", "vwformer", "segformer", "fpn_lite", "linear",
    "hbformer", "att_swin_unet", "ds_transunet", "iml_vit", "transdae", "wau",
)  # fmt: skip
CLASSES = 7


def make_config(head: str, model: str = "biformer", size: str | None = None, **changes: Any) -> DictConfig:
    """Compose the config of a head on a net.

    Args:
        head: A file of `conf/head`.
        model: A file of `conf/model`, or a name of timm's.
        size: Size of the head; None for `small`.
        changes: Values of keys, in which `__` stands for a dot: `head__neck="rcnet"`.
    """
    is_timm = not (CONF / "model" / f"{model}.yaml").is_file()
    cfg = OmegaConf.create(
        {
            "model": OmegaConf.load(CONF / "model" / ("timm.yaml" if is_timm else f"{model}.yaml")),
            "head": load_head(head),
            "data": {"name": "scenes", "kind": "small", "image_size": [256, 320]},
        }
    )
    cfg.data.task, cfg.head.size = cfg.head.task, size
    if is_timm:
        cfg.model.name = model
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return cfg


def build(head: str, model: str = "biformer", losses: Any = None, class_weights: Any = None, **changes: Any) -> Any:
    """Build a detector or a segmentor for `CLASSES` classes, with weights that follow from the seed 0."""
    torch.manual_seed(0)
    cfg = make_config(head, model, **changes)
    data = SimpleNamespace(num_classes=CLASSES, in_chans=3, has_masks=True)
    if cfg.head.task == "detection":
        return build_detector(cfg, data)
    return build_segmentor(cfg, data, losses, class_weights)


def load_head(name: str) -> Any:
    """Return a file of `conf/head`, merged into the file that it inherits from."""
    head: Any = OmegaConf.load(CONF / "head" / f"{name}.yaml")
    inherited = head.pop("defaults", [])
    return OmegaConf.merge(*map(load_head, inherited), head)
