"""Every op as the mixer of a pyramid and of a ViT-shaped net."""

import pytest
import torch

from models.weights import load_weights
from ops import list_ops
from tests.models.test_backbones import build

NETS = {
    "swin_nano": {"depths": (1, 1, 1, 2), "dim": 16},
    "deit_tiny": {"depths": (2,), "dim": 32, "heads": 2, "img_size": 64},
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("op", list_ops())
def test_every_op_trains_in_a_net(net, op):
    """Run one image of an odd size forward and backward: every parameter has a gradient. Its weights load again."""
    torch.manual_seed(0)
    backbone = build(net, mixers=op, num_classes=3, drop_path_rate=0.0, **NETS[net])
    image = torch.randn(1, 3, 45, 70)
    logits, losses = backbone.forward_with_losses(image)
    (logits.square().sum() + sum(losses.values())).backward()
    without = [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    with torch.inference_mode():
        assert backbone.eval()(image).isfinite().all()
    report = load_weights(build(net, mixers=op, num_classes=3, **NETS[net]), backbone.state_dict())
    assert not report.missing and not report.unexpected
