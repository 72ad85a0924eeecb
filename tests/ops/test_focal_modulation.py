"""Range of each level of focal modulation, and the choice of levels by the gates."""

import torch

from ops import create_op


def test_each_level_has_a_larger_range_and_the_last_gate_takes_the_whole_map():
    torch.manual_seed(0)
    op = create_op("focal_modulation", dim=4, num_heads=1, kernels=(3, 5))
    x = torch.randn(1, 11, 11, 4, requires_grad=True)
    # The radius grows by 1 in the first level and by 2 in the second; the mean covers the map
    for gate, radius in enumerate((1, 3, 5)):
        with torch.no_grad():
            op.f.weight[8:] = 0.0
            op.f.bias[8:] = torch.eye(3)[gate]
        (grad,) = torch.autograd.grad(op(x)[0, 5, 5].sum(), x)
        influencing = grad[0].abs().sum(-1).nonzero()
        assert (influencing - 5).abs().max() == radius and len(influencing) == (2 * radius + 1) ** 2
