"""RCNet's neck equals the authors' code, takes maps of any size and starts as its docstrings say."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import load_weights
from models.heads.rcnet import Balance, DeformableConv, Guide, Node, RCNet, shift
from tests.models.heads import assert_matches, pyramid, sides, stir, without_gradient
from tests.vectors.claims import HEADS


@pytest.mark.parametrize("name", [name for name in HEADS if name.startswith("rcnet__")])
def test_matches_the_authors_code(name):
    assert_matches(name, HEADS[name])


@pytest.mark.parametrize(("channels", "outs"), [((8, 12, 16), 5), ((8, 12, 16, 24), 5), ((8, 12), 2)])
def test_every_weight_is_trained_with_maps_of_any_size(channels, outs):
    torch.manual_seed(0)
    neck = stir(RCNet(channels, 32, outs))
    maps = neck(pyramid(channels, 27, 38))
    assert [tuple(m.shape) for m in maps] == [(2, 32, *side) for side in sides(27, 38, outs)]
    untrained = without_gradient(neck, torch.stack([m.square().sum() for m in maps]).sum())
    # These biases add the same number to all scores of a softmax.
    assert all(name.endswith(("guide.conv.bias", "score.bias")) for name in untrained), untrained


def test_channels_are_shifted_between_levels():
    levels = 5
    x = torch.arange(levels).view(1, levels, 1, 1, 1) + torch.arange(32).view(1, 1, 32, 1, 1) / 100
    x = x.expand(2, levels, 32, 3, 4)
    y = shift(x)
    # Each of the four shifts moves 2 of the 32 channels.
    assert y.shape == (2, levels, 8, 3, 4)
    for channel in range(8):
        source = (1, -1, 2, -2)[channel // 2]
        for level in range(levels):
            assert torch.equal(y[:, level, channel], x[:, (level + source) % levels, channel])


def test_guide_weights_have_a_mean_of_one():
    torch.manual_seed(0)
    guide, (x, y) = Guide(16), torch.randn(2, 3, 16, 5, 7)
    assert torch.allclose(guide(x, y), torch.ones(3, 1, 5, 7))
    weights = stir(guide)(x, y)
    assert torch.allclose(weights.mean((1, 2, 3)), torch.ones(3), atol=1e-6) and weights.std() > 0.01
    scores = guide.temperature * guide.conv(torch.cat((x, y), 1)) / 4
    assert torch.allclose(
        weights.log() - weights.log().mean((2, 3), True), scores - scores.mean((2, 3), True), atol=1e-5
    )


def test_balance_is_between_zero_and_one_and_starts_as_one_half():
    torch.manual_seed(0)
    balance, (x, y) = Balance(16), torch.randn(2, 3, 16, 5, 7)
    assert torch.equal(balance(x, y), torch.full((3, 1, 1, 1), 0.5))
    weight = stir(balance)(x, y)
    assert ((weight > 0) & (weight < 1)).all() and weight.std() > 0
    # The weight depends on the means only.
    assert torch.allclose(weight, balance(x.mean((2, 3), True), y.mean((2, 3), True)))


def test_a_node_starts_by_averaging_its_inputs():
    torch.manual_seed(0)
    node: Any = Node(16, above=True, below=True)
    node.between = node.out = nn.Identity()
    below, x, above = pyramid((16, 16, 16), 12, 8)
    upsampled = F.interpolate(above, scale_factor=2, mode="bilinear")
    expected = 0.5 * (0.5 * x + 0.5 * upsampled) + 0.5 * F.max_pool2d(below, 2)
    assert torch.allclose(node(x, above, below), expected, atol=1e-6)


def test_deformable_convolution_starts_without_offsets_and_follows_them():
    torch.manual_seed(0)
    conv, x = DeformableConv(4), torch.randn(2, 4, 6, 7)
    assert torch.allclose(conv(x), 0.5 * F.conv2d(x, conv.weight, padding=1), atol=1e-6)
    bias = conv.conv_offset.get_parameter("bias")
    with torch.no_grad():
        # The sigmoid of 20 is 1: each sample counts in full.
        bias[36:] = 20.0
        # The second half of the channels is sampled one row lower.
        bias[18:36:2] = 1.0
    lower = torch.cat((x[:, :2], F.pad(x[:, 2:, 1:], (0, 0, 0, 1))), 1)
    regular = F.conv2d(lower, conv.weight, padding=1)
    assert torch.allclose(conv(x)[:, :, 1:-1], regular[:, :, 1:-1], atol=1e-5)


def test_half_precision_is_close_to_single_precision():
    torch.manual_seed(0)
    neck, maps = RCNet((8, 12, 16), 32).eval(), pyramid((8, 12, 16), 27, 38)
    with torch.no_grad():
        exact = neck(maps)
        with torch.autocast("cpu", torch.bfloat16):
            half = neck(maps)
    for half_map, exact_map in zip(half, exact, strict=True):
        assert F.mse_loss(half_map.float(), exact_map).sqrt() < 0.05 * exact_map.std()


def test_saved_weights_load():
    neck, other = RCNet((8, 12, 16), 32), RCNet((8, 12, 16), 32)
    loaded = load_weights(other, neck.state_dict())
    assert not loaded.missing and not loaded.unexpected
    assert all(torch.equal(a, b) for a, b in zip(neck.parameters(), other.parameters(), strict=True))


def test_unfitting_arguments_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"out_channels must be a multiple of 16, not 100$"):
        RCNet((8, 12, 16), 100)
    with pytest.raises(ValueError, match=r"RCNet with 3 maps returns at least 3, not num_outs=2$"):
        RCNet((8, 12, 16), 32, 2)
