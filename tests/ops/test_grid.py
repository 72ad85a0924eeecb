"""Grid attention on maps that are not a multiple of the grid."""

import torch

from ops import create_op


def test_a_group_holds_every_nth_token():
    torch.manual_seed(0)
    op = create_op("grid", dim=8, num_heads=2, grid=4)
    # A group holds every third token along H and every fourth along W
    x = torch.randn(1, 9, 14, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(op(x)[0, 4, 6].sum(), x)
    influencing = grad[0].abs().sum(-1) > 0
    assert influencing.nonzero().tolist() == [[i, j] for i in (1, 4, 7) for j in (2, 6, 10)]
