"""Generalised-mean pooling against its definition in loops, and in nets of timm's and ours."""

from typing import Any

import pytest
import torch

from models.factory import build


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("resnet10t", {}),
        # Its maps are (B, H, W, C).
        ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": (1, 1, 1, 1)}),
        ("swin_nano", {"depths": (1, 1), "heads": (1, 1)}),
    ],
)
def test_features_are_power_means_of_the_map(name, args):
    torch.manual_seed(0)
    net: Any = build(name, (64, 64), num_classes=3, global_pool="gem", **args).eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps, scores = net.forward_features(image), net(image)
        features = net.forward_head(maps, pre_logits=True)
    maps = maps.movedim(-1, 1) if "patch4" in name else maps
    expected = torch.zeros_like(features, dtype=torch.float64)
    for b in range(2):
        for c in range(maps.shape[1]):
            values = [max(float(value), 1e-6) for value in maps[b, c].flatten()]
            expected[b, c] = (sum(value**3 for value in values) / len(values)) ** (1 / 3)
    torch.testing.assert_close(features.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores, net.get_classifier()(features))
    assert build(name, (64, 64), num_classes=3, **args).state_dict().keys() == net.state_dict().keys()


def test_nets_without_average_pooling_are_refused():
    with pytest.raises(ValueError, match="VisionTransformer has no layer of global average pooling"):
        build("vit_tiny_patch16_224", num_classes=3, global_pool="gem", depth=1)
