"""Factorization attention equals its definition, written as loops."""

import pytest
import torch

from ops import Place, create_op


def mirrored(position: int, side: int) -> int:
    """Return the position on an axis of `side` tokens that a position beyond its end is mirrored to."""
    while not 0 <= position < side:
        position = 2 * (side - 1) - position if position >= side else -position
    return position


@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("size", [(9, 16), (5, 3)], ids=str)
def test_groups_attend_as_defined(size, ratio):
    """Compute one head on the coarse map, and windows averaged over consecutive values, as in the authors' code."""
    torch.manual_seed(0)
    heads, (H, W) = 2, size
    op = create_op("factorization", dim=16, num_heads=heads, ratio=ratio).double()
    # Channels of one head in each group with windows
    width = 3 if ratio > 1 else 7
    n = len(op.windows)
    first = 16 - heads * width * n
    x = torch.randn(1, H, W, 16, dtype=torch.float64)
    q = op.q(x)[0]

    patches = [
        op.coarse.norm(torch.einsum("ijc,ocij->o", x[0, i : i + ratio, j : j + ratio, :first], op.coarse.reduce.weight)
                       + op.coarse.reduce.bias)
        for i in range(0, H - ratio + 1, ratio) for j in range(0, W - ratio + 1, ratio)
    ]  # fmt: skip
    k, v = op.coarse.kv(torch.stack(patches)).chunk(2, -1)
    v = v + op.coarse.lepe(v.T.view(1, first, H // ratio, W // ratio)).flatten(2)[0].T
    groups = [(q[..., :first] @ k.T / first**0.5).softmax(-1) @ v]

    source = op.source(x[..., first:].permute(0, 3, 1, 2))[0]
    for g, group in enumerate(op.windows):
        dilation = (1, ratio)[g]
        span = 6 * dilation + 1
        starts = [(i, j) for i in range(0, H, span) for j in range(0, W, span)]
        window = torch.zeros(heads, 49, width, dtype=torch.float64)
        for h in range(heads):
            channels = source[heads * width * g + width * h :][:width]
            for t in range(49):
                rows, columns = t // 7 * dilation, t % 7 * dilation
                tokens = [channels[:, mirrored(i + rows, H), mirrored(j + columns, W)] for i, j in starts]
                window[h, t] = torch.cat(tokens).view(width, len(starts)).mean(1)
        k, v = group.kv(group.mix(window)).chunk(2, -1)
        v = v + group.lepe(v.transpose(1, 2).reshape(1, -1, 7, 7)).view(heads, width, 49).transpose(1, 2)
        for h in range(heads):
            head_q = q[..., first + width * (n * h + g) :][..., :width]
            groups.append((head_q @ k[h].T / width**0.5).softmax(-1) @ v[h])
    assert torch.allclose(op(x)[0], op.proj(torch.cat(groups, dim=-1)), atol=1e-12)


def test_ratio_follows_from_the_stage():
    ops = [create_op("factorization", 32, 2, place=Place(stage)) for stage in range(4)]
    assert [op.coarse.ratio for op in ops] == [8, 4, 2, 1]
    assert [[window.dilation for window in op.windows] for op in ops] == [[1, 8], [1, 4], [1, 2], [1]]
    with pytest.raises(ValueError, match="ratio must be at least 1, not 0"):
        create_op("factorization", 32, 2, ratio=0)
    with pytest.raises(ValueError, match="a head must have at least 3 channels, not 2"):
        create_op("factorization", 4, 2, ratio=2)
