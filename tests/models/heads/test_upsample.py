"""Window attention upsample equals its definition as loops, and U-Net and the pyramid that use it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models import load_weights
from models.heads.upsample import (
    HEAD_DIM,
    UPSAMPLERS,
    PatchExpand,
    WindowAttentionUpsample,
    create_upsample,
)
from models.heads.wau import UNetHead, WAUPyramid
from models.openmmlab.interface import DensePredictor
from ops.functional import map_attention
from retinue.utils.arithmetic import ceil_div
from tests.models.heads import pyramid, sides, stir, without_gradient

CHANNELS = (8, 12, 16, 24)


def wau(skip_dim: int = 40, deep_dim: int = 24, window: int = 3) -> Any:
    torch.manual_seed(0)
    return stir(WindowAttentionUpsample(skip_dim, deep_dim, window)).double()


def maps(H: int, W: int, skip_dim: int = 40, deep_dim: int = 24, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    skip = torch.randn(batch, skip_dim, H, W, dtype=torch.float64)
    return skip, torch.randn(batch, deep_dim, ceil_div(H, 2), ceil_div(W, 2), dtype=torch.float64)


@pytest.mark.parametrize("size", [(12, 18), (9, 7), (3, 2)])
def test_wau_is_what_its_definition_says(size):
    """Loop over queries and keys; the windows of (9, 7) reach beyond the map, those of (3, 2) shrink."""
    (H, W), net = size, wau(skip_dim=64)
    skip, deep = maps(H, W, skip_dim=64, batch=1)
    h, w = deep.shape[2:]
    q = net.q(net.norm_skip(skip[0].permute(1, 2, 0)))
    k, v = net.kv(net.norm_deep(deep[0].permute(1, 2, 0))).chunk(2, dim=-1)
    attended = torch.zeros_like(q)
    window_h, window_w = min(3, h), min(3, w)
    for y in range(H):
        for x in range(W):
            top, left = y // 2 // window_h * window_h, x // 2 // window_w * window_w
            keys = [(j, i) for j in range(top, top + window_h) for i in range(left, left + window_w) if j < h and i < w]
            for head in range(2):
                part = slice(HEAD_DIM * head, HEAD_DIM * (head + 1))
                scores = torch.stack(
                    [
                        q[y, x, part] @ k[j, i, part] / HEAD_DIM**0.5
                        # Offset 0 is the fifth row of the table, since offsets begin at -2 * (3 - 1).
                        + net.position_bias[
                            head, (y - 2 * top) - 2 * (j - top) + 4, (x - 2 * left) - 2 * (i - left) + 4
                        ]
                        for j, i in keys
                    ]
                )
                weights = scores.softmax(0)
                attended[y, x, part] = sum(a * v[j, i, part] for a, (j, i) in zip(weights, keys, strict=True))
    out = skip[0].permute(1, 2, 0) + net.proj(attended)
    out = (out + net.mlp(net.norm_mlp(out))).permute(2, 0, 1)
    bilinear = F.interpolate(net.project(deep), scale_factor=2, mode="bilinear")[0, :, :H, :W]
    assert torch.allclose(net(skip, deep)[0], out + bilinear, atol=1e-10)


def test_a_window_as_large_as_the_map_is_attention_to_all_positions():
    net = wau(window=8)
    torch.nn.init.zeros_(net.position_bias)
    skip, deep = maps(16, 10)
    q, (k, v) = net.q(skip.permute(0, 2, 3, 1)), net.kv(deep.permute(0, 2, 3, 1)).chunk(2, dim=-1)
    out = net.attend(q, torch.cat((k, v), dim=-1))
    assert torch.allclose(out, map_attention(q, k, v, net.num_heads), atol=1e-12)


def test_windows_do_not_see_each_other():
    net = wau(window=2)
    q, kv = (
        torch.randn(1, side, side, width, dtype=torch.float64) for side, width in ((8, HEAD_DIM), (4, 2 * HEAD_DIM))
    )
    changed = kv.clone()
    changed[:, :2, 2:] += torch.randn(2 * HEAD_DIM)
    difference = (net.attend(q, kv) - net.attend(q, changed)).abs().amax((0, 3)) > 1e-9
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:4, 4:] = True
    assert torch.equal(difference, expected)


def test_without_attention_wau_adds_bilinear_upsampling_to_the_skip_map():
    net = wau()
    for layer in (net.proj, net.mlp.fc2):
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)
    skip, deep = maps(9, 14)
    upsampled = F.interpolate(deep, scale_factor=2, mode="bilinear")[..., :9, :14]
    assert torch.allclose(net(skip, deep), skip + net.project(upsampled), atol=1e-12)


def test_patch_expansion_places_channels_in_squares():
    net, deep = PatchExpand(3, 5).eval(), torch.randn(1, 5, 2, 3)
    expanded = net.expand(deep)
    out = net(torch.zeros(1, 3, 3, 6), deep)
    for y in range(3):
        for x in range(6):
            vector = expanded[0, :, y // 2, x // 2].view(3, 4)[:, 2 * (y % 2) + x % 2]
            assert torch.allclose(out[0, :, y, x], F.layer_norm(vector, (3,), eps=1e-6), atol=1e-6)


@pytest.mark.parametrize("upsample", UPSAMPLERS)
@pytest.mark.parametrize("image", [(250, 310), (40, 33)])
def test_unet_trains_every_weight_with_one_image_of_any_size(upsample, image):
    torch.manual_seed(0)
    head = stir(UNetHead(CHANNELS, 5, channels=(16, 24, 32, 40), upsample=upsample))
    size = tuple(ceil_div(side, 4) for side in image)
    logits = head(pyramid(CHANNELS, *size, batch=1))
    assert logits.shape == (1, 5, *size)
    assert not without_gradient(head, logits.square().mean())


@pytest.mark.parametrize(("levels", "outs"), [(3, 5), (4, 4), (1, 2)])
def test_pyramid_trains_every_weight_with_maps_of_any_size(levels, outs):
    torch.manual_seed(0)
    neck = stir(WAUPyramid(CHANNELS[:levels], 32, outs))
    levels_out = neck(pyramid(CHANNELS[:levels], 27, 38))
    assert [tuple(m.shape) for m in levels_out] == [(2, 32, *side) for side in sides(27, 38, outs)]
    assert not without_gradient(neck, torch.stack([m.square().sum() for m in levels_out]).sum())


def test_half_precision_is_close_to_single_precision():
    torch.manual_seed(0)
    head, levels = stir(UNetHead(CHANNELS, 5, channels=(16, 24, 32, 40))).eval(), pyramid(CHANNELS, 21, 28)
    with torch.no_grad():
        exact = head(levels)
        with torch.autocast("cpu", torch.bfloat16):
            half = head(levels)
    assert F.mse_loss(half.float(), exact).sqrt() < 0.05 * exact.std()


def test_biases_of_positions_have_no_weight_decay():
    names = [f"decode_head.{name}" for name, _ in UNetHead(CHANNELS, 5, channels=(16, 24, 32, 40)).named_parameters()]
    undecayed = [name for name in names if DensePredictor.undecayed.search(name)]
    assert undecayed == [f"decode_head.upsamples.{i}.position_bias" for i in range(3)]


def test_saved_weights_load():
    head, other = (UNetHead(CHANNELS, 5, channels=(16, 24, 32, 40)) for _ in range(2))
    loaded = load_weights(other, head.state_dict())
    assert not loaded.missing and not loaded.unexpected
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), other.parameters(), strict=True))


def test_unfitting_arguments_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"upsample must be bilinear, expand, wau, not 'wu'\. Did you mean 'wau'\?"):
        create_upsample("wu", 8, 8)
    with pytest.raises(ValueError, match=r"channels must be 4 widths, one for each map, not \[8, 8\]$"):
        UNetHead(CHANNELS, 5, channels=(8, 8))
    with pytest.raises(ValueError, match=r"a pyramid of 4 maps returns at least 4, not num_outs=3$"):
        WAUPyramid(CHANNELS, 8, 3)
    with pytest.raises(ValueError, match=r"window must be at least 1, not 0$"):
        WindowAttentionUpsample(8, 8, window=0)
