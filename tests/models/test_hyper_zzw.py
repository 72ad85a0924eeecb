"""Terminator: its slow loss, maps that are not square, and weights for another size."""

from typing import Any

import pytest
import timm
import torch

from models import load_weights


def terminator(**arguments: Any) -> Any:
    torch.manual_seed(0)
    arguments = {"dims": (12, 12, 24)} | arguments
    return timm.create_model("terminator_nano", num_classes=2, **arguments)


@torch.no_grad()
def test_the_slow_loss_compares_the_planes_of_all_pairs_of_blocks():
    net = terminator(img_size=8).eval()
    x = torch.randn(2, 3, 8, 8)
    blocks = [net.stages[0].downsample, *(stage.blocks[0] for stage in net.stages)]
    planes = [block.slow_net_g()[0].sum(0) for block in blocks]
    pairs = ((0, 1), (0, 2), (1, 2))
    expected = torch.stack([((planes[a] - planes[b]) ** 2).mean() for a, b in pairs]).sum()
    scores, losses = net.forward_with_losses(x)
    assert torch.equal(scores, net(x)) and torch.allclose(losses["slow"], expected)


@torch.no_grad()
def test_images_of_another_size_use_interpolated_planes():
    net, larger = terminator(img_size=8), terminator(img_size=(12, 10))
    result = load_weights(larger, net.state_dict())
    assert result.resized and all(name.endswith("bias_p") for name in result.resized)
    x = torch.randn(2, 3, 12, 10)
    assert torch.allclose(net.eval()(x), larger.eval()(x), atol=1e-5)


@pytest.mark.parametrize(
    ("dims", "message"), [((12,), "dims must have from 2 to 5 entries"), ((12, 20), "must be a multiple of 12, not 20")]
)
def test_wrong_widths_are_refused(dims, message):
    with pytest.raises(ValueError, match=message):
        terminator(dims=dims)
