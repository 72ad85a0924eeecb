"""Influence, importance of heads, sinks and paths, against finite differences and pruned nets."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.factory import build
from ops import create_op
from retinue.evaluation.sight.attention import capture
from retinue.evaluation.sight.influence import (
    by_distance,
    head_importance,
    influence,
    massive_channels,
    path_contributions,
    span,
)
from retinue.evaluation.sight.rows import all_rows

SMALL = {"patch": 4, "depths": (2,), "dim": 24, "heads": 2, "img_size": 16, "num_classes": 5}


class Tiny(nn.Module):
    """Attention on the pixels, a non-linear layer, and a classifier."""

    def __init__(self):
        super().__init__()
        self.mixer: Any = create_op("full", 6, 2)
        self.head = nn.Linear(6, 4)

    def classify(self, mixed: Tensor) -> Tensor:
        return self.head(mixed.tanh().mean((1, 2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.mixer(x.permute(0, 2, 3, 1)))


def test_influence_is_the_derivative_of_the_loss_as_an_entry_vanishes():
    torch.manual_seed(0)
    net = Tiny().double().eval()
    image = 3 * torch.randn(1, 6, 2, 3).double()
    found, size = influence(net, image, "mixer")
    assert size == (2, 3) and found.shape == (2, 6, 6)
    call = capture(net, image)["mixer"]
    attention = all_rows(call).map.flatten(2)
    values = net.mixer.qkv(call.args[0]).flatten(1, 2)[0, :, 12:].unflatten(1, (2, 3)).transpose(0, 1)
    label = net(image).argmax(1)

    @torch.no_grad()
    def loss(weights: Tensor) -> Tensor:
        mixed = net.mixer.proj((weights @ values).transpose(0, 1).flatten(1)).view(1, 2, 3, 6)
        return F.cross_entropy(net.classify(mixed), label)

    step = 1e-6
    for head, i, j in ((0, 0, 0), (0, 3, 1), (1, 5, 2), (1, 2, 4)):
        without = attention[head, i].clone()
        without[j] = 0
        change = torch.zeros_like(attention)
        change[head, i] = without / without.sum() - attention[head, i]
        expected = (loss(attention + step * change) - loss(attention - step * change)).abs() / (2 * step)
        assert float(found[head, i, j]) == pytest.approx(float(expected), rel=1e-4)


def test_spans_hold_their_share():
    matrix = torch.zeros(2, 9, 9)
    # The first head reads the token itself; the second one reads the opposite corner too.
    matrix[:, 4, 4] = 19
    matrix[1, 0, 8] = 2
    profile = by_distance(matrix, (3, 3))
    assert profile.tolist() == [[19, 0, 0], [19, 0, 2]]
    assert span(profile.numpy()).tolist() == [0, 2] and span(profile.numpy(), 0.9).tolist() == [0, 0]
    assert by_distance(torch.ones(1, 9, 9), (3, 3)).tolist() == [[9, 40, 32]]


def test_a_head_without_output_is_a_head_without_weights():
    torch.manual_seed(0)
    net = build("deit_tiny", **SMALL).eval()
    nn.init.normal_(net.head.weight)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    images, labels = torch.randn(6, 3, 16, 16), torch.arange(6) % 5
    rows = head_importance(net, images, labels)
    assert [(row["module"], row["head"]) for row in rows] == [
        (f"blocks.{block}.mixer", head) for block in range(2) for head in range(2)
    ]
    with torch.no_grad():
        before = F.cross_entropy(net(images), labels)
        net.blocks[1].mixer.proj.weight[:, 12:] = 0  # pyright: ignore
        after = F.cross_entropy(net(images), labels)
    assert rows[3]["loss_change"] == pytest.approx(float(after - before), rel=1e-3) and rows[3]["loss_change"] != 0


def test_a_path_that_is_taken_away_is_a_pruned_path():
    torch.manual_seed(0)
    net = build("deit_tiny", **SMALL).eval()
    images, labels = torch.randn(6, 3, 16, 16), torch.arange(6) % 5
    nn.init.normal_(net.head.weight)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    rows = path_contributions(net, images, labels)
    assert [row["path"] for row in rows] == ["embedding", "0.mixer", "0.mlp", "1.mixer", "1.mlp"]
    with torch.no_grad():
        before = F.cross_entropy(net(images), labels)
        for row in rows[1:]:
            pruned = build("path_ensemble_tiny", **SMALL, prune=(row["path"],)).eval()
            pruned.load_state_dict(net.state_dict(), strict=False)
            after = F.cross_entropy(pruned(images), labels)
            assert row["loss_change"] == pytest.approx(float(after - before), rel=1e-3, abs=1e-6)
    assert len({row["loss_change"] for row in rows}) == 5
    with pytest.raises(ValueError, match="kind=paths needs a ViT-shaped net"):
        path_contributions(timm.create_model("resnet18"), images, labels)


def test_a_massive_activation_is_found():
    net: Any = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, reg_tokens=1
    ).eval()
    net.blocks[1].register_forward_hook(
        lambda module, inputs, output: output + 1e4 * F.one_hot(torch.tensor([9 * 24 + 7]), 18 * 24).view(1, 18, 24)
    )
    first, second = massive_channels(net, torch.randn(2, 3, 32, 32))
    assert first["ratio"] < 100 and first["outlier_tokens"] == 0
    # Token 9 is the eighth of the map, after the class token and the register.
    assert (second["channel"], second["token"]) == (7, "1,3") and second["ratio"] > 1000
    assert second["outlier_tokens"] == pytest.approx(1 / 16)
