"""Both forms of the multi-head relation aggregator equal their definitions."""

import pytest
import torch
import torch.nn.functional as F

from ops import Place, create_op


def test_shallow_stages_are_local_and_deep_ones_global():
    forms = [create_op("multi_head_relation", 8, 2, place=Place(stage)).form for stage in range(4)]
    assert forms == ["local", "local", "global", "global"]


def test_local_affinity_depends_on_the_channel_and_the_relative_position():
    torch.manual_seed(0)
    op = create_op("multi_head_relation", 4, 2, form="local").double()
    x = torch.randn(1, 6, 9, 4, dtype=torch.float64)
    values = F.pad(op.value(x)[0], (0, 0, 2, 2, 2, 2))
    out = torch.zeros_like(x)
    for i in range(6):
        for j in range(9):
            neighbours = values[i : i + 5, j : j + 5]
            out[0, i, j] = op.proj(
                (neighbours * op.affinity.weight[:, 0].permute(1, 2, 0)).sum((0, 1)) + op.affinity.bias
            )
    assert torch.allclose(op(x), out, atol=1e-12)


@pytest.mark.parametrize("size", [(4, 6), (3, 2)], ids=str)
def test_a_window_is_treated_as_a_map_whose_padding_is_attended_to(size):
    torch.manual_seed(0)
    windowed = create_op("multi_head_relation", 8, 2, form="global", window=4)
    whole = create_op("multi_head_relation", 8, 2, form="global")
    whole.load_state_dict(windowed.state_dict())
    x = torch.randn(2, *size, 8)
    padded = F.pad(x, (0, 0, 0, -size[1] % 4, 0, -size[0] % 4))
    out = torch.cat([whole(part) for part in padded.split(4, dim=2)], dim=2)
    assert torch.allclose(windowed(x), out[:, : size[0], : size[1]], atol=1e-6)
    assert size == (3, 2) or not torch.allclose(windowed(x), whole(x), atol=1e-3)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form must be 'local' or 'global' and window at least 0, not 'near' and 0"):
        create_op("multi_head_relation", 8, 2, form="near")
