"""Ops that mix extra tokens, such as a class token, with the tokens of the map."""

import pytest
import torch

from ops import Place, create_op, list_ops
from ops.losses import Losses, loss_weights
from ops.registry import take_extra

NAMES = [name for name in list_ops() if take_extra([name])]


@pytest.mark.parametrize("name", NAMES)
def test_extra_tokens_and_the_map_influence_each_other(name):
    torch.manual_seed(0)
    op = create_op(name, dim=16, num_heads=2, place=Place(stage=1, extra=2))
    x, extra = torch.randn(2, 6, 9, 16, requires_grad=True), torch.randn(2, 2, 16, requires_grad=True)
    losses = Losses()
    outputs = op(x, extra, losses=losses) if loss_weights(op) else op(x, extra)
    assert [out.shape for out in outputs] == [x.shape, extra.shape]
    for out in outputs:
        grads = torch.autograd.grad(out[0].square().sum(), (x, extra), retain_graph=True)
        assert all(grad[0].abs().max() > 0 and not grad[1].any() for grad in grads)
    total = torch.stack([out.square().sum() for out in outputs] + list(losses.means().values())).sum()
    grads = torch.autograd.grad(total, list(op.parameters()))
    assert all(grad.abs().max() > 0 for grad in grads)
    assert op(x).shape == x.shape


@pytest.mark.parametrize("name", NAMES)
def test_zero_extra_tokens_change_nothing(name):
    torch.manual_seed(0)
    op = create_op(name, dim=16, num_heads=2, place=Place(stage=1))
    x = torch.randn(1, 6, 9, 16)
    outputs = []
    for extra in ((), (x.new_empty(1, 0, 16),)):
        torch.manual_seed(1)
        outputs.append(op(x, *extra))
    assert torch.allclose(outputs[0], outputs[1][0], atol=1e-6)
