"""The bridge to mmdetection and mmsegmentation: their heads over any backbone of timm's registry.

A `conf/head/*.yaml` names a config of theirs, whose backbone is replaced by ours (`models/mm_config.py`). Decoders and
necks of ours (`models/heads/`) stand where theirs would. The packages are imported when the first head is built.

mmdetection: arXiv:1906.07155, https://github.com/open-mmlab/mmdetection (3.3.0)
mmsegmentation: https://github.com/open-mmlab/mmsegmentation (1.2.2)
"""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models._manipulate import group_parameters
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from models.dense import DenseBackbone, create_backbone
from models.heads.rcnet import RCNet
from models.heads.sdanet import SelectiveDenseAttention
from models.heads.vwformer import VWHead
from models.openmmlab.config import FINEST, changes, finest_stride, fit, read_model
from models.weights import apply_renames
from retinue.utils.masks import IGNORED
from retinue.utils.suggestions import nearest

DECODERS: dict[str, Callable[..., nn.Module]] = {"vwformer": VWHead}  # of ours: (in_channels, num_classes, **args)
NECKS = ("rcnet", "sda")  # of ours, for detectors with a feature pyramid
BACKBONE = "backbone.net."  # before the names of the net's parameters
# Parts that give or take float32 in mixed precision: the packages' heads compute coordinates and resize logits in the
# type of their maps, and half precision puts pixels of a large image on a grid of up to 8. (mmdetection 2 and
# mmsegmentation 0 had `force_fp32` at these places.)
SINGLE_OUTPUT = re.compile(r"(rpn|bbox|mask|decode)_head(\.\d+)?$|(cls|reg)_branches\.\d+$|\.(value_proj|conv_seg)$")
SINGLE_INPUT = re.compile(r"_roi_extractor(\.\d+)?$")


class Detections(NamedTuple):
    """Of one image, in pixels of the original."""

    boxes: Tensor  # (N, 4) xyxy, float32
    scores: Tensor  # (N,)
    labels: Tensor  # (N,) int64
    masks: Tensor | None  # (N, H0, W0) bool


class DensePredictor(nn.Module):
    """Interface of a detector or a segmentor, a backbone under a head, for the tasks and for timm's optimisers.

    `mixed` makes a subclass of this class and of the package's class, so the net does not wrap the package's model but
    is one. Parameters and weights therefore have the names of the package's checkpoints. Hooks on the state dict of a
    wrapper would not suffice: Lightning restores a sharded net (FSDP) by the names of its parameters.

    Attributes:
        masks: Whether the net predicts instance masks.
        backbone: The backbone under the head.
        undecayed: Pattern of the names of head parameters without weight decay: Mask2Former's queries and levels.
    """

    masks: bool
    backbone: DenseBackbone
    undecayed = re.compile(r"decode_head\.(query_embed|query_feat|level_embed)\.")

    def keep_single_precision(self) -> None:
        """Let some parts compute in float32 in mixed precision.

        Call this once, after the net is built: it registers hooks.
        """
        for name, module in self.named_modules():
            if SINGLE_OUTPUT.search(name):
                module.register_forward_hook(lambda _, args, output: single(output))
            elif SINGLE_INPUT.search(name):
                module.register_forward_pre_hook(lambda _, args: single(args))

    @property
    def unused_weights(self) -> set[str]:
        return {f"backbone.{name}" for name in self.backbone.unused_weights}

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our own weights or the packages', with an author's backbone, under our names; for `load_weights`."""
        inside = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
        rest = {key: value for key, value in state.items() if not key.startswith("backbone.")}
        backbone = self.backbone.checkpoint_filter(inside)
        return {f"backbone.{key}": value for key, value in backbone.items()} | apply_renames(self, rest)

    def is_whole(self, names: Iterable[str]) -> bool:
        """Whether weights of such names are a net's of this kind, not a backbone's alone."""
        parts = {name.partition(".")[0] for name in self.state_dict()} - {"backbone"}
        return any(name.partition(".")[0] in parts for name in names)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        net = self.backbone.net
        names = {f"{BACKBONE}{name}" for name in net.no_weight_decay()} if has(net, "no_weight_decay") else set()
        return names | {name for name, _ in self.named_parameters() if self.undecayed.search(name)}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """For layer decay: a parameter's depth; the backbone's layers in the net's own order, then all else."""
        net = self.backbone.net
        depths: Any = (
            group_parameters(net, net.group_matcher(coarse), reverse=True) if has(net, "group_matcher") else {}
        )
        return lambda name: depths.get(name.removeprefix(BACKBONE), torch.inf)


