"""Global queries on maps of any size and in the stages of a net."""

import math
from typing import Any

import pytest
import timm
import torch

import models  # noqa: F401
from ops import Place, create_op
from ops.attention.global_query import GlobalQuery


def test_a_token_uses_the_global_query_of_its_position_in_the_window():
    """Compute each token's attention on a map that windows do not fit; padded tokens are attended to."""
    torch.manual_seed(0)
    op = create_op("global_query", dim=4, num_heads=1, window=4, form="global").double()
    x, query = torch.randn(1, 6, 9, 4, dtype=torch.float64), torch.randn(1, 4, 4, 4, dtype=torch.float64)
    padded = torch.zeros(1, 8, 12, 4, dtype=torch.float64)
    padded[:, :6, :9] = x
    k, v = op.qkv(padded)[0].chunk(2, -1)
    out = torch.zeros_like(x)
    for i in range(6):
        for j in range(9):
            keys = [(a, b) for a in range(8) for b in range(12) if (a // 4, b // 4) == (i // 4, j // 4)]
            bias = torch.stack([op.relative_position_bias_table[(i - a + 3) * 7 + j - b + 3, 0] for a, b in keys])
            scores = torch.stack([k[a, b] for a, b in keys]) @ query[0, i % 4, j % 4] / math.sqrt(4)
            out[0, i, j] = op.proj((scores + bias).softmax(0) @ torch.stack([v[a, b] for a, b in keys]))
    assert torch.allclose(op(x, context=query), out, atol=1e-12)


@pytest.mark.parametrize(("stage", "poolings"), [(0, 3), (1, 2), (2, 0), (3, 0)])
def test_global_queries_have_the_size_of_a_window(stage, poolings):
    global_query = GlobalQuery(Place(stage, stride=4 * 2**stage), 8, 2)
    assert sum(isinstance(layer, torch.nn.MaxPool2d) for layer in global_query.features.modules()) == poolings
    for size in ((1, 1), (3, 20), (56, 56), (70, 41)):
        window = tuple(min(global_query.window, side) for side in size)
        assert global_query(torch.randn(1, *size, 8)).shape[1:3] == window


def test_a_net_trains_its_global_queries_and_computes_none_for_stages_of_local_blocks():
    torch.manual_seed(0)
    net: Any = timm.create_model("swin_tiny", mixers="global_query", depths=(3, 1, 2, 1), dim=24, num_classes=2)
    assert [len(stage.contexts) for stage in net.stages] == [1, 0, 1, 0]
    net(torch.randn(2, 3, 64, 96)).square().sum().backward()
    assert not [key for key, weight in net.named_parameters() if weight.grad is None or not weight.grad.any()]


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form must be 'local' or 'global', not 'shared'"):
        create_op({"name": "global_query", "form": "shared"}, 8, 2)
