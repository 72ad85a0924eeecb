"""Position-aware scaling and the loss of attention diversification, by their definitions."""

from math import sqrt

import pytest
import torch

from ops import create_op
from ops.losses import Losses


def build(name, **arguments):
    torch.manual_seed(0)
    return create_op({"name": name, **arguments}, 8, 2).double()


def test_scales_the_scores_as_defined():
    op, x = build("position_aware", size=(2, 3)), torch.randn(1, 2, 3, 8, dtype=torch.float64)
    torch.nn.init.normal_(op.att_mask)
    q, k, v = op.qkv(x.view(6, 8)).chunk(3, -1)
    out = torch.empty(6, 8, dtype=torch.float64)
    for head, h in enumerate((slice(0, 4), slice(4, 8))):
        for i in range(6):
            scores = [q[i, h] @ k[j, h] / sqrt(4) * op.att_mask[head, i, j].sigmoid() for j in range(6)]
            out[i, h] = torch.stack(scores).softmax(0) @ v[:, h]
    assert torch.allclose(op(x).view(6, 8), op.proj(out), atol=1e-12)


def test_a_table_of_one_value_is_interpolated_to_itself():
    op, full = build("position_aware", size=3), build("full")
    torch.nn.init.constant_(op.att_mask, 40.0)
    full.load_state_dict({key: value for key, value in op.state_dict().items() if key != "att_mask"})
    x = torch.randn(2, 5, 4, 8, dtype=torch.float64)
    assert torch.allclose(op(x), full(x), atol=1e-12)


@pytest.mark.parametrize("name", ["full", "position_aware"])
def test_diversity_is_the_mean_cosine_to_the_mean_attention(name):
    op, losses = build(name, diversity=1.0), Losses()
    if name == "position_aware":
        # The sigmoid of the table is 1, so the scores are those of full attention.
        torch.nn.init.constant_(op.att_mask, 40.0)
    x = 3 * torch.randn(2, 2, 3, 8, dtype=torch.float64)
    op(x, losses=losses)
    cosines = []
    for image in x:
        q, k, _ = op.qkv(image.view(6, 8)).chunk(3, -1)
        heads = (slice(0, 4), slice(4, 8))
        weights = torch.stack([(q[:, h] @ k[:, h].T / sqrt(4)).softmax(-1) for h in heads]).mean(0)
        mean = torch.stack([weights[:, j].mean() for j in range(6)])
        mean = torch.where(mean > 1 / 6, mean, 0)
        for row in weights:
            row = torch.where(row > 1 / 6, row, 0)
            cosines.append(row @ mean / (row.norm() * mean.norm()))
    assert torch.allclose(losses.means()["diversity"], torch.stack(cosines).mean())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "full", "diversity": -1.0}, "diversity must be a threshold above 0"),
        ({"name": "position_aware", "size": 0}, "size must be at least 1"),
    ],
)
def test_wrong_values_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        create_op(spec, 8, 2)
