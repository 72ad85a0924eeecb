"""Channels of a token that influence other tokens in single-head attention."""

import pytest
import torch

from ops import create_op


def test_only_the_first_channels_influence_other_tokens():
    torch.manual_seed(0)
    op = create_op("single_head", dim=28, num_heads=4)
    x = torch.randn(1, 5, 6, 28, requires_grad=True)
    (grad,) = torch.autograd.grad(op(x)[0, 2, 3].sum(), x)
    influencing = grad[0].abs().sum((0, 1)) > grad[0, 2, 3].abs()
    # 3 / 14 of 28 channels
    assert influencing.nonzero().flatten().tolist() == list(range(6))


@pytest.mark.parametrize(("dim", "partial"), [(224, 48), (320, 68), (308, 66), (448, 96), (352, 75), (336, 72)])
def test_number_of_attending_channels_is_that_of_the_papers_nets(dim, partial):
    with torch.device("meta"):
        assert create_op("single_head", dim, 1).partial == (partial, dim - partial)


@pytest.mark.parametrize("ratio", [0.01, 1.5])
def test_a_ratio_of_no_or_too_many_channels_is_refused(ratio):
    with pytest.raises(ValueError, match=f"from 1 to all of 28 channels, which {ratio} does not"):
        create_op({"name": "single_head", "partial_ratio": ratio}, 28, 4)
