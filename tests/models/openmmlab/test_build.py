"""Heads of mmdetection, mmsegmentation and our own on backbones of ours and timm's."""

import copy
import math
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from mmengine.registry import MODELS
from timm.optim import create_optimizer_v2

from models import complexity, load_weights
from models.factory import resolve
from models.openmmlab.build import build_detector
from models.openmmlab.config import learns_masks, merge
from models.openmmlab.detector import Detector
from models.openmmlab.segmentor import Segmentor
from tests.models.openmmlab import CLASSES, DETECTORS, SEGMENTORS, build, make_config

# Two nets of ours, and a CNN and a transformer of timm's.
NETS = ("biformer", "swin", "resnet18", "pvt_v2_b0")


def detection_batch(objects: Sequence[int] = (2, 0)) -> tuple[Any, ...]:
    """Return the arguments of `Detector.loss` for two padded images of 90 x 130 and 80 x 100 pixels.

    The mask of an object is the upper half of its box.

    Args:
        objects: Number of objects in each image, at most 2.
    """
    torch.manual_seed(1)
    sizes = torch.tensor([[90, 130], [80, 100]])
    all_boxes = torch.tensor([[8.0, 8.0, 70.0, 60.0], [40.0, 30.0, 95.0, 78.0]])
    boxes, labels = [all_boxes[:n] for n in objects], [torch.tensor([1, CLASSES - 1])[:n] for n in objects]
    masks = [torch.zeros(n, *size, dtype=torch.uint8) for n, size in zip(objects, sizes.tolist(), strict=True)]
    for image_boxes, image_masks in zip(boxes, masks, strict=True):
        for (x1, y1, x2, y2), mask in zip(image_boxes.int().tolist(), image_masks, strict=True):
            mask[y1 : (y1 + y2) // 2, x1:x2] = 1
    crowds = [torch.tensor([[80.0, 60.0, 120.0, 90.0]]), torch.zeros(0, 4)]
    return torch.randn(2, 3, 96, 160), sizes, boxes, labels, masks, crowds


def segmentation_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return two images and their classes; the top rows are ignored."""
    torch.manual_seed(1)
    mask = torch.randint(0, CLASSES, (2, 3, 5)).repeat_interleave(30, 1).repeat_interleave(26, 2)
    mask[:, :20] = 255
    return torch.randn(2, 3, 90, 130), mask


def losses(net: Any) -> dict[str, torch.Tensor]:
    """Compute the losses of a detector or a segmentor on its test batch."""
    return net.loss(*(detection_batch() if isinstance(net, Detector) else segmentation_batch()))


def without_gradient(net: torch.nn.Module, loss: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of the trainable parameters whose gradient is missing or not finite."""
    torch.stack([*loss.values()]).sum().backward()
    grads = [(name, p.grad) for name, p in net.named_parameters() if p.requires_grad]
    return [name for name, grad in grads if grad is None or not grad.isfinite().all()]


def combinations() -> list[Any]:
    """Return pairs of head and net: each head on one net in quick tests, on every net in slow tests."""
    heads = DETECTORS + SEGMENTORS
    return [
        pytest.param(head, net, marks=() if i % len(NETS) == j else pytest.mark.slow)
        for i, head in enumerate(heads)
        for j, net in enumerate(NETS)
    ]


@pytest.mark.parametrize(("head", "net"), combinations())
def test_every_parameter_is_trained_and_predictions_fit_the_original_image(head, net):
    model = build(head, net)
    loss = losses(model)
    assert all(value.ndim == 0 and value.isfinite() for value in loss.values())
    assert without_gradient(model, loss) == []
    model.eval()
    with torch.no_grad():
        if isinstance(model, Segmentor):
            logits = model.logits(torch.randn(1, 3, 61, 75))
            assert logits.shape == (1, CLASSES, 61, 75) and not logits.isnan().any()
            return
        image, sizes, *_ = detection_batch()
        detections = model.predict(image, sizes, torch.tensor([[180, 260], [80, 100]]))
    for (boxes, scores, labels, masks), (h, w) in zip(detections, ((180, 260), (80, 100)), strict=True):
        assert boxes.shape == (len(scores), 4) and boxes.dtype == scores.dtype == torch.float32
        assert (boxes >= 0).all() and (boxes <= torch.tensor([w, h, w, h])).all()
        assert labels.dtype == torch.int64 and ((labels >= 0) & (labels < CLASSES)).all()
        assert (masks is not None) == ("mask" in head)
        assert masks is None or (masks.dtype == torch.bool and masks.shape == (len(boxes), h, w))
    # All scores of an untrained RetinaNet or FCOS are below its threshold.
    if head not in ("retinanet", "fcos"):
        assert all(len(image_detections.boxes) for image_detections in detections)


@pytest.mark.parametrize("head", ["mask_rcnn", "dino"])
def test_boxes_scale_with_the_original_image(head):
    model = build(head).eval()
    image, sizes, *_ = detection_batch()
    with torch.no_grad():
        same, double = model.predict(image, sizes, sizes), model.predict(image, sizes, 2 * sizes)
    for a, b in zip(same, double, strict=True):
        assert torch.allclose(2 * a.boxes, b.boxes, atol=1e-3) and torch.allclose(a.scores, b.scores)


@pytest.mark.parametrize("head", DETECTORS)
def test_images_without_objects_train_every_parameter(head):
    model = build(head)
    assert without_gradient(model, model.loss(*detection_batch(objects=(0, 0)))) == []


def test_an_image_of_ignored_pixels_only_gives_no_loss():
    image, mask = segmentation_batch()
    for head in ("upernet", "vwformer"):
        assert all(loss.item() == 0 for loss in build(head).loss(image, torch.full_like(mask, 255)).values())


def test_ignored_pixels_do_not_change_the_loss():
    image, mask = segmentation_batch()
    model, filled_mask = build("vwformer").eval(), mask.clone()
    logits = model.logits(image)
    filled_mask[mask == 255] = logits.argmax(1)[mask == 255]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # VWFormer's authors train with this loss.
        cross_entropy = MODELS.build({"type": "mmseg.CrossEntropyLoss"})
    expected = cross_entropy(logits, mask, ignore_index=255)
    assert torch.allclose(model.loss(image, mask)["loss_ce"], expected, rtol=1e-4)
    assert not torch.allclose(model.loss(image, filled_mask)["loss_ce"], expected, rtol=1e-4)


def test_crowds_can_be_excluded_from_the_background():
    model = build("retinanet", head__args={"train_cfg": {"assigner": {"ignore_iof_thr": 0.5}}})
    image, sizes, boxes, labels, masks, _ = detection_batch()
    everywhere = [torch.tensor([[0.0, 0.0, w, h]]) for h, w in sizes.tolist()]
    with_crowd, without = (model.loss(image, sizes, boxes, labels, masks, c) for c in (everywhere, None))
    assert with_crowd["loss_cls"].item() < 0.9 * without["loss_cls"].item()
    # In the papers' setting, a crowd counts as background.
    model = build("retinanet")
    with_crowd, without = (model.loss(image, sizes, boxes, labels, masks, c) for c in (everywhere, None))
    assert torch.allclose(with_crowd["loss_cls"], without["loss_cls"])


@pytest.mark.parametrize("head", ["mask_rcnn", "dino", "mask2former"])
def test_half_precision_trains_every_parameter(head):
    model = build(head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = losses(model)
    assert without_gradient(model, loss) == []


@pytest.mark.parametrize("head", DETECTORS)
def test_boxes_are_not_rounded_to_half_precision(head):
    model = build(head, "swin").eval()
    if head in ("retinanet", "fcos"):
        # Without this, all scores are below the threshold.
        getattr(model.bbox_head, {"retinanet": "retina_cls", "fcos": "conv_cls"}[head]).bias.data.zero_()
    dtypes = []
    for name, part in model.named_modules():
        if "roi_extractor" in name or name.endswith("value_proj"):
            part.register_forward_hook(lambda _, args, output: dtypes.append(output.dtype))
    size = torch.tensor([[64, 1303]])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        x = model.predict(torch.randn(1, 3, 64, 1312), size, size)[0].boxes[:, [0, 2]]
    x = x[(x > 0) & (x < 1303)]
    assert len(x) > 10 and (x == x.bfloat16()).float().mean() < 0.5
    assert {*dtypes} <= {torch.float32}


@pytest.mark.parametrize("head", ["semantic_fpn", "upernet", "vwformer", "linear"])
def test_logits_are_resized_in_float32_in_half_precision(head):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = build(head).eval().logits(torch.randn(1, 3, 64, 96))
    assert logits.dtype == torch.float32 and (logits == logits.bfloat16()).float().mean() < 0.5


@pytest.mark.parametrize(("head", "key"), [("semantic_fpn", "decode.loss_ce"), ("mask_rcnn", "loss_mask")])
def test_a_few_steps_on_one_batch_lower_the_loss(head, key):
    model = build(head)
    optimizer, values = torch.optim.AdamW(model.parameters(), 2e-3), []
    for _ in range(10):
        loss = losses(model)
        values.append(float(loss[key].detach()))
        optimizer.zero_grad()
        torch.stack([*loss.values()]).sum().backward()
        optimizer.step()
    assert values[-1] < 0.8 * values[0], values


@pytest.mark.parametrize(
    ("head", "neck"),
    [
        ("retinanet", "rcnet"),
        ("retinanet", "sdanet"),
        ("mask_rcnn", "sdanet"),
        ("retinanet", "wau"),
        ("semantic_fpn", "wau"),
    ],
)
def test_our_necks_train_every_parameter(head, neck):
    model = build(head, head__neck=neck)
    assert without_gradient(model, losses(model)) == []
    biases = [bias for name, bias in build(head, head__neck=neck).named_parameters() if "lateral_convs" in name]
    # The pyramid before our neck is initialised as mmdetection does.
    assert all(not bias.any() for bias in biases if bias.ndim == 1)
    without_neck = build(head)
    assert sum(p.numel() for p in model.parameters()) != sum(p.numel() for p in without_neck.parameters())


def test_initial_weights_are_the_papers_and_follow_from_the_seed():
    first, second = (build("retinanet").state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    prior = first["bbox_head.retina_cls.bias"]
    # RetinaNet's bias gives each class an initial probability of 1 %.
    assert torch.allclose(prior, torch.full_like(prior, -math.log(99)))
    torch.manual_seed(0)
    net = timm.create_model("biformer_nano", num_classes=0, drop_path_rate=0.05, stem_stride=4).state_dict()
    backbone = {key.removeprefix("backbone.net."): value for key, value in first.items() if "backbone.net" in key}
    assert any(value.ndim > 1 for value in backbone.values())
    assert all(math.isclose(net[k].std(), v.std(), rel_tol=0.3) for k, v in backbone.items() if v.numel() > 1000)


def test_maps_have_norms_if_the_paper_has_them():
    assert len(build("upernet", "biformer").backbone.norms) == 4
    assert len(build("retinanet", "swin").backbone.norms) == 3  # RetinaNet's maps
    assert not build("upernet", "resnet18").backbone.norms


def test_heads_read_strides_from_4_and_large_data_choose_large_nets():
    for net in ("biformer", "swin"):
        model = build("upernet", net)
        assert model.backbone.strides == [4, 8, 16, 32] and model.backbone.channels == [32, 64, 128, 256]
        assert resolve(make_config("upernet", net).model, 32)[1].keys() == {"drop_path_rate"}
    assert build("retinanet").backbone.strides == [8, 16, 32]
    with torch.device("meta"):
        large = build("upernet", "swin", data__kind="ade20k")
    assert large.backbone.channels == [96, 192, 384, 768] and large.decode_head.channels == 512


def test_heads_fit_a_net_with_three_maps():
    three_stages = {"dims": [16, 32, 64], "depths": [1, 1, 1], "heads": [1, 2, 4], "mixers": "window", "norms": False}
    for head in ("mask_rcnn", "rtmdet", "upernet", "vwformer", "fpn_lite", "wau"):
        model = build(head, model__args=three_stages)
        assert model.backbone.strides in ([4, 8, 16], [8, 16]) and not model.backbone.norms
        assert without_gradient(model, losses(model)) == []


@pytest.mark.parametrize(
    "head",
    [
        "hbformer",
        "iml_vit",
        "transdae",
        "wau",
        *(pytest.param(head, marks=pytest.mark.slow) for head in ("att_swin_unet", "ds_transunet")),
    ],
)
def test_our_decoders_read_the_simple_pyramid_of_a_plain_net(head):
    model = build(head, "test_vit")
    assert model.backbone.pyramid is not None and model.backbone.strides == [4, 8, 16, 32]
    assert without_gradient(model, losses(model)) == []
    with torch.no_grad():
        assert model.eval().logits(torch.randn(1, 3, 61, 75)).shape == (1, CLASSES, 61, 75)


def test_weights_of_a_classifier_load_into_the_backbone():
    model = build("mask_rcnn")
    classifier: Any = timm.create_model("biformer_nano", num_classes=10)
    loaded = load_weights(model.backbone, classifier.state_dict())
    assert set(loaded.missing) == {f"norms.{i}.{kind}" for i in range(4) for kind in ("weight", "bias")}
    weight = model.backbone.net.stages[0].downsample[0].weight
    assert torch.equal(weight, classifier.stages[0].downsample[0].weight)


@pytest.mark.parametrize("net", ["swin", "resnet18"])
def test_layer_decay_gives_the_stem_the_lowest_rate_and_the_head_the_full_rate(net):
    model = build("upernet", net)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    scale_of = {name: scales[id(p)] for name, p in model.named_parameters()}
    stem = next(scale for name, scale in scale_of.items() if name.startswith("backbone"))
    assert all(scale == 1 for name, scale in scale_of.items() if not name.startswith("backbone.net"))
    net_scales = [scale for name, scale in scale_of.items() if name.startswith("backbone.net")]
    assert stem == min(net_scales) and max(net_scales) == 0.5 and len(set(net_scales)) > 4


def test_no_weight_decay_names_parameters_of_the_net_and_of_the_head():
    names = {name for name, _ in build("mask2former", "swin").named_parameters()}
    undecayed = build("mask2former", "swin").no_weight_decay()
    assert undecayed < names and any("query_feat" in name for name in undecayed)
    assert any("backbone.net" in name for name in undecayed)


def test_a_deep_copy_shares_nothing_with_the_original():
    # DINO has a parameter, level_embed, and a training mode of its own, besides those of its parts.
    model = build("dino", "swin")
    copied = copy.deepcopy(model).eval()
    assert not copied.training and model.training
    parameters, copied_parameters = ({id(p) for p in net.parameters()} for net in (model, copied))
    assert parameters.isdisjoint(copied_parameters) and len(parameters) == len(copied_parameters)
    assert "level_embed" in model.state_dict() and copied.state_dict().keys() == model.state_dict().keys()


def test_checkpointing_gives_the_same_loss():
    model = build("semantic_fpn", "swin", model__args={"drop_path_rate": 0.0}).train()
    torch.manual_seed(0)
    expected = losses(model)["decode.loss_ce"]
    model.set_grad_checkpointing(True)
    torch.manual_seed(0)
    assert torch.allclose(losses(model)["decode.loss_ce"], expected, atol=1e-6)
    assert all(stage.grad_checkpointing for stage in model.backbone.net.stages)


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(head, marks=() if head in ("retinanet", "semantic_fpn") else pytest.mark.slow)
        for head in DETECTORS + SEGMENTORS
    ],
)
def test_costs_are_counted_on_the_meta_device_and_leave_the_model_alone(head):
    model = build(head).train()
    params, macs = complexity(model, (64, 96))
    backbone = complexity(model.backbone, (64, 96))
    assert params == sum(p.numel() for p in model.parameters()) and macs > backbone[1]
    assert model.training and not any(p.is_meta for p in model.parameters())


def test_a_head_is_built_quietly_and_writes_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for head in ("mask_rcnn", "mask2former"):
        build(head)
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_unknown_and_unfitting_choices_are_refused_in_one_line():
    for key, message in {
        "head__size": r"head\.size 'smal' is unknown\. Did you mean 'small'\? There are: small, full",
        "head__neck": r"head\.neck 'smal' is unknown\.",
        "head__args__rpn_head__smal": (
            r"head=mask_rcnn cannot be built with these arguments: AnchorHead takes no argument 'smal'"
        ),
        "head__args": r"head\.args must be a mapping, like \{rpn_head: \{feat_channels: 128\}\}, not 'smal'",
        "head__config": r"mmdet has no config 'smal'",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            build("mask_rcnn", **{key: "smal"})
        assert "\n" not in str(error.value)
    with pytest.raises(
        ValueError, match=r"head\.neck=sdanet is for heads on a feature pyramid, and head=dino has none"
    ):
        build("dino", head__neck="sdanet")
    with pytest.raises(ValueError, match=r"head=vwformer cannot be built with these arguments: .*multiple of 64"):
        build("vwformer", head__args={"channels": 100})
    boxes_only = SimpleNamespace(num_classes=CLASSES, in_chans=3, has_masks=False)
    with pytest.raises(ValueError, match=r"learns masks, and data=scenes has none: \+head\.args\.roi_head\.mask_head"):
        build_detector(make_config("mask_rcnn"), boxes_only)
    assert not build_detector(make_config("mask_rcnn", head__args={"roi_head": {"mask_head": None}}), boxes_only).masks


def test_learns_masks_agrees_with_the_detector_without_building_it():
    for head in DETECTORS:
        assert learns_masks(make_config(head).head, small=True) == build(head).masks == ("mask" in head)
    assert not learns_masks(make_config("mask_rcnn", head__args={"roi_head": {"mask_head": None}}).head, small=True)


def test_a_mapping_changes_every_element_of_a_list():
    cfg = {"heads": [{"a": 1, "loss": {"type": "l1", "beta": 2}}, {"a": 2}], "kept": 0}
    merged = merge(cfg, {"heads": {"loss": {"_delete_": True, "type": "iou"}}, "new": {"x": 1}})
    assert merged == {
        "heads": [{"a": 1, "loss": {"type": "iou"}}, {"a": 2, "loss": {"type": "iou"}}],
        "kept": 0,
        "new": {"x": 1},
    }
