"""FeatEnHancer, alone and in front of detectors and segmentors; test_vectors.py compares it with the authors' code."""

import math

import pytest
import timm
import torch

from models import DenseBackbone, load_weights
from models.enhancers import FeatEnHancer, ScaleAggregation, resize
from tests.models.openmmlab import build
from tests.models.openmmlab.test_build import detection_batch, losses, without_gradient

ENHANCED = {"enhancer": "featenhancer"}


def test_heads_weigh_two_scales_at_each_position():
    torch.manual_seed(0)
    module, full, quarter = ScaleAggregation(), torch.randn(2, 24, 61, 75), torch.randn(2, 24, 14, 18)
    with torch.no_grad():
        out = module(full, quarter)
        a, b = module.reduce_full(full), module.reduce_quarter(quarter)
        mixed = torch.zeros_like(b)
        for image, head, y, x in torch.cartesian_prod(*map(torch.arange, (2, 8, *b.shape[2:]))).tolist():
            channels = slice(3 * head, 3 * head + 3)
            u, v = a[image, channels, y, x], b[image, channels, y, x]
            score_u, score_v = math.exp(u @ v / math.sqrt(3)), math.exp(v @ v / math.sqrt(3))
            mixed[image, channels, y, x] = (score_u * u + score_v * v) / (score_u + score_v)
        assert torch.allclose(out - full, resize(mixed, full.shape[2:]), atol=1e-5)


@torch.no_grad()
def test_an_image_keeps_its_size_and_changes_by_at_most_eight():
    torch.manual_seed(0)
    module = FeatEnHancer()
    for size in ((15, 15), (31, 50), (50, 31)):
        x = torch.randn(1, 3, *size)
        change = module(x) - x
        assert change.shape == x.shape and 0 < change.abs().max() <= 8
    with torch.autocast("cpu", torch.bfloat16):
        half = module(x) - x
    assert (half - change).abs().max() < 0.05


def test_too_small_an_image_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"at least 15 pixels, not \(14, 40\)$"):
        FeatEnHancer()(torch.zeros(1, 3, 14, 40))


@pytest.mark.parametrize(
    ("head", "net"),
    [
        ("retinanet", "biformer"),
        ("vwformer", "vitdet"),
        pytest.param("mask_rcnn", "resnet18", marks=pytest.mark.slow),
        pytest.param("dino", "vitdet", marks=pytest.mark.slow),
        pytest.param("upernet", "resnet18", marks=pytest.mark.slow),
    ],
)
def test_it_is_trained_in_front_of_any_detector_and_segmentor(head, net):
    model = build(head, net, model__args=ENHANCED)
    assert without_gradient(model, losses(model)) == []
    assert all(p.grad.abs().max() > 0 for p in model.backbone.enhancer.parameters())
    model.eval()
    with torch.no_grad():
        if hasattr(model, "predict") and head in ("retinanet", "mask_rcnn", "dino"):
            image, sizes, *_ = detection_batch()
            assert len(model.predict(image, sizes, sizes)) == 2
        else:
            assert model.logits(torch.randn(1, 3, 61, 75)).shape[2:] == (61, 75)


def test_weights_of_a_classifier_and_of_the_whole_backbone_load():
    backbone = DenseBackbone("biformer_nano", enhancer="featenhancer")
    loaded = load_weights(backbone, timm.create_model("biformer_nano").state_dict())
    assert loaded.missing and all(name.startswith("enhancer.") for name in loaded.missing)
    loaded = load_weights(DenseBackbone("biformer_nano", enhancer="featenhancer"), backbone.state_dict())
    assert not loaded.missing and not loaded.unexpected


def test_an_unknown_enhancer_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"enhancer 'featenhance' is unknown\. Did you mean 'featenhancer'\?"):
        DenseBackbone("biformer_nano", enhancer="featenhance")
