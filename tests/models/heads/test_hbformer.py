"""HBFormer's decoder equals the authors' code and takes images of any size."""

import pytest
import torch
import torch.nn.functional as F

from models import load_weights
from models.heads.hbformer import HBFormerHead
from models.reference import make_input
from retinue.utils.arithmetic import ceil_div
from tests.models.heads import assert_matches, pyramid, stir, without_gradient
from tests.vectors.claims import HEADS

CHANNELS = (8, 12, 16, 24)


@pytest.fixture
def head():
    torch.manual_seed(0)
    head = stir(HBFormerHead(CHANNELS, 5, channels=8))
    for step in head.steps:
        for weights in (step.pyramid.branch_weights, step.pyramid.expert_weights):
            # These hidden units are few, and all of them could be inactive.
            weights[1].bias.data.fill_(1)
    return head


def test_matches_the_authors_code():
    step = [make_input([2, 192, 14, 14]), make_input([2, 96, 28, 28])]
    assert_matches("hbformer__mff_decoder_192_96", HEADS["hbformer__mff_decoder_192_96"], step)
    assert_matches("hbformer__decoder_48", HEADS["hbformer__decoder_48"])


@pytest.mark.parametrize("image", [(250, 310), (40, 33)])
def test_every_weight_is_trained_with_images_of_any_size(head, image):
    H, W = (ceil_div(side, 4) for side in image)
    logits = head(pyramid(CHANNELS, H, W))
    assert logits.shape == (2, 5, 4 * H, 4 * W)
    assert not without_gradient(head, logits.square().mean())


def test_each_image_has_kernels_of_its_own(head):
    maps = pyramid(CHANNELS, 12, 16, batch=3)
    head.eval()
    with torch.no_grad():
        together, alone = head(maps), [head([m[i : i + 1] for m in maps]) for i in range(3)]
        pooled = torch.rand(3, 8, 1, 1)
        weights = head.steps[3].pyramid.expert_weights(pooled)
    assert torch.allclose(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert torch.allclose(weights.sum(1), torch.ones(())) and weights.std(0).min() > 0


def test_half_precision_is_close_to_single_precision(head):
    maps = pyramid(CHANNELS, 20, 28)
    head.eval()
    with torch.no_grad():
        exact = head(maps)
        with torch.autocast("cpu", torch.bfloat16):
            half = head(maps)
    assert F.mse_loss(half.float(), exact).sqrt() < 0.05 * exact.std()


def test_saved_weights_load(head):
    other = HBFormerHead(CHANNELS, 5, channels=8)
    loaded = load_weights(other, head.state_dict())
    assert not loaded.missing and not loaded.unexpected
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), other.parameters(), strict=True))


def test_unfitting_arguments_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"channels must be at least 8, not 4$"):
        HBFormerHead(CHANNELS, 5, channels=4)
    with pytest.raises(ValueError, match=r"four maps, of strides 4, 8, 16 and 32, not 3$"):
        HBFormerHead(CHANNELS[1:], 5)
