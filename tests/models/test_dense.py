"""Tests of `DenseBackbone` over our nets and timm's."""

from typing import Any

import pytest
import timm
import torch

from models import DenseBackbone, load_weights
from retinue.utils.arithmetic import ceil_div
from tests.models.test_backbones import EVERY, NAMES, few_blocks

TIMM_NETS = [
    # A convolutional net for any image size, windows, one stride for all blocks, and nets for multiples of 32 pixels.
    *("resnet18", "swin_tiny_patch4_window7_224", "test_vit", "test_efficientnet", "test_convnext"),
    # Nets of the papers.
    *("davit_tiny", "maxvit_tiny_tf_224", "focalnet_tiny_srf", "efficientvit_m0", "shvit_s1"),
    *("mambaout_femto", "ghostnetv2_100", "halonet26t"),
]
SMALL = {
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1), "embed_dim": 32, "num_heads": (1, 2, 4, 8)},
    "maxvit_tiny_tf_224": {"depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64)},
    **{name: {"depths": (1, 1, 1, 1)} for name in ("davit_tiny", "mambaout_femto")},
}


def build(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    small = few_blocks(name, 1) if name in NAMES else SMALL.get(name, {})
    return DenseBackbone(name, **small | kwargs)


@pytest.mark.parametrize("name", [*EVERY, *TIMM_NETS])
def test_every_unfrozen_parameter_gets_a_gradient_for_any_image_size(name):
    net = build(name)
    size = (66, 101)
    maps = net(torch.randn(2, 3, *size))
    levels = zip(net.channels, net.strides, strict=True)
    expected = [(2, channels, ceil_div(size[0], stride), ceil_div(size[1], stride)) for channels, stride in levels]
    assert [tuple(m.shape) for m in maps] == expected and isinstance(maps, tuple) and len(maps) <= 4
    torch.stack([m.square().sum() for m in maps]).sum().backward()
    assert [key for key, p in net.named_parameters() if (p.grad is None) == p.requires_grad] == []
    net.set_grad_checkpointing()


def test_an_image_is_padded_to_the_multiple_and_its_maps_cropped():
    net = build("swin_tiny_patch4_window7_224").eval()
    assert net.multiple == 4 and build("test_convnext").multiple == 32
    x = torch.randn(1, 3, 65, 70)
    padded_maps = net.net.forward_intermediates(torch.nn.functional.pad(x, (0, 2, 0, 3)), intermediates_only=True)
    assert [m.shape[2:] for m in padded_maps] == [(17, 18), (9, 9), (5, 5), (3, 3)]
    for cropped, padded, stride in zip(net(x), padded_maps, net.strides, strict=True):
        assert torch.equal(cropped, padded[..., : ceil_div(65, stride), : ceil_div(70, stride)])


def test_zeros_complete_the_patches_of_focalnet_in_each_stage():
    net, x = build("focalnet_tiny_srf").eval(), torch.randn(1, 3, 65, 70)
    assert net.multiple == 1
    for m, map_of_padded_image in zip(net(x), net(torch.nn.functional.pad(x, (0, 2, 0, 3))), strict=True):
        assert torch.equal(m, map_of_padded_image)


def test_stages_after_the_chosen_maps_are_removed():
    net, whole = build("swin_nano", out_indices=(0, 2)), build("swin_nano")
    assert net.strides == [2, 8] and net.channels == [32, 128] and len(net.net.stages) == 3
    load_weights(net, whole.state_dict())
    x = torch.randn(1, 3, 32, 32)
    for chosen, expected in zip(net(x), whole(x)[::2], strict=True):
        assert torch.equal(chosen, expected)


def test_norms_change_the_maps_but_not_the_input_of_the_next_stage():
    plain, normed = build("biformer_nano").eval(), build("biformer_nano", norms=True).eval()
    done = load_weights(normed, plain.state_dict())
    assert done.missing == [f"norms.{i}.{kind}" for i in range(4) for kind in ("weight", "bias")]
    x = torch.randn(1, 3, 32, 32)
    for m, n in zip(plain(x), normed(x), strict=True):
        width = m.shape[1]
        assert torch.allclose(
            n, torch.nn.functional.layer_norm(m.movedim(1, -1), (width,), eps=1e-6).movedim(-1, 1), atol=1e-5
        )
    # The maps' norms have the epsilon of the net's norms.
    assert build("swin_nano", norms=True).norms[0].eps == 1e-5


def test_a_classifiers_weights_load_without_those_of_removed_parts():
    classifier: Any = timm.create_model("swin_nano", depths=(1, 1, 1, 1), num_classes=9)
    net = build("swin_nano", norms=True, out_indices=(0, 1))
    done = load_weights(net, {"model": classifier.state_dict()})
    assert torch.equal(net.net.stages[1].blocks[0].mlp.fc1.weight, classifier.stages[1].blocks[0].mlp.fc1.weight)
    assert {"net.head.weight", "net.norm.weight", "net.stages.3.downsample.norm.weight"} <= set(done.dropped)
    assert done.missing == [f"norms.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")] and not done.unexpected
    with pytest.raises(ValueError, match="1 missing"):
        load_weights(net, {k: v for k, v in classifier.state_dict().items() if k != "stages.0.downsample.0.weight"})


