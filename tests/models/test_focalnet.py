"""FocalNets of one resolution."""

from typing import Any

import timm
import torch
import torch.nn.functional as F

from models.backbones.focalnet import PostNormBlock
from tests.models.test_backbones import build


def test_the_base_net_has_a_norm_and_a_scale_after_each_branch():
    torch.manual_seed(0)
    block = PostNormBlock(8, torch.nn.Linear(8, 8))
    for scale in (block.ls1, block.ls2):
        torch.nn.init.normal_(scale.gamma)
    x = torch.randn(2, 4 * 5, 8)
    y = x + block.ls1.gamma * F.layer_norm(block.mixer(x), (8,), eps=1e-6)
    y = y + block.ls2.gamma * F.layer_norm(block.mlp(y), (8,), eps=1e-6)
    assert torch.allclose(block(x, (4, 5)), y, atol=1e-6)
    assert isinstance(build("focalnet_base_iso").blocks[0], PostNormBlock)


def test_tokens_have_no_position():
    """Repeat one patch over an image: all tokens are equal that the zeros around the image do not reach."""
    torch.manual_seed(0)
    net: Any = timm.create_model("focalnet_tiny_iso", depths=(1,)).eval()
    assert net.pos_embed is None and net.cls_token is None and not net.no_weight_decay()
    x = torch.randn(1, 3, 16, 16).repeat(1, 1, 20, 20)
    (m,) = net.forward_intermediates(x, indices=[0], intermediates_only=True)
    # The convolutions with kernels of 3, 5 and 7 tokens reach 1 + 2 + 3 = 6 tokens.
    inner = m[0, :, 8:-8, 8:-8]
    assert torch.allclose(inner, inner[:, :1, :1].expand_as(inner), atol=1e-5)
    assert not torch.allclose(m[0, :, 0, 0], inner[:, 0, 0], atol=1e-3)
