"""TransDAE's decoder equals its definition as loops and takes images of any size."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models import load_weights
from models.heads.transdae import DualAttentionBlock, EfficientAttention, InterScaleInteraction, TransDAEHead
from models.heads.upsample import UPSAMPLERS
from retinue.utils.arithmetic import ceil_div
from tests.models.heads import pyramid, stir, without_gradient

CHANNELS = (8, 12, 16, 24)
WIDTHS = (16, 24, 32, 40)


def small(**arguments: Any) -> Any:
    torch.manual_seed(0)
    return stir(TransDAEHead(CHANNELS, 5, **{"channels": WIDTHS, "depth": 1} | arguments))


@pytest.mark.parametrize("upsample", UPSAMPLERS)
@pytest.mark.parametrize("image", [(250, 310), (40, 33)])
def test_every_weight_is_trained_with_one_image_of_any_size(upsample, image):
    head = small(upsample=upsample)
    h, w = (ceil_div(side, 4) for side in image)
    logits = head(pyramid(CHANNELS, h, w, batch=1))
    assert logits.shape == (1, 5, 4 * h, 4 * w)
    assert not without_gradient(head, logits.square().mean())


def test_efficient_attention_is_what_its_definition_says():
    torch.manual_seed(0)
    net: Any = stir(EfficientAttention(6)).double()
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    q, k, v = net.qkv(x)[0].chunk(3, dim=-1)
    out = torch.zeros(5, 6, dtype=torch.float64)
    for n in range(5):
        over_channels = q[n].softmax(0)
        for m in range(5):
            weight = sum(over_channels[c] * k[m, c].exp() / k[:, c].exp().sum() for c in range(6))
            out[n] += weight * v[m]
    assert torch.allclose(net(x)[0], net.proj(out), atol=1e-12)


def test_dual_attention_is_what_its_definition_says():
    torch.manual_seed(0)
    dim, heads = 12, 3
    net: Any = stir(DualAttentionBlock(dim, heads, mlp_ratio=2)).double()
    x = torch.randn(1, dim, 3, 4, dtype=torch.float64)

    def mlp(layer: Any, tokens: torch.Tensor) -> torch.Tensor:
        hidden = layer.dwconv(layer.fc1(tokens).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return layer.fc2(F.gelu(hidden))

    y = x.permute(0, 2, 3, 1)
    y = y + net.spatial(net.norm1(y).flatten(1, 2)).view_as(y)
    y = y + mlp(net.mlp1, net.norm2(y))
    q, k, v = net.channel.qkv(net.norm3(y)).flatten(0, 2).T.chunk(3)  # (C, N)
    mixed = torch.zeros_like(v)
    for head in range(heads):
        group = range(head * 4, head * 4 + 4)
        for c in group:
            scores = torch.stack([q[c] @ k[d] / (q[c].norm() * k[d].norm()) for d in group])
            weights = (scores * net.channel.temperature[head]).flatten().softmax(0)
            mixed[c] = sum(weight * v[d] for weight, d in zip(weights, group, strict=True))
    y = y + net.channel.proj(mixed.T).view_as(y)
    y = y + mlp(net.mlp2, net.norm4(y))
    assert torch.allclose(net(x), y.permute(0, 3, 1, 2), atol=1e-10)


def test_levels_interact_at_the_size_of_the_coarsest_one():
    torch.manual_seed(0)
    net: Any = stir(InterScaleInteraction((3, 4, 6))).double()
    maps = [x.double() for x in pyramid((3, 4, 6), 12, 8, batch=1)]
    tokens = []
    for level, x in enumerate(maps):
        side = 4 // 2**level
        for row in range(3):
            for column in range(2):
                cell = x[0, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
                tokens.append(net.reduce[level](cell.mean((1, 2))) + net.level_embed[level])
    mixed = net.attn(net.norm(torch.stack(tokens)[None]))[0]
    for level, (x, y) in enumerate(zip(maps, net(maps), strict=True)):
        small_map = mixed[6 * level : 6 * level + 6].T.reshape(1, 6, 3, 2)
        added = F.interpolate(net.restore[level](small_map), x.shape[2:], mode="bilinear")
        assert torch.allclose(y, x + added, atol=1e-10)


def test_every_level_depends_on_every_map():
    head = small().eval()
    maps = [x.requires_grad_() for x in pyramid(CHANNELS, 33, 22)]
    for level in head.interaction([lateral(x) for lateral, x in zip(head.laterals, maps, strict=True)]):
        gradients = torch.autograd.grad(level.square().sum(), maps, retain_graph=True)
        assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_half_precision_is_close_to_single_precision():
    head, maps = small().eval(), pyramid(CHANNELS, 21, 28)
    with torch.no_grad():
        exact = head(maps)
        with torch.autocast("cpu", torch.bfloat16):
            half = head(maps)
    assert F.mse_loss(half.float(), exact).sqrt() < 0.05 * exact.std()


def test_saved_weights_load():
    head, other = small(), small()
    stir(other)
    loaded = load_weights(other, head.state_dict())
    assert not loaded.missing and not loaded.unexpected
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), other.parameters(), strict=True))


def test_unfitting_arguments_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"channels must be multiples of the 8 heads, not \[16, 24, 32, 41\]$"):
        TransDAEHead(CHANNELS, 5, channels=(16, 24, 32, 41))
    with pytest.raises(ValueError, match=r"channels must be 4 widths, one for each map, not \[8\]$"):
        TransDAEHead(CHANNELS, 5, channels=(8,))
