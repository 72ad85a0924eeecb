"""Weights of plain ViTs in the nets with grouped queries."""

from typing import Any

import timm
import torch

from models import load_weights


def test_keys_and_values_of_a_plain_vit_are_averaged_over_a_group():
    arguments: Any = {"depth": 2, "embed_dim": 24, "num_heads": 6, "num_classes": 3, "img_size": 32}
    vit = timm.create_model("vit_small_patch16_224", **arguments).eval()
    arguments = {"depths": (2,), "dim": 24, "heads": 6, "num_classes": 3, "img_size": 32}
    state = vit.state_dict()
    net: Any = timm.create_model("kdgqa_small", allocation="uniform", kv_heads=2, **arguments)
    load_weights(net, state)
    for letter, place in (("k", 1), ("v", 2)):
        for kind in ("weight", "bias"):
            heads = state[f"blocks.1.attn.qkv.{kind}"].chunk(3)[place].unflatten(0, (6, 4))
            expected = torch.cat([heads[:3].mean(0), heads[3:].mean(0)])
            assert torch.equal(getattr(net.blocks[1].mixer, letter).get_parameter(kind), expected)

    # With as many key heads as query heads nothing is averaged, so the net equals the ViT.
    net = timm.create_model("kdgqa_small", allocation="uniform", kv_heads=6, **arguments).eval()
    load_weights(net, state)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(net(x), vit(x), atol=1e-5)


def test_the_authors_dynamic_nets_load_without_an_allocation():
    net = timm.create_model("kdgqa_small", allocation="key_average", depths=(1,), num_classes=3)
    state = {key: value for key, value in net.state_dict().items() if not key.endswith(("groups", "passes"))}
    assert set(load_weights(net, state).missing) == {"blocks.0.mixer.groups", "blocks.0.mixer.passes"}
