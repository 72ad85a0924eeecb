"""Attention Swin U-Net's decoder equals the authors' code and takes images of any size."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import load_weights
from models.heads.att_swin_unet import AttSwinUNetHead, CrossContextualAttention, PatchExpanding
from models.reference import load_vector, make_input, official_state, relative_error
from retinue.utils.arithmetic import ceil_div
from tests.models.heads import VECTORS, assert_matches, pyramid, stir, without_gradient
from tests.vectors.claims import HEADS

CHANNELS = (8, 64, 16, 24)
SMALL = {"channels": 32, "depths": (2, 1, 1, 1), "window": 4}


def test_the_attention_matches_the_authors_code():
    vector = load_vector(VECTORS / "att_swin_unet__ccam_96.json.gz")
    module = HEADS["att_swin_unet__ccam_96"]().eval()
    assert len(load_weights(module, official_state(vector)).loaded) == len(vector["state"])
    assert sum(parameter.numel() for parameter in module.parameters()) == vector["num_params"]
    x, skip = make_input([2, 196, 96]), make_input([2, 200, 96])[:, :196]
    with torch.inference_mode():
        a, b = module(x, skip)
    outputs = a, b, a[:, :1], b[:, :1]
    errors = [relative_error(*pair) for pair in zip(vector["outputs"].values(), outputs, strict=True)]
    assert max(errors) < 1e-5, errors
    # The authors' module changes the first tokens only.
    assert torch.equal(a[:, 1:], x[:, 1:]) and torch.equal(b[:, 1:], skip[:, 1:])


def test_the_decoder_matches_the_authors_code():
    assert_matches("att_swin_unet__decoder_32", HEADS["att_swin_unet__decoder_32"])


@pytest.mark.parametrize("form", [{}, {"everywhere": True}, {"skip": "concat"}], ids=["first", "everywhere", "concat"])
@pytest.mark.parametrize("image", [(250, 310), (40, 33)])
def test_every_weight_is_trained_with_images_of_any_size(form, image):
    torch.manual_seed(0)
    head = stir(AttSwinUNetHead(CHANNELS, 5, **SMALL | form))
    H, W = (ceil_div(side, 4) for side in image)
    logits = head(pyramid(CHANNELS, H, W))
    assert logits.shape == (2, 5, 4 * H, 4 * W)
    assert not without_gradient(head, logits.square().mean())


def test_the_mean_token_is_added_everywhere_or_replaces_the_first_token():
    torch.manual_seed(0)
    first, everywhere = (stir(CrossContextualAttention(16, everywhere=everywhere)) for everywhere in (False, True))
    everywhere.load_state_dict(first.state_dict())
    a, b = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    for tokens, replaced, added in zip((a, b), first(a, b), everywhere(a, b), strict=True):
        assert torch.allclose(added - tokens, replaced[:, :1].expand_as(tokens), atol=1e-6)


@pytest.mark.parametrize("scale", [2, 4])
def test_patch_expanding_turns_each_token_into_a_square(scale):
    torch.manual_seed(0)
    module: Any = PatchExpanding(6, 5, scale)
    x = torch.randn(1, 6, 3, 4)
    module.norm = nn.Identity()
    expanded = module(x)
    assert expanded.shape == (1, 5, 3 * scale, 4 * scale)
    for row, column in [(0, 0), (2, 1), (1, 3)]:
        values = module.expand(x[0, :, row, column])
        for i in range(scale):
            for j in range(scale):
                chunk = values[5 * (scale * i + j) :][:5]
                assert torch.allclose(expanded[0, :, scale * row + i, scale * column + j], chunk, atol=1e-6)


def test_only_maps_of_other_widths_are_projected():
    projected = [isinstance(layer, nn.Conv2d) for layer in AttSwinUNetHead(CHANNELS, 5, **SMALL).laterals]
    assert projected == [True, False, True]


def test_half_precision_is_close_to_single_precision():
    torch.manual_seed(0)
    head, maps = stir(AttSwinUNetHead(CHANNELS, 5, **SMALL)).eval(), pyramid(CHANNELS, 20, 28)
    with torch.no_grad():
        exact = head(maps)
        with torch.autocast("cpu", torch.bfloat16):
            half = head(maps)
    assert F.mse_loss(half.float(), exact).sqrt() < 0.05 * exact.std()


def test_saved_weights_load():
    head, other = AttSwinUNetHead(CHANNELS, 5, **SMALL), AttSwinUNetHead(CHANNELS, 5, **SMALL)
    loaded = load_weights(other, head.state_dict())
    assert not loaded.missing and not loaded.unexpected
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"channels": 48}, r"channels must be a multiple of 32, not 48$"),
        ({"skip": "concats"}, r"skip must be ccam or concat, not 'concats'\. Did you mean 'concat'\?$"),
        ({"depths": (2, 2, 2)}, r"takes four depths, not 4 and 3$"),
    ],
)
def test_unfitting_arguments_are_refused_in_one_line(form, message):
    with pytest.raises(ValueError, match=message):
        AttSwinUNetHead(CHANNELS, 5, **SMALL | form)
