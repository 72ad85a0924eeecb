"""LITv2's deformable downsampling, and its stages without attention."""

from typing import Any

import pytest
import timm
import torch

from models import complexity
from models.backbones.litv2 import DeformableMerging


def test_merging_samples_where_the_offsets_point():
    torch.manual_seed(0)
    merging = DeformableMerging(3, 5, crop_odd=False).double()
    x = torch.randn(1, 3, 8, 10, dtype=torch.float64)
    plain = torch.nn.functional.conv2d(x, merging.weight, merging.bias, stride=2)
    # Offsets are initialised to zeros.
    assert torch.allclose(merging(x), plain)
    with torch.no_grad():
        # Two rows down, no columns, for each of the four samples.
        merging.offset.get_parameter("bias").copy_(torch.tensor([2.0, 0, 2, 0, 2, 0, 2, 0]))
    assert torch.allclose(merging(x)[:, :, :-1], plain[:, :, 1:])
    # The samples of the last row are outside of the map, where all values are zeros.
    bias_alone = merging.bias.view(1, 5, 1).expand(1, 5, 5)
    assert torch.allclose(merging(x)[:, :, -1], bias_alone)


@pytest.mark.parametrize(("crop_odd", "size"), [(False, (4, 5)), (True, (3, 4))])
def test_odd_sides_are_padded_or_cropped(crop_odd, size):
    merging = DeformableMerging(3, 5, crop_odd)
    assert merging(torch.randn(1, 3, 7, 9)).shape[2:] == size
    assert merging.bfloat16()(torch.randn(1, 3, 7, 9).bfloat16()).dtype == torch.bfloat16
    assert complexity(merging, 8)[1] == 4 * 4 * (5 + 8) * 3 * 4


def kinds(net: Any) -> list[str]:
    """Return the names of the classes of all blocks' mixers."""
    return [type(block.mixer).__name__ for stage in net.stages for block in stage.blocks]


def test_first_stages_have_no_attention_unless_mixers_say_so():
    arguments = {"dim": 16, "depths": (1, 1, 2, 1), "heads": (1, 2, 4, 4), "num_classes": 2}
    assert kinds(timm.create_model("litv2_small", **arguments)) == ["NoneType"] * 2 + ["HiLoAttention"] * 3
    net = timm.create_model("litv2_small", mixers="window", **arguments)
    assert kinds(net) == ["NoneType"] * 2 + ["WindowAttention"] * 3
    net = timm.create_model("litv2_small", mixers=[None, "full", ["window", "full"], "hilo"], **arguments)
    assert kinds(net) == ["NoneType", "FullAttention", "WindowAttention", "FullAttention", "HiLoAttention"]
    assert net(torch.randn(2, 3, 33, 45)).shape == (2, 2)
