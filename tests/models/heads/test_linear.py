"""The linear classifier reads the maps of linear evaluations, and the light decoder sums maps of any number."""

import pytest
import torch
import torch.nn.functional as F

from models.heads.fpn_lite import FPNLiteHead
from models.heads.linear import LinearHead
from tests.models.heads import pyramid, stir, without_gradient
from tests.models.openmmlab import CLASSES, build

VIT = "vit_tiny_patch16_224"


def test_a_plain_nets_last_tokens_are_classified_after_the_final_norm():
    model = stir(build("linear", VIT)).eval()
    # 250 x 310 pixels are padded to 16 x 20 patches.
    image = torch.randn(1, 3, 250, 310)
    with torch.no_grad():
        tokens = model.backbone.net.forward_features(F.pad(image, (0, 10, 0, 6)))[:, 1:]
        norm, classifier = model.decode_head.norm, model.decode_head.classifier
        normalised = (tokens - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        scores = F.linear(normalised, classifier.weight.flatten(1), classifier.bias)
        scores = scores.transpose(1, 2).unflatten(2, (16, 20))
        expected = F.interpolate(scores, (250, 310), mode="bilinear")
        torch.testing.assert_close(model.logits(image), expected, rtol=1e-4, atol=1e-4)
    assert set(model.backbone.state_dict()) == {f"net.{name}" for name in model.backbone.net.state_dict()}


@pytest.mark.parametrize("net", [VIT, "deit"])
def test_several_blocks_are_concatenated(net):
    model = build("linear", net, model__args={"out_indices": [1, 3]})
    assert model.backbone.channels == [192, 192] and model.decode_head.classifier.in_channels == 384
    assert model.logits(torch.randn(1, 3, 50, 62)).shape == (1, CLASSES, 50, 62)


def test_coarse_maps_are_resized_to_the_first():
    maps = pyramid((2, 3), 6, 9)
    head = stir(LinearHead((2, 3), 4)).eval()
    joined = torch.cat([maps[0], F.interpolate(maps[1], (6, 9), mode="bilinear")], 1)
    torch.testing.assert_close(head(maps), head.classifier(head.norm(joined)))


@pytest.mark.parametrize("channels", [(8,), (8, 12, 16, 24, 32)])
def test_the_light_decoder_takes_any_number_of_maps_of_any_size(channels):
    head = stir(FPNLiteHead(channels, 5, channels=16, dropout=0.0))
    maps = pyramid(channels, 27, 38)
    logits = head(maps)
    assert logits.shape == (2, 5, 27, 38)
    assert without_gradient(head, logits.square().sum()) == set()


def test_the_light_decoder_sums_the_levels():
    head = stir(FPNLiteHead((4, 4), 3, channels=8)).eval()
    # A coarse map of one value at all places changes all sums by the same vector.
    fine, coarse = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 1, 1)
    first, second = head.laterals
    shift = second(coarse.expand(1, 4, 3, 4))[:, :, :1, :1]
    expected = head.classifier(head.smooth(first(fine) + shift))
    torch.testing.assert_close(head([fine, coarse.expand(1, 4, 3, 4)]), expected)
