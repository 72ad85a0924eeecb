"""The class token of PVT's last stage, and other ops' weights in PVT's layout."""

import torch

from models import DenseBackbone, load_weights
from tests.models.test_backbones import build


def test_the_class_token_is_read_by_the_classifier_and_left_out_of_maps():
    net, x = build("pvt_tiny", num_classes=3).eval(), torch.randn(1, 3, 64, 96)
    features, maps = net.forward_intermediates(x)
    assert features.shape == (1, 1 + 2 * 3, 512) and torch.equal(net(x), net.head(features[:, 0]))
    dense = DenseBackbone("pvt_tiny", depths=(2, 1, 1, 1)).eval()
    result = load_weights(dense, net.state_dict())
    assert {"net.cls_token", "net.norm.weight", "net.head.weight"} <= set(result.dropped) and not result.missing
    for dense_map, intermediate in zip(dense(x), maps, strict=True):
        assert torch.equal(dense_map, intermediate)
    scores = net(x)
    torch.nn.init.normal_(net.cls_token)
    assert not torch.equal(net(x), scores)
    assert torch.equal(net.forward_intermediates(x)[1][-1], maps[-1])


def test_queries_keys_and_values_are_joined_for_ops_that_project_them_together():
    source = build("pvt_tiny", num_classes=3)
    net = build("pvt_tiny", num_classes=3, mixers=[*["spatial_reduction"] * 3, "full"])
    assert not any(load_weights(net, source.state_dict())[1:])
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(net.eval()(x), source.eval()(x), atol=1e-5)