def mixed(interface: type[DensePredictor], package_class: type[nn.Module]) -> type[Any]:
    """Return a subclass of a package's class with the methods of `interface`, which call the package's by `super()`."""
    return type(interface.__name__, (interface, package_class), {})


def has(net: nn.Module, method: str) -> bool:
    return callable(getattr(net, method, None))


class Detector(DensePredictor):
    """A detector of mmdetection's. Images are normalised and zero-padded on the right and at the bottom.

    `sizes` (B, 2) is the height and width of each image within the padding; boxes are xyxy in pixels.
    """

    @property
    def masks(self) -> bool:
        return bool(getattr(self, "with_mask", False))

    def loss(
        self,
        image: Tensor,
        sizes: Tensor,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        masks: Sequence[Tensor] | None = None,
        ignored: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Losses by name, to be summed; those of a cascade's stages or a decoder's layers are one.

        Args:
            image: (B, C, H, W).
            sizes: (B, 2).
            boxes: of each image, (N_i, 4).
            labels: (N_i,), 0 to K - 1.
            masks: (N_i, h_i, w_i), 0 or 1; for a detector that predicts masks.
            ignored: crowds (M_i, 4), which are no objects. With `ignore_iof_thr` of the head's assigner they are not
                background either; in the papers' settings they are.
        """
        from mmdet.structures.mask import BitmapMasks
        from mmengine.structures import InstanceData

        H, W = image.shape[2:]
        samples = self._samples(image, sizes, sizes)
        for i, sample in enumerate(samples):
            truth: dict[str, Any] = {"bboxes": boxes[i].float(), "labels": labels[i]}
            if self.masks:
                assert masks is not None
                h, w = masks[i].shape[1:]
                whole = F.pad(masks[i], (0, W - w, 0, H - h)).cpu().numpy()
                truth["masks"] = BitmapMasks(whole, H, W)
            sample.gt_instances = InstanceData(**truth)
            crowds = boxes[i].new_zeros(0, 4) if ignored is None else ignored[i].float()
            sample.ignored_instances = InstanceData(bboxes=crowds, labels=labels[i].new_zeros(len(crowds)))
        package: Any = super()
        return summed(package.loss(image, samples))

    def predict(self, image: Tensor, sizes: Tensor, original_sizes: Tensor) -> list[Detections]:
        """Of images (B, C, H, W) of `sizes` (B, 2) that were resized from `original_sizes` (B, 2)."""
        package: Any = super()
        found = package.predict(image, self._samples(image, sizes, original_sizes), rescale=True)
        results = [sample.pred_instances for sample in found]
        return [
            Detections(r.bboxes.float(), r.scores.float(), r.labels, r.masks if self.masks else None) for r in results
        ]

    def forward(self, image: Tensor) -> Any:
        """What is counted as a detector's cost: the dense heads on all maps, the boxes and masks of a full test.

        Two-stage detectors score as many proposals of an image as they keep at most, and cut out masks of as many as
        they return at most (1,000 and 100 in the papers' settings). RoIAlign itself has no multiply-accumulates.
        """
        net: Any = self
        with on_meta(image):
            if not hasattr(net, "roi_head"):
                size = torch.tensor([list(image.shape[2:])] * len(image))
                training, self.training = self.training, False  # no denoising queries
                try:
                    return net._forward(image, self._samples(image, size, size))
                finally:
                    self.training = training
            maps = net.extract_feat(image)
            roi, kept, outputs = net.roi_head, net.test_cfg, [*net.rpn_head(maps)]
            for kind, number in (("bbox", kept.rpn.max_per_img), ("mask", kept.rcnn.max_per_img)):
                if kind == "mask" and not self.masks:
                    continue
                heads, extractors = stages(getattr(roi, f"{kind}_head")), stages(getattr(roi, f"{kind}_roi_extractor"))
                for head, extractor in zip(heads, extractors, strict=True):
                    side = extractor.roi_layers[0].output_size
                    outputs.append(head(maps[0].new_zeros(number * len(image), extractor.out_channels, *side)))
            return outputs

    @staticmethod
    def _samples(image: Tensor, sizes: Tensor, original_sizes: Tensor) -> list[Any]:
        from mmdet.structures import DetDataSample

        padded = tuple(image.shape[2:])
        return [
            DetDataSample(
                metainfo={
                    "img_shape": (h, w),
                    "batch_input_shape": padded,
                    "pad_shape": padded,
                    "ori_shape": (h0, w0),
                    "scale_factor": (w / w0, h / h0),
                }
            )
            for (h, w), (h0, w0) in zip(sizes.tolist(), original_sizes.tolist(), strict=True)
        ]


class Segmentor(DensePredictor):
    """A segmentor of mmsegmentation's, for normalised images (B, C, H, W) of any size."""

    masks = False

    def loss(self, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Losses by name, to be summed, for classes (B, H, W), 255 being ignored."""
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        samples = [SegDataSample(metainfo=meta) for meta in self._metas(image)]
        for sample, classes in zip(samples, mask, strict=True):
            sample.gt_sem_seg = PixelData(data=classes[None])
        package: Any = super()
        return summed(package.loss(image, samples))

    def logits(self, image: Tensor) -> Tensor:
        """(B, K, H, W). Mask2Former's are its masks, each weighted by the probability of its class."""
        package: Any = super()
        return package.encode_decode(image, self._metas(image))

    def forward(self, image: Tensor) -> Tensor:
        with on_meta(image):
            return self.logits(image)

    @staticmethod
    def _metas(image: Tensor) -> list[dict[str, Any]]:
        size = tuple(image.shape[2:])
        return [{"img_shape": size, "ori_shape": size, "pad_shape": size}] * len(image)


class DecoderSegmentor(Segmentor):
    """A backbone and a decoder of ours for four maps; those that the backbone lacks are its last, halved.

    The loss is cross-entropy, averaged over all pixels as mmsegmentation's: an ignored one is nought.
    """

    def __init__(self, backbone: DenseBackbone, create: Callable[[list[int]], nn.Module]):
        super().__init__()
        self.backbone = backbone
        self.lacking = 4 - len(backbone.channels)
        self.decode_head = create(backbone.channels + backbone.channels[-1:] * self.lacking)

    def loss(self, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        total = F.cross_entropy(self.logits(image).float(), mask, ignore_index=IGNORED, reduction="sum")
        return {"loss_ce": total / mask.numel()}

    def logits(self, image: Tensor) -> Tensor:
        maps = [*self.backbone(image)]
        for _ in range(self.lacking):
            maps.append(F.max_pool2d(maps[-1], 1, stride=2))
        logits = self.decode_head(maps)
        return F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)


def build_detector(cfg: Any, datamodule: Any) -> Detector:
    """The detector of a composed config (`cfg.model`, `cfg.head`) for the data's classes.

    Raises:
        ValueError: the size, the neck or an argument of the head is unknown, the backbone does not fit, or the head
            learns masks and the data has none.
    """
    detector = _build(Detector, cfg, datamodule)
    if detector.masks and not datamodule.has_masks:
        raise ValueError(
            f"head={cfg.head.name} learns masks, and data={cfg.data.name} has none: "
            "+head.args.roi_head.mask_head=null leaves them out, head=retinanet needs boxes only"
        )
    return detector


def build_segmentor(cfg: Any, datamodule: Any) -> Segmentor:
    """The segmentor of a composed config (`cfg.model`, `cfg.head`) for the data's classes.

    Raises:
        ValueError: the size or an argument of the head is unknown, or the backbone does not fit.
    """
    if cfg.head.library != "own":
        return _build(Segmentor, cfg, datamodule)
    backbone = create_backbone(cfg.model, cfg.data, datamodule.in_chans, min_stride=FINEST)
    args = changes(cfg.head, cfg.data.kind == "small") | {"num_classes": datamodule.num_classes}
    create = partial(DECODERS[cfg.head.name], **args)
    segmentor = built(cfg.head.name, lambda: DecoderSegmentor(backbone, create))
    segmentor.keep_single_precision()
    return segmentor


def _build(interface: type[DensePredictor], cfg: Any, datamodule: Any) -> Any:
    """The package's model with our interface, initialised; the backbone keeps its own initialisation."""
    head = cfg.head
    config = read_model(head, cfg.data.kind == "small")
    from mmengine.config import ConfigDict
    from mmengine.registry import MODELS, DefaultScope

    backbone = create_backbone(cfg.model, cfg.data, datamodule.in_chans, min_stride=finest_stride(config))
    fit(config, backbone, datamodule.num_classes)
    config["backbone"] = {"type": lambda: backbone}
    with DefaultScope.overwrite_default_scope(head.library), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if head.get("neck") is not None:
            neck = own_neck(head, config["neck"], MODELS.build)
            config["neck"] = {"type": lambda: neck}
        package_class = MODELS.get(f"{head.library}.{config['type']}")
        if package_class is None:
            raise ValueError(f"head={head.name} cannot be built: {head.library} has no model {config['type']!r}")
        config["type"] = mixed(interface, package_class)
        model = built(head.name, lambda: MODELS.build(ConfigDict(config)))
        if not any(parameter.is_meta for parameter in model.parameters()):
            model.init_weights()
    model.keep_single_precision()
    return model


def built(name: str, build: Callable[[], Any]) -> Any:
    """What `build` gives; a ValueError of one line where the head's arguments do not allow it."""
    try:
        return build()
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        reason = f"{unknown[1]} takes no argument {unknown[2]!r}" if unknown else str(error).partition("\n")[0]
        raise ValueError(f"head={name} cannot be built so: {reason or type(error).__name__}") from error


def own_neck(head: Any, fpn: dict, build: Callable[[dict], nn.Module]) -> nn.Module:
    """RCNet in place of a feature pyramid, or selective dense attention behind it."""
    if head.neck not in NECKS:
        raise ValueError(
            f"head.neck {head.neck!r} is unknown.{nearest(head.neck, NECKS)} There are: {', '.join(NECKS)}"
        )
    if fpn["type"] != "FPN":
        raise ValueError(f"head.neck={head.neck} is for heads on a feature pyramid, and head={head.name} has none")
    width, levels = fpn["out_channels"], fpn["num_outs"]
    if head.neck == "rcnet":
        return RCNet(fpn["in_channels"], width, levels)
    from mmengine.model import Sequential  # it passes on the call that initialises the pyramid

    return Sequential(build(fpn), SelectiveDenseAttention(width, levels))


def single(values: Any) -> Any:
    """Tensors, in tuples and lists, in float32 where they were in half precision."""
    return tree_map_only(Tensor, lambda t: t.float() if t.dtype in (torch.half, torch.bfloat16) else t, values)


def summed(losses: Mapping[str, Any]) -> dict[str, Tensor]:
    """Scalar losses: the mean of each, summed over a pyramid's levels, a cascade's stages and a decoder's layers."""
    total: dict[str, Tensor] = {}
    for key, value in losses.items():
        name = re.sub(r"\b[ds]\d+\.", "", key)
        if "loss" in name:
            values = torch.stack([each.mean() for each in ([value] if isinstance(value, Tensor) else value)])
            total[name] = total.get(name, 0) + values.sum()
    return total


def stages(module: nn.Module) -> list[Any]:
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def on_meta(image: Tensor) -> AbstractContextManager:
    """For a forward pass that may be on the meta device, where costs are counted."""
    return KnownSizes() if image.is_meta else nullcontext()


class KnownSizes(TorchFunctionMode):
    """Keep the integers that a net makes of its maps' sizes on the CPU, for the meta device has no values.

    Detection transformers compute with such tensors and cut their tokens by them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        tree_map_only(Tensor, tensors.append, (args, kwargs))
        on_cpu = [t for t in tensors if not t.is_meta]
        if on_cpu and func is Tensor.to and torch.device("meta") in args:
            return args[0]
        if on_cpu and len(on_cpu) < len(tensors):
            args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta") if t.ndim else t, (args, kwargs))
        return func(*args, **kwargs)
