"""SDANet's neck."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models import load_weights
from models.heads.sdanet import ContextBlock, SelectiveDenseAttention, at_level
from tests.models.heads import assert_matches, pyramid, stir, without_gradient
from tests.vectors.claims import HEADS


def small(levels: int = 5) -> Any:
    torch.manual_seed(0)
    return SelectiveDenseAttention(32, levels, reduction=16, ratio=1 / 4)


@pytest.mark.parametrize("name", [name for name in HEADS if name.startswith("sdanet__")])
def test_matches_the_authors_code(name):
    assert_matches(name, HEADS[name])


@pytest.mark.parametrize("levels", [3, 5])
def test_maps_of_any_size_train_every_weight(levels):
    neck, maps = stir(small(levels)), pyramid([32] * levels, 33, 22)
    refined = neck(maps)
    assert isinstance(refined, tuple) and [m.shape for m in refined] == [m.shape for m in maps]
    left = without_gradient(neck, torch.stack([m.square().sum() for m in refined]).sum())
    assert all(name.endswith("context.score.bias") for name in left), left  # moves all scores of a softmax alike


def test_weights_of_the_levels_sum_to_one():
    neck = stir(small())
    channel, place = neck.attention[2].weights(torch.randn(2, 32, 9, 6))
    assert channel.shape == (5, 2, 32, 1, 1) and place.shape == (5, 2, 1, 9, 6)
    for weights in (channel, place):
        assert torch.allclose(weights.sum(0), torch.ones(()), atol=1e-6) and weights.std() > 0.01


def test_levels_are_brought_to_the_size_of_one():
    maps = pyramid([4] * 3, 12, 8)
    finer, own, coarser = at_level(maps, 1)
    assert own is maps[1]
    assert torch.equal(finer, F.max_pool2d(maps[0], 2))
    assert torch.equal(coarser, maps[2].repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_equal_weights_add_twice_the_mean_of_the_levels():
    neck, maps = small().eval(), pyramid([32] * 5, 16, 16)
    with torch.no_grad():
        for attention in neck.attention:  # the context block adds nothing at first
            for layer in (*attention.by_channel, *attention.by_place):
                layer.weight.zero_()
                if layer.bias is not None:
                    layer.bias.zero_()
        for level, refined in enumerate(neck(maps)):
            mean = torch.stack(at_level(maps, level)).mean(0)
            assert torch.allclose(refined, maps[level] + 2 * mean, atol=1e-5)


def test_context_block_adds_one_vector_from_the_places_that_it_chooses():
    torch.manual_seed(0)
    block, x = stir(ContextBlock(8, 4)), torch.randn(2, 8, 5, 6)
    with torch.no_grad():
        added = block(x) - x
        assert torch.allclose(added, added[..., :1, :1].expand_as(added), atol=1e-5) and added.std() > 0.01
        x[:, 0, 3, 2] = 1000  # a place with all the weight
        block.score.weight.zero_()[0, 0] = 1
        alone = block(x[..., 3:4, 2:3]) - x[..., 3:4, 2:3]
        assert torch.allclose(block(x) - x, alone.expand_as(x), atol=1e-3)


def test_half_precision_is_close():
    neck, maps = stir(small()).eval(), pyramid([32] * 5, 33, 22)
    with torch.no_grad():
        exact = neck(maps)
        with torch.autocast("cpu", torch.bfloat16):
            rough = neck(maps)
    for r, e in zip(rough, exact, strict=True):
        assert F.mse_loss(r.float(), e).sqrt() < 0.05 * e.std()


def test_own_weights_load():
    neck, other = small(), stir(small())
    done = load_weights(other, neck.state_dict())
    assert not done.missing and not done.unexpected
    assert all(torch.equal(a, b) for a, b in zip(neck.parameters(), other.parameters(), strict=True))


def test_another_number_of_levels_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"built for 5 levels, not 4$"):
        small()(pyramid([32] * 4, 16, 16))
