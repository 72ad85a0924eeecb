"""FAN: its last blocks on a smaller map."""

import pytest
import torch

from tests.models.test_backbones import build

TAIL = {"dim": 48, "heads": 2, "depths": (3,), "tail": (1, 64, 4), "patch": 8}


def test_the_tail_reads_a_map_of_half_the_resolution():
    net = build("fan_tiny", num_classes=3, **TAIL).eval()
    x = torch.randn(2, 3, 40, 56)
    with torch.inference_mode():
        first, second, third = net.forward_intermediates(x, intermediates_only=True)
    assert [level["reduction"] for level in net.feature_info] == [8, 16, 16]
    assert (first.shape[1:], second.shape[1:]) == ((48, 5, 7), (64, 3, 4)) and third.shape == second.shape
    block, tokens = net.blocks[1], first.flatten(2).transpose(1, 2)
    downsample, block.downsample = block.downsample, None
    with torch.inference_mode():
        before = block(tokens, (5, 7)).transpose(1, 2).unflatten(2, (5, 7))
        expected = downsample.norm(downsample.proj(before).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.allclose(second, expected, atol=1e-5)


@pytest.mark.parametrize(("tail", "mixers"), [((3, 64, 4), None), ((1, 64, 4), "aggregated")])
def test_a_tail_of_all_blocks_or_with_a_context_is_refused(tail, mixers):
    with pytest.raises(ValueError, match="the tail must be fewer blocks than the net has, of ops that need no context"):
        build("fan_tiny", **TAIL | {"tail": tail, "mixers": mixers})
