"""VWFormer's decoder equals the authors' code and takes images of any size."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models import load_weights
from models.heads.vwformer import VWHead
from ops.attention.varying_window import RATIOS, contexts
from retinue.utils.arithmetic import ceil_div, round_up
from tests.models.heads import assert_matches, pyramid, stir, without_gradient
from tests.vectors.claims import HEADS

CHANNELS = (8, 12, 16, 24)
CITY: dict[str, Any] = {"short_cut": False, "city": True}


@pytest.mark.parametrize("name", [name for name in HEADS if name.startswith("vwformer__")])
def test_matches_the_authors_code(name):
    assert_matches(name, HEADS[name])


@pytest.mark.parametrize("form", [{}, CITY, {"upsample": "wau"}], ids=["ade20k", "cityscapes", "wau"])
@pytest.mark.parametrize("image", [(250, 310), (40, 33)])
def test_every_weight_is_trained_with_images_of_any_size(form, image):
    torch.manual_seed(0)
    head = stir(VWHead(CHANNELS, 5, channels=64, num_heads=2, **form))
    size = tuple(ceil_div(side, 4) for side in image)
    logits = head(pyramid(CHANNELS, *size))
    assert logits.shape == (2, 5, *size)
    # The bias of the keys adds the same number to all scores of a query.
    untrained = without_gradient(head, logits.square().mean())
    assert untrained <= {f"attention.{i}.attn.k.bias" for i in range(3)}


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("window", [(1, 2), (3, 4), (5, 2)])
def test_contexts_are_the_surroundings_of_the_windows(ratio, window):
    (p, q), C = window, 2
    x = torch.randn(1, C, 8 * p, 8 * q)
    gathered = contexts(x, ratio)
    assert gathered.shape == (1, 64, p * q, ratio**2 * C)

    def extended_indices(size: int) -> list[int]:
        """Return the indices of the map along an extended dimension, by the slices of the authors' code."""
        indices = list(range(8 * size))
        middle = (ratio + 1) * size // 2
        return indices[middle : ratio * size] + indices + indices[-ratio * size : -middle]

    rows, columns = extended_indices(p), extended_indices(q)
    for window_row, window_column in [(0, 0), (3, 7), (7, 4)]:
        for row, column in [(0, 0), (p - 1, q - 1), (p // 2, q // 2)]:
            expected = [
                x[
                    0,
                    channel,
                    rows[window_row * p + row * ratio + i],
                    columns[window_column * q + column * ratio + j],
                ]
                for i in range(ratio)
                for j in range(ratio)
                for channel in range(C)
            ]
            assert torch.equal(gathered[0, window_row * 8 + window_column, row * q + column], torch.stack(expected))


@pytest.mark.parametrize("image", [(128, 192), (100, 200)])
def test_borders_are_replicated_if_windows_do_not_fit(image):
    torch.manual_seed(0)
    head = VWHead(CHANNELS, 5, channels=64).eval()
    inputs = {}
    head.local.register_forward_pre_hook(lambda _, args: inputs.update(unpadded=args[0]))
    head.attention[0].register_forward_pre_hook(lambda _, args: inputs.update(padded=args[0]))
    with torch.no_grad():
        head(pyramid(CHANNELS, image[0] // 4, image[1] // 4))
    unpadded, padded = inputs["unpadded"], inputs["padded"]
    h, w = unpadded.shape[2:]
    assert padded.shape[2:] == (round_up(h, 8), round_up(w, 8))
    assert torch.equal(padded[..., :h, :w], unpadded)
    assert torch.equal(padded[..., h:, :w], unpadded[..., -1:, :].expand(-1, -1, padded.shape[2] - h, -1))
    assert torch.equal(padded[..., w:], padded[..., w - 1 : w].expand_as(padded[..., w:]))


def test_the_receptive_field_of_each_attention_is_its_context():
    torch.manual_seed(0)
    head = stir(VWHead(CHANNELS, 5, channels=64)).eval()
    # The windows of this map are 2 x 2.
    x = torch.randn(1, 64, 16, 16, requires_grad=True)
    for attention, ratio in zip(head.attention, RATIOS, strict=True):
        (gradient,) = torch.autograd.grad(attention(x)[..., 8:10, 8:10].sum(), x)
        rows = gradient.abs().sum((0, 1, 3)).nonzero().flatten()
        # The context of a window of 2 has 2 * ratio rows around row 8.5, and the convolution before the attention reads
        # ratio / 2 - 1 rows before it and ratio / 2 rows after it.
        first = 9 - ratio - (ratio // 2 - 1)
        last = 8 + ratio + ratio // 2
        assert rows.tolist() == list(range(max(0, first), min(16, last + 1)))


def test_half_precision_is_close_to_single_precision():
    torch.manual_seed(0)
    for form in ({}, CITY):
        head, maps = stir(VWHead(CHANNELS, 5, channels=64, **form)).eval(), pyramid(CHANNELS, 20, 28)
        with torch.no_grad():
            exact = head(maps)
            with torch.autocast("cpu", torch.bfloat16):
                half = head(maps)
        assert F.mse_loss(half.float(), exact).sqrt() < 0.05 * exact.std()


def test_saved_weights_load():
    head, other = VWHead(CHANNELS, 5, channels=64), VWHead(CHANNELS, 5, channels=64)
    loaded = load_weights(other, head.state_dict())
    assert not loaded.missing and not loaded.unexpected
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), other.parameters(), strict=True))


def test_unfitting_arguments_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"must be a multiple of 64 and of its 1 heads, not 100$"):
        VWHead(CHANNELS, 5, channels=100)
    with pytest.raises(ValueError, match=r"four maps, of strides 4, 8, 16 and 32, not 3$"):
        VWHead(CHANNELS[1:], 5)
