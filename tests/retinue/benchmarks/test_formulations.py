"""Tests of the peers of the primitives, and of the reasons why one cannot run."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from retinue.benchmarks import formulations, peers, primitives
from retinue.benchmarks.layers import RoutedLayer
from retinue.benchmarks.primitives import PRIMITIVES
from tests.retinue.benchmarks.examples import LAYERS


@pytest.mark.skipif(torch.__version__ < "2.11", reason="torch 2.8 refuses masks that scores are read from")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_masks_and_scores_of_flex_attention():
    layer = RoutedLayer("net", 64, (8, 8), 16, 1, 1, (4, 4), 3, True)
    index = layer.index(2)
    mask = peers.routing_blocks(index, 4)
    assert isinstance(mask, BlockMask) and mask.full_kv_indices is not None
    blocks = torch.zeros(2, 16, 16).scatter(2, index, 1.0)
    assert torch.equal(mask.to_dense()[:, 0].float(), blocks)
    assert torch.equal(mask.full_kv_indices[..., :3].squeeze(1).long().sort().values, index.sort().values)
    # FlexAttention has no backward pass on the CPU.
    with torch.no_grad():
        flex = {"window_attention": peers.flex_window, "neighborhood_attention": peers.flex_neighborhood}
        for layer in LAYERS:
            if layer.primitive not in flex:
                continue
            qkv, bias, _, _ = primitives.make_inputs(layer, 1, torch.float32, "cpu")
            arguments = (qkv.detach(), None if bias is None else bias.detach(), None)
            actual = layer.attend(flex[layer.primitive], *arguments)
            assert torch.allclose(actual, layer.attend(PRIMITIVES[layer.primitive], *arguments), atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_peers_of_dilated_neighborhood_attention():
    qkv, bias = torch.randn(2, 12, 18, 24), torch.randn(2, 5, 7)
    expected = PRIMITIVES["neighborhood_attention"](qkv, bias, 2, (3, 4), (3, 4))
    for peer in (peers.gathered_neighborhood, peers.masked_neighborhood, peers.flex_neighborhood):
        assert torch.allclose(peer(qkv, bias, 2, (3, 4), (3, 4)), expected, atol=1e-5)


def test_obstacles_name_the_value():
    large = formulations.Call(1, (256, 256), "cpu", 49)
    assert "4.3e+09 entries" in str(formulations.mask_too_large(large))
    assert "not 49 tokens" in str(formulations.windows_not_in_blocks(large))
    assert formulations.too_many_pairs(large) and formulations.not_on_cuda(large)
    assert formulations.not_on_cuda(replace(large, device="cuda")) is None
