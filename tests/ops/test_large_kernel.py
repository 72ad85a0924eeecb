"""The large-kernel gate equals its definition and moves with the map."""

import pytest
import torch

from ops import create_op


def test_gates_as_defined():
    torch.manual_seed(0)
    op, x = create_op("large_kernel", 3, 1, kernel=5).double(), torch.randn(4, 6, 3, dtype=torch.float64)
    gate = torch.nn.functional.gelu(op.gate(x))
    for i, j in ((i, j) for i in range(4) for j in range(6)):
        total = op.conv.bias.clone()
        for a, b in ((a, b) for a in range(5) for b in range(5)):
            if 0 <= i + a - 2 < 4 and 0 <= j + b - 2 < 6:
                total = total + op.conv.weight[:, 0, a, b] * gate[i + a - 2, j + b - 2]
        assert torch.allclose(op(x[None])[0, i, j], op.proj(total * op.value(x[i, j])), atol=1e-12)


def test_interior_moves_with_the_map():
    torch.manual_seed(0)
    op, x = create_op("large_kernel", 4, 1).double(), torch.randn(1, 12, 12, 4, dtype=torch.float64)
    out, moved = op(x), op(x.roll((1, 2), dims=(1, 2)))
    assert torch.allclose(moved[:, 5:8, 6:8], out[:, 4:7, 4:6], atol=1e-12)


def test_even_kernels_are_refused():
    with pytest.raises(ValueError, match="kernel must be odd, not 8"):
        create_op("large_kernel", 4, 1, kernel=8)
