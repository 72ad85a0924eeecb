"""Build detectors and segmentors: a head of mmdetection or mmsegmentation, or our own, on any backbone.

A `conf/head/*.yaml` names one of the package's configs, in which our backbone replaces the package's
(`models/openmmlab/config.py`). Our decoders and necks are in `models/heads/`. The packages are imported when the first
head is built.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from models.dense import DenseBackbone, create_backbone
from models.heads.att_swin_unet import AttSwinUNetHead
from models.heads.ds_transunet import DSTransUNetHead
from models.heads.fpn_lite import FPNLiteHead
from models.heads.hbformer import HBFormerHead
from models.heads.iml_vit import IMLHead
from models.heads.linear import LinearHead
from models.heads.losses import PixelLoss, create_losses
from models.heads.prototypes import PrototypeRefinement
from models.heads.rcnet import RCNet
from models.heads.sdanet import SelectiveDenseAttention
from models.heads.transdae import TransDAEHead
from models.heads.vwformer import VWHead
from models.heads.wau import UNetHead, WAUPyramid
from models.openmmlab.config import FINEST_STRIDE, finest_stride, fit_config, head_changes, read_model
from models.openmmlab.detector import Detector
from models.openmmlab.interface import DensePredictor, mixed
from models.openmmlab.panoptic import PanopticSegmentor
from models.openmmlab.segmentor import DecoderSegmentor, Segmentor
from retinue.utils.suggestions import nearest

# Our decoders by the name of their head: (in_channels, num_classes, **arguments) -> decoder of the backbone's maps.
# A decoder that reads the image takes `in_chans` too.
DECODERS: dict[str, Callable[..., nn.Module]] = {
    "att_swin_unet": AttSwinUNetHead,
    "ds_transunet": DSTransUNetHead,
    "fpn_lite": FPNLiteHead,
    "hbformer": HBFormerHead,
    "iml_vit": IMLHead,
    "linear": LinearHead,
    "transdae": TransDAEHead,
    "vwformer": VWHead,
    "wau": UNetHead,
}
# Values of `head.neck`: our necks, for heads with a feature pyramid.
NECKS = ("prototypes", "rcnet", "sdanet", "wau")


def build_detector(cfg: Any, datamodule: Any) -> Detector:
    """Build the detector of a composed config for the data's classes, with initial weights.

    Args:
        cfg: The config; `cfg.model`, `cfg.head` and `cfg.data` are read.
        datamodule: The data module; `in_chans`, `num_classes` and `has_masks` are read.

    Raises:
        ValueError: The size, the neck or an argument of the head is unknown, the backbone does not fit, or the head
            learns masks and the data have none.
    """
    detector = _build_package_model(Detector, cfg, datamodule)
    if detector.masks and not datamodule.has_masks:
        raise ValueError(
            f"head={cfg.head.name} learns masks, and data={cfg.data.name} has none: "
            "+head.args.roi_head.mask_head=null leaves them out, head=retinanet needs boxes only"
        )
    return detector


def build_segmentor(
    cfg: Any,
    datamodule: Any,
    losses: Mapping[str, Any] | None = None,
    class_weights: Sequence[float] | None = None,
) -> Segmentor:
    """Build the segmentor of a composed config for the data's classes, with initial weights.

    Args:
        cfg: The config; `cfg.model`, `cfg.head` and `cfg.data` are read.
        datamodule: The data module; `in_chans` and `num_classes` are read.
        losses: Losses with their weights, as in `create_losses`. None or empty takes the head's own losses.
        class_weights: Weight of each class in these losses; None weights all equally.

    Raises:
        ValueError: The size or an argument of the head is unknown, the backbone does not fit, a loss is wrong, or the
            head has no logits per pixel in training.
    """
    create = partial(create_losses, losses, class_weights, datamodule.num_classes) if losses else None
    if cfg.head.library != "own":
        return _build_package_model(Segmentor, cfg, datamodule, create)
    backbone = _build_backbone(cfg, datamodule, FINEST_STRIDE)
    args = head_changes(cfg.head, cfg.data.kind == "small") | {"num_classes": datamodule.num_classes}
    decoder = DECODERS[cfg.head.name]
    if getattr(decoder, "reads_image", False):
        args["in_chans"] = datamodule.in_chans
    create_decoder, any_maps = partial(decoder, **args), getattr(decoder, "any_maps", False)
    segmentor = explain_errors(
        cfg.head.name, lambda: DecoderSegmentor(backbone, create_decoder, any_maps, create() if create else ())
    )
    segmentor.keep_single_precision()
    return segmentor


def build_panoptic(cfg: Any, datamodule: Any) -> PanopticSegmentor:
    """Build the panoptic segmentor of a composed config for the data's classes, with initial weights.

    Args:
        cfg: The config; `cfg.model`, `cfg.head` and `cfg.data` are read.
        datamodule: The data module; `in_chans`, `num_classes` and `num_things` are read.

    Raises:
        ValueError: The size or an argument of the head is unknown, or the backbone does not fit.
    """
    return _build_package_model(PanopticSegmentor, cfg, datamodule)


def _build_backbone(cfg: Any, datamodule: Any, min_stride: int) -> DenseBackbone:
    """Build the backbone with the arguments that the head changes (`head.backbone`)."""
    changes: Any = OmegaConf.to_container(cfg.head.backbone) if "backbone" in cfg.head else {}
    return create_backbone(cfg.model, cfg.data, datamodule.in_chans, min_stride, **changes)


def _build_package_model(
    interface: type[DensePredictor],
    cfg: Any,
    datamodule: Any,
    create: Callable[[float], list[PixelLoss]] | None = None,
) -> Any:
    """Build the package's model, mixed with our interface, on our backbone.

    The package initialises the weights of its own parts; the backbone keeps its own initialisation. `create` creates
    the losses on logits per pixel, times a factor, that replace the head's own losses.
    """
    head = cfg.head
    config = read_model(head, cfg.data.kind == "small")
    from mmengine.config import ConfigDict
    from mmengine.registry import MODELS, DefaultScope

    backbone = _build_backbone(cfg, datamodule, finest_stride(config))
    fit_config(config, backbone, datamodule.num_classes, getattr(datamodule, "num_things", 0))
    config["backbone"] = {"type": lambda: backbone}
    if create is not None:
        _replace_losses(config, head.name, create)
    with DefaultScope.overwrite_default_scope(head.library), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if head.get("neck") is not None:
            neck = build_own_neck(head, config["neck"], datamodule.num_classes, MODELS.build)
            config["neck"] = {"type": lambda: neck}
        package_class = MODELS.get(f"{head.library}.{config['type']}")
        if package_class is None:
            raise ValueError(f"head={head.name} cannot be built: {head.library} has no model {config['type']!r}")
        config["type"] = mixed(interface, package_class)
        model = explain_errors(head.name, lambda: MODELS.build(ConfigDict(config)))
        if not any(parameter.is_meta for parameter in model.parameters()):
            model.init_weights()
    model.keep_single_precision()
    return model


def _replace_losses(config: dict[str, Any], head: str, create: Callable[[float], list[PixelLoss]]) -> None:
    """Replace the losses of a segmentor's heads in place; an auxiliary head keeps the factor of its own loss."""
    if "loss_decode" not in config["decode_head"]:
        raise ValueError(
            f"head={head} has a loss of its own, which matches masks: task.losses needs logits per pixel, "
            "as of head=semantic_fpn, upernet or vwformer"
        )
    for part in filter(None, (config["decode_head"], config.get("auxiliary_head"))):
        created = create(part["loss_decode"]["loss_weight"])
        part["loss_decode"] = [{"type": lambda loss=loss: loss} for loss in created]


