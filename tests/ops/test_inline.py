"""InLine attention equals its definition, written as loops."""

import pytest
import torch
import torch.nn.functional as F

from ops import Place, create_op


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize(("size", "lepe"), [((5, 3), 0), ((4, 6), 3), ((1, 1), 0)], ids=str)
def test_inline_attends_as_defined(size, lepe, extra):
    """Compute each weight, and apply each channel's kernel, which follows from the mean of all tokens."""
    torch.manual_seed(0)
    H, W = size
    op = create_op("inline", dim=6, num_heads=2, place=Place(extra=extra), lepe_kernel=lepe).double()
    x, extra_tokens = torch.randn(1, H, W, 6).double(), torch.randn(1, extra, 6).double()
    tokens = torch.cat([extra_tokens, x.flatten(1, 2)], dim=1)[0]
    (q, k, v), N = op.qkv(tokens).chunk(3, -1), len(tokens)

    out = torch.zeros(N, 6).double()
    for head in (slice(0, 3), slice(3, 6)):
        scores = q[:, head] @ k[:, head].T / 3**0.5
        weights = (scores - scores.mean(1, keepdim=True) + 1) / N
        assert torch.allclose(weights.sum(1), torch.ones(N).double())
        out[:, head] = weights @ v[:, head]

    first, _, second = op.residual
    hidden, kernels = torch.zeros(6).double(), torch.zeros(6, 3, 3).double()
    # The kernels of a head's channels depend on the channels of the same head alone
    for c in range(6):
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

    actual = op(x, extra_tokens) if extra else (op(x), extra_tokens)
    assert torch.allclose(actual[0][0], out[extra:].unflatten(0, size), atol=1e-12)
    assert not extra or torch.allclose(actual[1][0], out[:extra], atol=1e-12)


def test_kernels_are_computed_from_the_given_mean():
    op, x = create_op("inline", dim=6, num_heads=2).double(), torch.randn(2, 4, 5, 6).double()
    assert torch.allclose(op(x), op(x, mean=x.mean((1, 2))))
    assert not torch.allclose(op(x), op(x, mean=x.mean((1, 2)) + 1))
