"""The extractor's sums equal their definition, for its own map and for others."""

import pytest
import torch

from ops import create_op
from ops.attention.extractor import resize_kernel


@pytest.mark.parametrize("kind", ["she", "he", "we", "me"])
def test_sums_over_all_tokens_as_defined(kind):
    torch.manual_seed(0)
    op, x = create_op("extractor", 4, 1, kind=kind, size=3).double(), torch.randn(1, 3, 3, 4, dtype=torch.float64)
    tokens = [(i, j) for i in range(3) for j in range(3)]
    for i, j in tokens:
        total = torch.zeros(4, dtype=torch.float64)
        for a, b in tokens:
            if kind == "me":
                total = total + x[0, a, b] / 9
                continue
            weight = op.kernel[:, i - a + 2, j - b + 2]
            total = total + (weight.view(4, 4) @ x[0, a, b] if kind == "she" else weight * x[0, a, b])
        assert torch.allclose(op(x)[0, i, j], op.proj(total * op.gate(x[0, i, j])), atol=1e-12)


def test_a_kernel_for_another_map_keeps_its_sum():
    kernel = torch.ones(2, 5, 5)
    assert torch.allclose(resize_kernel(kernel, (6, 2)).sum((1, 2)), kernel.sum((1, 2)))
    assert resize_kernel(kernel, (3, 3)) is kernel


def test_wrong_values_are_refused():
    for arguments, message in (
        ({"kind": "se"}, "kind must be one of she, he, we, me, not 'se'"),
        ({"size": 0}, "size must be at least 1, not 0"),
    ):
        with pytest.raises(ValueError, match=message):
            create_op({"name": "extractor", **arguments}, 4, 1)