@pytest.mark.parametrize("style", ["norm{}", "outnorm{}", "extra_norms.{}", "norm{} from 1"])
def test_the_weights_of_the_authors_dense_backbones_load(style):
    net = build("swin_nano", norms=True, out_indices=(1, 3))
    state = {
        f"backbone.{key.removeprefix('net.')}": v for key, v in net.state_dict().items() if not key.startswith("norms")
    }
    pattern, _, start = style.partition(" from ")
    for stage in range(4):
        for kind in ("weight", "bias"):
            norm = torch.full((32 * 2**stage,), float(stage))
            state[f"backbone.{pattern.format(stage + int(start or 0))}.{kind}"] = norm
    done = load_weights(net, {"state_dict": state | {"decode_head.conv_seg.weight": torch.ones(1)}})
    assert not done.missing and not done.unexpected and done.dropped == ["decode_head.conv_seg.weight"]
    assert [norm.weight[0].item() for norm in net.norms] == [1.0, 3.0]


def test_nets_without_a_pyramid_and_wrong_arguments_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"crossvit_9_240 has no pyramid of maps: its strides are \[12, 17\]"):
        DenseBackbone("crossvit_9_240", out_indices=(0, 1))
    with pytest.raises(ValueError, match=r"no net is called 'swin_tinny'\. Did you mean 'swin_tiny'"):
        DenseBackbone("swin_tinny")
    with pytest.raises(ValueError, match=r"resnet18 has maps 0 to 4, so out_indices cannot be \[1, 5\]"):
        DenseBackbone("resnet18", out_indices=(1, 5))
    with pytest.raises(ValueError, match=r"swin_nano takes no argument 'windw'\. Did you mean 'window'"):
        DenseBackbone("swin_nano", windw=4)


def test_a_net_that_takes_one_image_size_refuses_another():
    # This net has a learned bias for each pair of patches.
    net = DenseBackbone("test_vit_relpos", img_size=64)
    assert net.only_size == (64, 64) and net(torch.randn(1, 3, 64, 64))[0].shape[2:] == (4, 4)
    with pytest.raises(ValueError, match=r"images of \(64, 64\) pixels only, not \(64, 80\)"):
        net(torch.randn(1, 3, 64, 80))


def test_image_size_is_left_out_for_nets_without_one():
    net = build("resnet18", img_size=64, in_chans=1)
    assert net.multiple == 1 and len(net(torch.randn(1, 1, 30, 40))) == 4
    assert build("swin_nano", img_size=64).strides == [2, 4, 8, 16]


