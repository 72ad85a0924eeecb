"""A detector and a segmentor on our Swin give the results of the packages' own models with the packages' Swin.

The weights are the same: ours load them under the names of Swin's authors.
"""

import warnings
from typing import Any

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from torch import Tensor

from models import load_weights
from models.openmmlab.config import library
from models.openmmlab.detector import Detections
from models.openmmlab.interface import sum_losses
from tests.models.openmmlab import CLASSES, build

CONFIGS = {
    "mask_rcnn": ("mmdet", "swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"),
    "upernet": ("mmseg", "swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"),
}
NANO = {"embed_dims": 32, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "window_size": 4}
WIDTHS = [32, 64, 128, 256]
# Numbers of proposals and detections of an image: most of the time of a prediction goes into their boxes and masks.
LIMITS = {"rpn": {"max_per_img": 200}, "rcnn": {"max_per_img": 20}}


def adapt(node: Any) -> Any:
    """Return a package's config for `CLASSES` classes, with batch norm for one process and without dropout."""
    if isinstance(node, list | tuple):
        return [adapt(child) for child in node]
    if not isinstance(node, dict):
        return node
    replaced = {"num_classes": CLASSES, "dropout_ratio": 0.0, "drop_path_rate": 0.0, "init_cfg": None}
    adapted = {key: replaced.get(key, adapt(value)) for key, value in node.items()}
    if node.get("type") == "SyncBN":
        adapted["type"] = "BN"
    return adapted


def build_package_model(head: str) -> Any:
    """Build the package's model with the package's Swin, as small as our `nano`, and random weights."""
    library_name, path = CONFIGS[head]
    config = adapt(Config.fromfile(library(library_name) / path).model.to_dict())
    config["data_preprocessor"] = None
    config["backbone"] |= NANO
    (config.get("neck") or config["decode_head"])["in_channels"] = WIDTHS
    if "auxiliary_head" in config:
        config["auxiliary_head"]["in_channels"] = WIDTHS[2]
    if head == "mask_rcnn":
        for part, limit in LIMITS.items():
            config["test_cfg"][part] |= limit
    with DefaultScope.overwrite_default_scope(library_name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(2)
        model = MODELS.build(ConfigDict(config))
        model.init_weights()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            # Norms and biases start as 1 and 0, which would hide a wrong name.
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif "fc_cls" in name:
            # Larger weights separate the scores, so that both models rank the boxes alike.
            parameter.data *= 8
    return model.double()


def rename_as_authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights of the package's Swin to the names of the authors' dense code: `swin_converter`, reversed."""
    names = {
        "projection": "proj", "backbone.stages.": "backbone.layers.", "attn.w_msa.": "attn.",
        "ffn.layers.0.0.": "mlp.fc1.", "ffn.layers.1.": "mlp.fc2.",
    }  # fmt: skip
    result = {}
    for key, value in state.items():
        if key.startswith("backbone"):
            if "downsample" in key:
                # Patch merging reads 2 x 2 tokens. The package orders the input by channel, then row by row; the
                # authors order it by token, column by column, then by channel.
                value = value.unflatten(-1, (-1, 4)).transpose(-1, -2)[..., [0, 2, 1, 3], :].flatten(-2)
            for package_name, authors_name in names.items():
                key = key.replace(package_name, authors_name)
        result[key] = value
    return result


def build_pair(head: str) -> tuple[Any, Any]:
    """Return the package's model, and ours with the same weights."""
    package_model = build_package_model(head)
    args: dict[str, Any] = {"test_cfg": LIMITS}
    if head == "upernet":
        args = {"decode_head": {"dropout_ratio": 0.0}, "auxiliary_head": {"dropout_ratio": 0.0}}
    swin = {"model__size": "nano", "model__args": {"drop_path_rate": 0.0}}
    our_model = build(head, "swin", size="full", head__args=args, **swin).double()
    loaded = load_weights(our_model, {"state_dict": rename_as_authors(package_model.state_dict())})
    assert not (loaded.missing or loaded.unexpected or loaded.dropped)
    return package_model, our_model


def equal_losses(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[key], b[key]) for key in a)


def test_mask_rcnn_equals_mmdetections():
    package_model, our_model = build_pair("mask_rcnn")
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    H, W, sizes, original = 160, 192, [(160, 180), (150, 192)], [(320, 360), (75, 96)]
    image = torch.randn(2, 3, H, W, dtype=torch.double)
    boxes = [torch.tensor([[8.0, 8, 110, 100], [60, 30, 170, 150]]), torch.tensor([[33.0, 44, 66, 88]])]
    labels = [torch.tensor([1, CLASSES - 1]), torch.tensor([0])]
    masks = [torch.zeros(len(image_boxes), H, W, dtype=torch.uint8) for image_boxes in boxes]
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

    # Proposals are sampled at random, so both models start from the same seed.
    torch.manual_seed(3)
    expected = sum_losses(package_model.loss(image, samples))
    torch.manual_seed(3)
    assert equal_losses(expected, our_model.loss(image, torch.tensor(sizes), boxes, labels, masks))

    with torch.no_grad():
        results = package_model.float().eval().predict(image.float(), samples)
        detections = our_model.float().eval().predict(image.float(), torch.tensor(sizes), torch.tensor(original))
    for result, b in zip(results, detections, strict=True):
        # The scores of the first 20 boxes differ enough for the order to be the same.
        a, b = result.pred_instances[:20], Detections(*(values[:20] for values in b))
        assert len(a.bboxes) == 20 and torch.equal(a.labels, b.labels) and (a.masks != b.masks).float().mean() < 1e-4
        assert torch.allclose(a.bboxes, b.boxes, atol=1e-3) and torch.allclose(a.scores, b.scores, atol=1e-5)


@pytest.mark.slow
def test_upernet_equals_mmsegmentations():
    package_model, our_model = build_pair("upernet")
    from mmseg.structures import SegDataSample

    image, mask = torch.randn(2, 3, 150, 192, dtype=torch.double), torch.randint(0, CLASSES, (2, 150, 192))
    mask[:, :40] = 255
    shapes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape"), (150, 192))
    samples = [SegDataSample(metainfo=shapes) for _ in image]
    for sample, classes in zip(samples, mask, strict=True):
        sample.gt_sem_seg = PixelData(data=classes[None])
    assert equal_losses(sum_losses(package_model.loss(image, samples)), our_model.loss(image, mask))
    with torch.no_grad():
        expected = package_model.eval().encode_decode(image, [shapes] * 2)
        assert expected.std() > 0.01 and torch.allclose(expected, our_model.eval().logits(image))


def test_weights_under_the_packages_names_of_swin_are_refused_in_one_line():
    package_model = build_package_model("upernet")
    our_model = build("upernet", "swin", size="full", model__size="nano")
    with pytest.raises(ValueError, match=r"does not fit Segmentor: .*unexpected \(.*patch_embed\.projection") as error:
        load_weights(our_model, {"state_dict": package_model.state_dict()})
    assert "\n" not in str(error.value)