def explain_errors(head: str, build: Callable[[], Any]) -> Any:
    """Return what `build` returns, and turn the errors by which the packages refuse arguments into one line.

    Args:
        head: Name of the head, for the error message.
        build: Function that builds a part of the head.

    Raises:
        ValueError: The head's arguments do not fit together, or one is unknown.
    """
    try:
        return build()
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if unknown:
            reason = f"{unknown[1]} takes no argument {unknown[2]!r}"
        else:
            first_line = str(error).partition("\n")[0]
            reason = first_line if first_line else type(error).__name__
        raise ValueError(f"head={head} cannot be built with these arguments: {reason}") from error


def build_own_neck(
    head: Any, pyramid: dict[str, Any], num_classes: int, build: Callable[[dict], nn.Module]
) -> nn.Module:
    """Build the neck that `head.neck` names.

    RCNet and the pyramid with WAU take the place of the feature pyramid; the other necks follow it.

    Args:
        head: The composed head config.
        pyramid: The package's config of the feature pyramid.
        num_classes: Number of classes of the data.
        build: Function that builds a module of the package from its config.

    Raises:
        ValueError: The neck is unknown, or the head has no feature pyramid.
    """
    if head.neck not in NECKS:
        raise ValueError(
            f"head.neck {head.neck!r} is unknown.{nearest(head.neck, NECKS)} There are: {', '.join(NECKS)}"
        )
    if pyramid["type"] != "FPN":
        raise ValueError(f"head.neck={head.neck} is for heads on a feature pyramid, and head={head.name} has none")
    width, levels = pyramid["out_channels"], pyramid["num_outs"]
    if head.neck in ("rcnet", "wau"):
        own = RCNet if head.neck == "rcnet" else WAUPyramid
        return own(pyramid["in_channels"], width, levels)
    # mmengine's Sequential, unlike torch's, passes the call of `init_weights` on to the pyramid.
    from mmengine.model import Sequential

    refinement = (
        SelectiveDenseAttention(width, levels)
        if head.neck == "sdanet"
        else PrototypeRefinement(width, levels, num_classes)
    )
    neck: Any = Sequential(build(pyramid), refinement)
    # Weights of a detector with the pyramid alone lack the number of the layer.
    neck.renames = ((r"^(?!\d)", "0."),)
    return neck
