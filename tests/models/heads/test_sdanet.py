"""SDANet's neck equals the authors' code, takes maps of any size and weights its levels as its docstrings say."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models import load_weights
from models.heads.sdanet import ContextBlock, SelectiveDenseAttention, at_level
from tests.models.heads import assert_matches, pyramid, stir, without_gradient
from tests.models.openmmlab import CLASSES, build
from tests.models.openmmlab.test_build import detection_batch, losses
from tests.models.openmmlab.test_build import without_gradient as losses_without_gradient
from tests.vectors.claims import HEADS


def small(levels: int = 5) -> Any:
    torch.manual_seed(0)
    return SelectiveDenseAttention(32, levels, reduction=16, ratio=1 / 4)


@pytest.mark.parametrize("name", [name for name in HEADS if name.startswith("sdanet__")])
def test_matches_the_authors_code(name):
    assert_matches(name, HEADS[name])


@pytest.mark.parametrize("levels", [3, 5])
def test_every_weight_is_trained_with_maps_of_any_size(levels):
    neck, maps = stir(small(levels)), pyramid([32] * levels, 33, 22)
    refined = neck(maps)
    assert isinstance(refined, tuple) and [m.shape for m in refined] == [m.shape for m in maps]
    untrained = without_gradient(neck, torch.stack([m.square().sum() for m in refined]).sum())
    # This bias adds the same number to all scores of a softmax.
    assert all(name.endswith("context.score.bias") for name in untrained), untrained


def test_weights_of_the_levels_sum_to_one():
    neck = stir(small())
    by_channel, by_position = neck.attention[2].weights(torch.randn(2, 32, 9, 6))
    assert by_channel.shape == (5, 2, 32, 1, 1) and by_position.shape == (5, 2, 1, 9, 6)
    for weights in (by_channel, by_position):
        assert torch.allclose(weights.sum(0), torch.ones(()), atol=1e-6) and weights.std() > 0.01


def test_all_levels_are_resized_to_one_level():
    maps = pyramid([4] * 3, 12, 8)
    finer, unchanged, coarser = at_level(maps, 1)
    assert unchanged is maps[1]
    assert torch.equal(finer, F.max_pool2d(maps[0], 2))
    assert torch.equal(coarser, maps[2].repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_equal_weights_add_twice_the_mean_of_the_levels():
    neck, maps = small().eval(), pyramid([32] * 5, 16, 16)
    with torch.no_grad():
        # The initial context block adds nothing.
        for attention in neck.attention:
            for layer in (*attention.by_channel, *attention.by_place):
                layer.weight.zero_()
                if layer.bias is not None:
                    layer.bias.zero_()
        for level, refined in enumerate(neck(maps)):
            mean = torch.stack(at_level(maps, level)).mean(0)
            assert torch.allclose(refined, maps[level] + 2 * mean, atol=1e-5)


def test_context_block_adds_one_vector_from_the_positions_with_weight():
    torch.manual_seed(0)
    block, x = stir(ContextBlock(8, 4)), torch.randn(2, 8, 5, 6)
    with torch.no_grad():
        added = block(x) - x
        assert torch.allclose(added, added[..., :1, :1].expand_as(added), atol=1e-5) and added.std() > 0.01
        # One position has all the weight.
        x[:, 0, 3, 2] = 1000
        block.score.weight.zero_()[0, 0] = 1
        alone = block(x[..., 3:4, 2:3]) - x[..., 3:4, 2:3]
        assert torch.allclose(block(x) - x, alone.expand_as(x), atol=1e-3)


def test_half_precision_is_close_to_single_precision():
    neck, maps = stir(small()).eval(), pyramid([32] * 5, 33, 22)
    with torch.no_grad():
        exact = neck(maps)
        with torch.autocast("cpu", torch.bfloat16):
            half = neck(maps)
    for half_map, exact_map in zip(half, exact, strict=True):
        assert F.mse_loss(half_map.float(), exact_map).sqrt() < 0.05 * exact_map.std()


def test_saved_weights_load():
    neck, other = small(), stir(small())
    loaded = load_weights(other, neck.state_dict())
    assert not loaded.missing and not loaded.unexpected
    assert all(torch.equal(a, b) for a, b in zip(neck.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "net",
    ["resnet18", pytest.param("biformer", marks=pytest.mark.slow), pytest.param("vitdet", marks=pytest.mark.slow)],
)
def test_the_whole_detector_is_trained_and_predicts(net):
    model = build("sdanet", net)
    assert losses_without_gradient(model, losses(model)) == []
    image, sizes, *_ = detection_batch()
    with torch.no_grad():
        detections = model.eval().predict(image, sizes, sizes)
    assert all(
        len(d.boxes) and d.masks.shape[1:] == (h, w) for d, (h, w) in zip(detections, sizes.tolist(), strict=True)
    )


def test_the_whole_detector_has_the_layers_of_the_authors():
    with torch.device("meta"):
        model = build("sdanet", "resnet101", size="full")
        attention = SelectiveDenseAttention()
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    pyramid_layers = sum(width * 256 + 256 for width in (256, 512, 1024, 2048)) + 4 * (9 * 256**2 + 256)
    assert count["neck"] == pyramid_layers + sum(p.numel() for p in attention.parameters())
    # Each of three stages scores the classes and the background, and predicts one box for all classes.
    boxes = 256 * 49 * 1024 + 1024 + 1024**2 + 1024 + 1025 * (CLASSES + 1) + 1025 * 4
    masks = 4 * (9 * 256**2 + 256) + 4 * 256**2 + 256 + 257 * CLASSES
    assert count["roi_head"] == 3 * (boxes + masks)


def test_another_number_of_levels_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"built for 5 levels, not 4$"):
        small()(pyramid([32] * 4, 16, 16))