def test_the_last_map_of_a_plain_net_becomes_a_pyramid():
    net = build("deit_tiny", simple_pyramid=True)
    assert net.strides == [4, 8, 16, 32] and net.channels == [48, 96, 192, 192]
    x = torch.randn(2, 3, 66, 101)
    maps = net(x)
    assert [tuple(m.shape[2:]) for m in maps] == [(ceil_div(66, s), ceil_div(101, s)) for s in net.strides]
    torch.stack([m.square().sum() for m in maps]).sum().backward()
    assert [key for key, p in net.named_parameters() if (p.grad is None) == p.requires_grad] == []
    # The level of the net's own stride is the last map itself, and the next level its maxima.
    last = net.net.forward_intermediates(x, indices=1, intermediates_only=True)[0]
    assert torch.equal(maps[2], last)
    assert torch.equal(maps[3], torch.nn.functional.max_pool2d(last, 2, ceil_mode=True))
    assert build("deit_tiny", simple_pyramid=True, min_stride=8).strides == [8, 16, 32]
    assert build("deit_tiny").strides == [16]
    assert build("swin_nano", simple_pyramid=True).strides == [2, 4, 8, 16]


def test_each_level_reads_the_map_of_one_block():
    net = build("deit_tiny", simple_pyramid=True, out_indices=(0, 1, 2, 3)).eval()
    x = torch.randn(1, 3, 64, 64)
    blocks = net.net.forward_intermediates(x, intermediates_only=True)
    assert torch.equal(net(x)[2], blocks[2])
    assert torch.equal(net(x)[3], torch.nn.functional.max_pool2d(blocks[3], 2))
    with pytest.raises(ValueError, match="out_indices must name 1 or 4 maps of a plain net, not 2"):
        build("deit_tiny", simple_pyramid=True, out_indices=(1, 3))


def test_weights_of_a_classifier_with_a_class_token_load_into_windowed_blocks():
    classifier: Any = timm.create_model("deit_tiny", depths=(4,))
    mixers = [["plain_window", "full"]]
    net = build("deit_tiny", simple_pyramid=True, mixers=mixers)
    assert [type(block.mixer).__name__ for block in net.net.blocks][:2] == ["PlainWindowAttention", "FullAttention"]
    done = load_weights(net, classifier.state_dict())
    assert "net.cls_token" in done.dropped and all(key.startswith("pyramid.") for key in done.missing)
    assert torch.equal(net.net.blocks[0].mixer.qkv.weight, classifier.blocks[0].mixer.qkv.weight)


def test_detectron2s_names_of_a_plain_net_and_its_pyramid_load():
    net = build("vitdet_base", simple_pyramid=True, dim=48, heads=3, map_size=8)
    authors = {}
    for key, value in net.state_dict().items():
        key = key.replace(".mixer.", ".attn.").replace("pyramid.levels.0.", "simfp_2.").replace("levels.1.", "simfp_3.")
        authors["backbone." + key.removeprefix("pyramid.")] = value + 1
    # The position of a class token, the convolutions after the pyramid, and the rest of a detector
    authors["backbone.net.pos_embed"] = torch.randn(1, 197, 48)
    authors["backbone.simfp_2.4.weight"] = authors["backbone.simfp_5.1.norm.weight"] = torch.ones(3)
    authors["proposal_generator.rpn_head.conv.weight"] = torch.ones(3)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    done = load_weights(net, {"model": authors})
    assert not done.missing and not done.unexpected and done.resized == ["net.pos_embed"]
    assert all(torch.equal(net.state_dict()[key], before[key] + 1) for key in before if key != "net.pos_embed")
    assert [block.mixer.window for block in net.net.blocks] == [0, 0, 0, 0]
    windows = [block.mixer.window for block in DenseBackbone("vitdet_base", dim=48, heads=3).net.blocks]
    assert windows == [14, 14, 0] * 4
