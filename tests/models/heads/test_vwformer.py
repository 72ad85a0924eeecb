"""VWFormer's decoder."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models import load_weights
from models.heads.vwformer import RATIOS, VWHead, contexts
from tests.models.heads import assert_matches, pyramid, stir, without_gradient
from tests.vectors.claims import HEADS

CHANNELS = (8, 12, 16, 24)
CITY: dict[str, Any] = {"short_cut": False, "city": True}


@pytest.mark.parametrize("name", [name for name in HEADS if name.startswith("vwformer__")])
def test_matches_the_authors_code(name):
    assert_matches(name, HEADS[name])


@pytest.mark.parametrize("form", [{}, CITY], ids=["ade20k", "cityscapes"])
@pytest.mark.parametrize("image", [(250, 310), (40, 33)])
def test_images_of_any_size_train_every_weight(form, image):
    torch.manual_seed(0)
    head = stir(VWHead(CHANNELS, 5, channels=64, num_heads=2, **form))
    size = tuple(-(-side // 4) for side in image)
    logits = head(pyramid(CHANNELS, *size))
    assert logits.shape == (2, 5, *size)
    # a bias of the keys moves all scores of a query alike
    left = without_gradient(head, logits.square().mean())
    assert left <= {f"attention.{i}.attn.k.bias" for i in range(3)}


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("window", [(1, 2), (3, 4), (5, 2)])
def test_contexts_are_the_surroundings_of_the_windows(ratio, window):
    (p, q), C = window, 2
    x = torch.randn(1, C, 8 * p, 8 * q)
    found = contexts(x, ratio)
    assert found.shape == (1, 64, p * q, ratio**2 * C)

    def places(size: int) -> list[int]:
        """Of the lengthened axis, by the authors' slices."""
        own = list(range(8 * size))
        middle = (ratio + 1) * size // 2
        return own[middle : ratio * size] + own + own[-ratio * size : -middle]

    rows, columns = places(p), places(q)
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
            assert torch.equal(found[0, window_row * 8 + window_column, row * q + column], torch.stack(expected))


@pytest.mark.parametrize("image", [(128, 192), (100, 200)])
def test_borders_are_replicated_where_windows_do_not_fit(image):
    torch.manual_seed(0)
    head = VWHead(CHANNELS, 5, channels=64).eval()
    seen = {}
    head.local.register_forward_pre_hook(lambda _, args: seen.update(whole=args[0]))
    head.attention[0].register_forward_pre_hook(lambda _, args: seen.update(padded=args[0]))
    with torch.no_grad():
        head(pyramid(CHANNELS, image[0] // 4, image[1] // 4))
    whole, padded = seen["whole"], seen["padded"]
    h, w = whole.shape[2:]
    assert padded.shape[2:] == (-(-h // 8) * 8, -(-w // 8) * 8)
    assert torch.equal(padded[..., :h, :w], whole)
    assert torch.equal(padded[..., h:, :w], whole[..., -1:, :].expand(-1, -1, padded.shape[2] - h, -1))
    assert torch.equal(padded[..., w:], padded[..., w - 1 : w].expand_as(padded[..., w:]))


def test_each_ratio_reaches_as_far_as_its_context():
    torch.manual_seed(0)
    head = stir(VWHead(CHANNELS, 5, channels=64)).eval()
    x = torch.randn(1, 64, 16, 16, requires_grad=True)  # windows of 2 x 2
    for attention, reach in zip(head.attention, RATIOS, strict=True):
        (gradient,) = torch.autograd.grad(attention(x)[..., 8:10, 8:10].sum(), x)
        rows = gradient.abs().sum((0, 1, 3)).nonzero().flatten()
        # the context of a window of 2, and what the convolution before it reads: reach / 2 - 1 before, reach / 2 after
        first = 9 - reach - (reach // 2 - 1)
        last = 8 + reach + reach // 2
        assert rows.tolist() == list(range(max(0, first), min(16, last + 1)))


def test_half_precision_is_close():
    torch.manual_seed(0)
    for form in ({}, CITY):
        head, maps = stir(VWHead(CHANNELS, 5, channels=64, **form)).eval(), pyramid(CHANNELS, 20, 28)
        with torch.no_grad():
            exact = head(maps)
            with torch.autocast("cpu", torch.bfloat16):
                rough = head(maps)
        assert F.mse_loss(rough.float(), exact).sqrt() < 0.05 * exact.std()


def test_own_weights_load():
    head, other = VWHead(CHANNELS, 5, channels=64), VWHead(CHANNELS, 5, channels=64)
    done = load_weights(other, head.state_dict())
    assert not done.missing and not done.unexpected
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), other.parameters(), strict=True))


def test_what_does_not_divide_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"must be a multiple of 64 and of its 1 heads, not 100$"):
        VWHead(CHANNELS, 5, channels=100)
    with pytest.raises(ValueError, match=r"four maps, of strides 4, 8, 16 and 32, not 3$"):
        VWHead(CHANNELS[1:], 5)
