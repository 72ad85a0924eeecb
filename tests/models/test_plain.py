"""ViT-shaped nets: class token, positions, tables of another size, shared contexts."""

from typing import Any

import pytest
import timm
import torch

from models import load_weights
from ops.registry import _OPS, FIRST
from tests.models.test_backbones import build


def test_deit_computes_what_timms_deit_computes():
    torch.manual_seed(0)
    timm_net: Any = timm.create_model("deit_tiny_patch16_224", depth=2, num_classes=5).eval()
    net = build("deit_tiny", depths=(2,), num_classes=5).eval()
    result = load_weights(net, {"model": timm_net.state_dict()})
    assert len(result.loaded) == len(timm_net.state_dict()) and not any(result[1:])
    x = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        assert torch.allclose(net(x), timm_net(x), atol=1e-6)
        for a, b in zip(net.forward_intermediates(x)[1], timm_net.forward_intermediates(x)[1], strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_a_distillation_token_computes_what_timms_does():
    torch.manual_seed(0)
    timm_net: Any = timm.create_model("deit_tiny_distilled_patch16_224", depth=2, num_classes=5).eval()
    net = build("deit_tiny_distilled", depths=(2,), num_classes=5).eval()
    result = load_weights(net, {"model": timm_net.state_dict()})
    assert len(result.loaded) == len(timm_net.state_dict()) and not any(result[1:])
    x = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        assert torch.allclose(net(x), timm_net(x), atol=1e-6)
        assert torch.allclose(
            net.forward_head(net.forward_features(x), pre_logits=True),
            timm_net.forward_head(timm_net.forward_features(x), pre_logits=True),
            atol=1e-5,
        )
    for each in (net, timm_net):
        each.train().set_distilled_training()
    for ours, theirs in zip(net(x), timm_net(x), strict=True):
        assert ours.shape == (2, 5) and torch.allclose(ours, theirs, atol=1e-5)
    assert net.no_weight_decay() >= {"pos_embed", "cls_token", "dist_token"}


def test_weights_with_a_distillation_token_load_elsewhere():
    state = build("deit_tiny_distilled", num_classes=3).state_dict()
    windows = build("deit_tiny", mixers="window", num_classes=3)
    assert "dist_token" in load_weights(windows, state, strict=False).dropped
    assert torch.equal(windows.pos_embed, state["pos_embed"][:, 2:])
    with pytest.raises(ValueError, match="dist_token"):
        load_weights(build("deit_tiny", num_classes=3), state)
    other = build("deit_tiny_distilled", num_classes=7, img_size=64)
    result = load_weights(other, state, drop_classifier=True)
    assert result.resized == ["pos_embed"]
    assert set(result.dropped) == {f"{head}.{part}" for head in ("head", "head_dist") for part in ("weight", "bias")}
    with pytest.raises(ValueError, match="distilled needs a class token"):
        build("deit_tiny", distilled=True, class_token=False)


def test_a_class_token_needs_ops_that_take_extra_tokens():
    x = torch.randn(2, 3, 40, 50)
    net = build("deit_tiny", mixers=[["full", "agent"]], num_classes=3)
    assert net.cls_token is not None and net.forward_features(x).shape == (2, 1 + 3 * 4, 192)
    assert [block.mixer.takes_extra for block in net.blocks] == [True] * 4
    assert net.blocks[1].mixer.ac_bias.shape == (3, 49, 1)
    for kwargs in ({"mixers": [["full", "window"]]}, {"class_token": False}):
        net = build("deit_tiny", num_classes=3, **kwargs)
        assert net.cls_token is None and net.no_weight_decay() >= {"pos_embed"} and net.global_pool.kind == "avg"
        features = net.forward_features(x)
        assert features.shape == (2, 3 * 4, 192) and torch.equal(net(x), net.head(features.mean(1)))
    with pytest.raises(ValueError, match="global_pool must be avg or '', not 'token'"):
        build("deit_tiny", mixers="window", global_pool="token")


def test_wrong_depths_and_mixers_are_refused():
    with pytest.raises(ValueError, match="depths must be one number of blocks"):
        build("deit_tiny", depths=(2, 2))
    with pytest.raises(ValueError, match="one for each of 1 stages, not 2"):
        build("deit_tiny", mixers=["full", "agent"])


@pytest.mark.parametrize("name", ["deit_tiny", "agent_deit_tiny", "pvt_tiny", "agent_pvt_tiny", "agent_swin_tiny"])
def test_tables_of_another_size_are_interpolated_on_loading_as_in_the_forward_pass(name):
    net_224 = build(name, num_classes=3).eval()
    net = build(name, num_classes=3, img_size=(96, 128)).eval()
    result = load_weights(net, net_224.state_dict())
    assert result.resized and not any((result.missing, result.unexpected, result.dropped))
    x = torch.randn(1, 3, 96, 128)
    with torch.inference_mode():
        assert torch.allclose(net(x), net_224(x), atol=1e-5)


def test_positions_of_a_missing_class_token_are_dropped():
    torch.manual_seed(0)
    with_token = build("deit_tiny", num_classes=3)
    state = {key: value for key, value in with_token.state_dict().items() if key != "cls_token"}
    net = build("deit_tiny", num_classes=3, class_token=False)
    assert load_weights(net, state).resized == ["pos_embed"]
    assert torch.equal(net.pos_embed, with_token.pos_embed[:, 1:])
    with pytest.raises(ValueError, match="pos_embed"):
        load_weights(with_token, net.state_dict())


def test_blocks_share_a_context(monkeypatch):
    class Scaled(torch.nn.Module):
        def __init__(self, dim, num_heads, *, place=FIRST):
            super().__init__()

        @staticmethod
        def make_context(place, dim, num_heads):
            return torch.nn.Linear(dim, dim)

        def forward(self, x, context):
            return x * context

    monkeypatch.setitem(_OPS, "scaled", Scaled)
    net = build("deit_tiny", mixers=[["scaled", "window"]], num_classes=3)
    calls = []
    net.contexts[0].register_forward_hook(lambda *_: calls.append(1))
    net(torch.randn(2, 3, 64, 64)).sum().backward()
    assert len(net.contexts) == len(calls) == 1 and net.contexts[0].weight.grad.any()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("deit_tiny_distilled", {}), ("deit_tiny", {"mixers": "window"}), ("fan_tiny", {}),
     ("path_ensemble_tiny", {"self_distillation": True})],
)  # fmt: skip
def test_a_teachers_tokens_are_compared_with_those_of_the_map(name, arguments):
    net, x = build(name, num_classes=3, **arguments).eval(), torch.randn(2, 3, 64, 64)
    target = torch.randn(2, 16, 192)
    tokens = net.forward_features(x)[:, -16:]
    loss = net.forward_with_losses(x, target)[1]["tokens"]
    assert torch.allclose(loss, (tokens - target).square().mean(), atol=1e-5)
