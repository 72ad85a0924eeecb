"""Softmax-free attention equals its definition with an exact inverse."""

import pytest
import torch

from ops import Place, create_op
from ops.attention.softmax_free import RIDGE


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("size", [(4, 6), (5, 7)], ids=str)
def test_landmarks_approximate_a_gaussian_kernel(size, normalized):
    torch.manual_seed(0)
    op = create_op("softmax_free", 6, 2, ratio=2, conv=3, normalized=normalized).double()
    # Landmarks that are far from each other, so that Newton's method converges
    torch.nn.init.constant_(op.norm.weight, 4)
    torch.nn.init.normal_(op.norm.bias, std=2)
    x = torch.randn(1, *size, 6, dtype=torch.float64)
    queries, values = op.q(x)[0] / 3**0.25, op.v(x)[0]
    out = torch.zeros_like(values)
    for h in range(2):
        q, v = queries[..., 3 * h : 3 * h + 3], values[..., 3 * h : 3 * h + 3]
        landmarks = []
        for i in range(0, size[0] - 1, 2):
            for j in range(0, size[1] - 1, 2):
                patch = torch.einsum("ijc,ocij->o", q[i : i + 2, j : j + 2], op.landmark.weight)
                landmarks.append(torch.nn.functional.gelu(op.norm(patch)))
        kernel = lambda a, b: torch.exp(-(a[:, None] - b).square().sum(-1) / 2)  # noqa: E731
        landmarks = torch.stack(landmarks)
        inner, outer = kernel(landmarks, landmarks), kernel(q.flatten(0, 1), landmarks)
        if normalized:
            root = inner.sum(1).sqrt()
            inverse = inner.inverse() / (root[:, None] * root)
        else:
            inverse = (inner + RIDGE * torch.eye(len(inner))).inverse()
        mixed = (outer @ inverse @ outer.T @ v.flatten(0, 1)).view_as(v)
        convolved = torch.nn.functional.conv2d(v.permute(2, 0, 1)[:, None], op.conv.weight[h : h + 1], padding=1)
        out[..., 3 * h : 3 * h + 3] = mixed + convolved[:, 0].permute(1, 2, 0)
    assert torch.allclose(op(x)[0], op.proj(out), atol=1e-6)


def test_ratio_and_convolution_follow_from_the_stage():
    ops = [create_op("softmax_free", 8, 2, place=Place(stage)) for stage in range(4)]
    assert [(op.ratio, op.conv.kernel_size[0]) for op in ops] == [(8, 9), (4, 5), (2, 3), (1, 3)]
    with pytest.raises(ValueError, match="conv must be odd and at least 1, not 4"):
        create_op("softmax_free", 8, 2, conv=4)
