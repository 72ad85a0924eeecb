"""How far a token's modulator sees, and that its gates choose."""

import torch

from ops import create_op


def test_each_level_sees_farther_and_the_last_gate_the_whole_map():
    torch.manual_seed(0)
    op = create_op("focal_modulation", dim=4, num_heads=1, kernels=(3, 5))
    x = torch.randn(1, 11, 11, 4, requires_grad=True)
    for gate, radius in enumerate((1, 3, 5)):  # 1 + 2 of the first two levels, and the mean
        with torch.no_grad():
            op.f.weight[8:] = 0.0
            op.f.bias[8:] = torch.eye(3)[gate]
        (grad,) = torch.autograd.grad(op(x)[0, 5, 5].sum(), x)
        seen = grad[0].abs().sum(-1).nonzero()
        assert (seen - 5).abs().max() == radius and len(seen) == (2 * radius + 1) ** 2
