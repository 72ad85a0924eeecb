"""What InLine attention is by definition."""

import pytest
import torch
import torch.nn.functional as F

from ops import Place, create_op


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize(("size", "lepe"), [((5, 3), 0), ((4, 6), 3), ((1, 1), 0)], ids=str)
def test_inline_attends_as_defined(size, lepe, extra):
    """Weights one by one; each channel's kernel placed on the map from the mean of all tokens."""
    torch.manual_seed(0)
    H, W = size
    op = create_op("inline", dim=6, num_heads=2, place=Place(extra=extra), lepe_kernel=lepe).double()
    x, beside = torch.randn(1, H, W, 6).double(), torch.randn(1, extra, 6).double()
    tokens = torch.cat([beside, x.flatten(1, 2)], dim=1)[0]
    (q, k, v), N = op.qkv(tokens).chunk(3, -1), len(tokens)

    out = torch.zeros(N, 6).double()
    for head in (slice(0, 3), slice(3, 6)):
        scores = q[:, head] @ k[:, head].T / 3**0.5
        weights = (scores - scores.mean(1, keepdim=True) + 1) / N
        assert torch.allclose(weights.sum(1), torch.ones(N).double())
        out[:, head] = weights @ v[:, head]

    first, _, second = op.residual
    hidden, kernels = torch.zeros(6).double(), torch.zeros(6, 3, 3).double()
    for c in range(6):  # channels of one head follow from those of the same head
        head = slice(c // 3 * 3, c // 3 * 3 + 3)
        hidden[c] = F.gelu(first.weight[c, :, 0] @ tokens.mean(0)[head] + first.bias[c])
    for c in range(6):
        head, rows = slice(c // 3 * 3, c // 3 * 3 + 3), slice(9 * c, 9 * c + 9)
        kernels[c] = (second.weight[rows, :, 0] @ hidden[head] + second.bias[rows]).view(3, 3)
    if lepe:
        kernels = kernels + op.lepe.weight[:, 0]
        out[extra:] += op.lepe.bias
    padded = F.pad(v[extra:].unflatten(0, size), (0, 0, 1, 1, 1, 1))
    for i in range(H):
        for j in range(W):
            out[extra + i * W + j] += (padded[i : i + 3, j : j + 3].permute(2, 0, 1) * kernels).sum((1, 2))
    out = op.proj(out)

    ours = op(x, beside) if extra else (op(x), beside)
    assert torch.allclose(ours[0][0], out[extra:].unflatten(0, size), atol=1e-12)
    assert torch.allclose(ours[1][0], out[:extra], atol=1e-12) or not extra


def test_kernels_follow_from_another_mean():
    op, x = create_op("inline", dim=6, num_heads=2).double(), torch.randn(2, 4, 5, 6).double()
    assert torch.allclose(op(x), op(x, mean=x.mean((1, 2))))
    assert not torch.allclose(op(x), op(x, mean=x.mean((1, 2)) + 1))
