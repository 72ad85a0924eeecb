"""LV-ViT: scores of all tokens, scaled branches, and its nets with sparse attention or fewer tokens."""

import pytest
import torch

from models import load_weights
from tests.models.test_backbones import build


def test_the_scores_are_the_class_tokens_and_half_of_the_largest_of_the_maps():
    net = build("lvvit_tiny", num_classes=3).eval()
    with torch.inference_mode():
        tokens = net.forward_features(torch.randn(2, 3, 33, 50))
        assert tokens.shape == (2, 1 + 3 * 4, 240)
        expected = torch.stack(
            [
                net.head(image[0]) + 0.5 * torch.stack([net.aux_head(token) for token in image[1:]]).max(0).values
                for image in tokens
            ]
        )
        assert torch.allclose(net.forward_head(tokens), expected, atol=1e-6)


def test_a_branch_is_divided_by_the_skip():
    plain, scaled = (build("lvvit_tiny", num_classes=3, depths=(1,), skip=skip).eval() for skip in (1.0, 4.0))
    load_weights(scaled, plain.state_dict())
    with torch.inference_mode():
        tokens = torch.randn(1, 5, 240)
        block, x = scaled.blocks[0], tokens
        x = x + block.mix(block.norm1(x), (2, 2)) / 4
        assert torch.allclose(block(tokens, (2, 2)), x + block.mlp(block.norm2(x)) / 4, atol=1e-6)
        assert not torch.allclose(plain.blocks[0](tokens, (2, 2)), block(tokens, (2, 2)), atol=1e-3)


@pytest.mark.parametrize("name", ["evit_lvvit_small", "sparsifiner_lvvit_small"])
def test_nets_that_keep_everything_are_lvvit(name):
    lvvit = build("lvvit_small", num_classes=3).eval()
    net = build(name, num_classes=3, keep=1.0).eval()
    load_weights(net, lvvit.state_dict())
    x = torch.randn(2, 3, 64, 80)
    with torch.inference_mode():
        assert torch.allclose(net(x), lvvit(x), atol=1e-5)


def test_a_patch_of_an_odd_side_is_refused():
    with pytest.raises(ValueError, match="patch must be an even number of pixels, not 7"):
        build("lvvit_tiny", patch=7)
