"""A whole detector and a whole segmentor against the packages' own, from the same weights under the authors' names."""

import warnings
from typing import Any

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from torch import Tensor

from models import load_weights
from models.openmmlab.build import Detections, summed
from models.openmmlab.config import library
from tests.models.test_mm import CLASSES, build

CONFIGS = {
    "mask_rcnn": ("mmdet", "swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"),
    "upernet": ("mmseg", "swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"),
}
NANO = {"embed_dims": 32, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "window_size": 4}
WIDTHS = [32, 64, 128, 256]


def fitted(node: Any) -> Any:
    """Their config for `CLASSES` classes, with batch norm for one process and without dropout."""
    if isinstance(node, list | tuple):
        return [fitted(each) for each in node]
    if not isinstance(node, dict):
        return node
    ours = {"num_classes": CLASSES, "dropout_ratio": 0.0, "drop_path_rate": 0.0, "init_cfg": None}
    changed = {key: ours.get(key, fitted(value)) for key, value in node.items()}
    return changed | ({"type": "BN"} if node.get("type") == "SyncBN" else {})


def packages(head: str) -> Any:
    """The package's model with its own Swin, as small as our nano, and random weights."""
    name, path = CONFIGS[head]
    config = fitted(Config.fromfile(library(name) / path).model.to_dict())
    config["data_preprocessor"] = None
    config["backbone"] |= NANO
    (config.get("neck") or config["decode_head"])["in_channels"] = WIDTHS
    if "auxiliary_head" in config:
        config["auxiliary_head"]["in_channels"] = WIDTHS[2]
    with DefaultScope.overwrite_default_scope(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(2)
        model = MODELS.build(ConfigDict(config))
        model.init_weights()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms and biases, which are 1 and 0
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif "fc_cls" in name:
            parameter.data *= 8  # scores apart from each other
    return model.double()


def authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of the authors' dense code: mmdetection's `swin_converter` backwards."""
    names = {
        "projection": "proj", "backbone.stages.": "backbone.layers.", "attn.w_msa.": "attn.",
        "ffn.layers.0.0.": "mlp.fc1.", "ffn.layers.1.": "mlp.fc2.",
    }  # fmt: skip
    result = {}
    for key, value in state.items():
        if key.startswith("backbone"):
            if "downsample" in key:  # 2 x 2 tokens: theirs by channel, then row by row; the authors' column by column
                value = value.unflatten(-1, (-1, 4)).transpose(-1, -2)[..., [0, 2, 1, 3], :].flatten(-2)
            for theirs, ours in names.items():
                key = key.replace(theirs, ours)
        result[key] = value
    return result


def pair(head: str) -> tuple[Any, Any]:
    """Theirs, and ours after loading its weights."""
    theirs = packages(head)
    args: dict[str, Any] = {"decode_head": {"dropout_ratio": 0.0}, "auxiliary_head": {"dropout_ratio": 0.0}}
    args = args if head == "upernet" else {}
    swin = {"model__size": "nano", "model__args": {"drop_path_rate": 0.0}}
    ours = build(head, "swin", size="full", head__args=args, **swin).double()
    done = load_weights(ours, {"state_dict": authors(theirs.state_dict())})
    assert not (done.missing or done.unexpected or done.dropped)
    return theirs, ours


def same(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> bool:
    return theirs.keys() == ours.keys() and all(torch.allclose(theirs[key], ours[key]) for key in ours)


def test_mask_rcnn_is_mmdetections():
    theirs, ours = pair("mask_rcnn")
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    H, W, sizes, original = 160, 192, [(160, 180), (150, 192)], [(320, 360), (75, 96)]
    image = torch.randn(2, 3, H, W, dtype=torch.double)
    boxes = [torch.tensor([[8.0, 8, 110, 100], [60, 30, 170, 150]]), torch.tensor([[33.0, 44, 66, 88]])]
    labels = [torch.tensor([1, CLASSES - 1]), torch.tensor([0])]
    masks = [torch.zeros(len(each), H, W, dtype=torch.uint8) for each in boxes]
    for mask in masks:
        mask[:, 50:80, 40:65] = 1
    samples = []
    for i, ((h, w), (h0, w0)) in enumerate(zip(sizes, original, strict=True)):
        padded = {"batch_input_shape": (H, W), "pad_shape": (H, W)}
        shapes = {"img_shape": (h, w), "ori_shape": (h0, w0), "scale_factor": (w / w0, h / h0)}
        sample = DetDataSample(metainfo=padded | shapes)
        truth = {"bboxes": boxes[i], "labels": labels[i], "masks": BitmapMasks(masks[i].numpy(), H, W)}
        sample.gt_instances = InstanceData(**truth)
        samples.append(sample)

    torch.manual_seed(3)  # proposals are sampled
    expected = summed(theirs.loss(image, samples))
    torch.manual_seed(3)
    assert same(expected, ours.loss(image, torch.tensor(sizes), boxes, labels, masks))

    with torch.no_grad():
        expected = [each.pred_instances for each in theirs.float().eval().predict(image.float(), samples)]
        found = ours.float().eval().predict(image.float(), torch.tensor(sizes), torch.tensor(original))
    for a, b in zip(expected, found, strict=True):
        a, b = a[:20], Detections(*(each[:20] for each in b))  # of scores far enough apart
        assert len(a.bboxes) == 20 and torch.equal(a.labels, b.labels) and (a.masks != b.masks).float().mean() < 1e-4
        assert torch.allclose(a.bboxes, b.boxes, atol=1e-3) and torch.allclose(a.scores, b.scores, atol=1e-5)


def test_upernet_is_mmsegmentations():
    theirs, ours = pair("upernet")
    from mmseg.structures import SegDataSample

    image, mask = torch.randn(2, 3, 150, 192, dtype=torch.double), torch.randint(0, CLASSES, (2, 150, 192))
    mask[:, :40] = 255
    shapes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape"), (150, 192))
    samples = [SegDataSample(metainfo=shapes) for _ in image]
    for sample, classes in zip(samples, mask, strict=True):
        sample.gt_sem_seg = PixelData(data=classes[None])
    assert same(summed(theirs.loss(image, samples)), ours.loss(image, mask))
    with torch.no_grad():
        expected = theirs.eval().encode_decode(image, [shapes] * 2)
        assert expected.std() > 0.01 and torch.allclose(expected, ours.eval().logits(image))


def test_names_of_the_packages_own_swin_are_refused_in_one_line():
    theirs, ours = packages("upernet"), build("upernet", "swin", size="full", model__size="nano")
    with pytest.raises(ValueError, match=r"does not fit Segmentor: .*unexpected \(.*patch_embed\.projection") as error:
        load_weights(ours, {"state_dict": theirs.state_dict()})
    assert "\n" not in str(error.value)
