"""The path ensemble: a DeiT whose classifier reads a weighted sum of paths."""

from typing import Any

import pytest
import timm
import torch

from models import load_weights
from ops.losses import loss_weights

DEPTH = 3


def build(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, dim=16, heads=2, patch=8, img_size=32, depths=(DEPTH,), num_classes=5, **kwargs)


@pytest.fixture
def nets():
    """Return a DeiT, and a path ensemble with the same weights, in float64 and in evaluation mode."""
    deit, ensemble = build("deit_tiny"), build("path_ensemble_tiny")
    result = load_weights(ensemble, deit.state_dict())
    assert sorted(result.missing) == sorted(name for name in ensemble.state_dict() if "_scale" in name)
    return deit.double().eval(), ensemble.double().eval()


def paths_of(net: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the tokens that each path of a DeiT adds, from the embedding to the last MLP."""
    x, size = net.embed(x)
    paths = [x]
    for block in net.blocks:
        paths.append(block.mix(block.norm1(x), size))
        x = x + paths[-1]
        paths.append(block.mlp(block.norm2(x)))
        x = x + paths[-1]
    return paths


def test_each_path_has_a_weight_per_channel(nets):
    deit, ensemble = (sum(parameter.numel() for parameter in net.parameters()) for net in nets)
    assert ensemble - deit == (2 * DEPTH + 1) * 16


@torch.no_grad()
def test_the_scores_are_those_of_the_weighted_sum(nets):
    deit, ensemble = nets
    x = torch.randn(2, 3, 32, 40, dtype=torch.float64)
    assert torch.allclose(ensemble(x), deit(x), atol=1e-12)
    scales = torch.rand(1 + 2 * DEPTH, 16, dtype=torch.float64)
    ensemble.blocks[0].embedding_scale.copy_(scales[0])
    for i, block in enumerate(ensemble.blocks):
        block.path_scale.copy_(scales[1 + 2 * i : 3 + 2 * i])
    total = sum((scale * path for scale, path in zip(scales, paths_of(deit, x), strict=True)), torch.zeros(()))
    assert torch.allclose(ensemble(x), deit.head(deit.norm(total)[:, 0]), atol=1e-12)


@torch.no_grad()
def test_pruned_paths_feed_later_blocks_only(nets):
    deit, ensemble = nets
    pruned = build("path_ensemble_tiny", prune=["0.mlp", "2.mixer"]).double().eval()
    load_weights(pruned, ensemble.state_dict())
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    paths = paths_of(deit, x)
    total = torch.stack([path for i, path in enumerate(paths) if i not in (2, 5)]).sum(0)
    assert torch.allclose(pruned(x), deit.head(deit.norm(total)[:, 0]), atol=1e-12)


def test_self_distillation_teaches_early_outputs_and_changes_no_scores():
    net, taught = build("path_ensemble_tiny"), build("path_ensemble_tiny", self_distillation=True)
    assert loss_weights(net) == {} and loss_weights(taught) == {"self_distillation": 0.1}
    load_weights(taught, net.state_dict())
    x = torch.randn(2, 3, 32, 32)
    scores, losses = taught.forward_with_losses(x)
    assert torch.equal(scores, net(x)) and torch.equal(taught(x), net(x))
    losses["self_distillation"].backward()
    assert losses["self_distillation"] > 0
    # The long path is the teacher, so neither the last block nor the weights of the sum learn from it.
    assert all(p.grad is None for p in taught.blocks[2].parameters())
    assert all(p.grad is not None for p in [*taught.early_heads.parameters(), *taught.blocks[0].mlp.parameters()])
    taught.reset_classifier(7)
    assert [head.out_features for head in taught.early_heads] == [7, 7]


@pytest.mark.parametrize(
    "kwargs", [{"prune": ["0.mpl"]}, {"prune": ["3.mlp"]}, {"self_distillation": True, "depths": (2,)}]
)
def test_wrong_arguments_are_refused(kwargs):
    with pytest.raises(
        ValueError, match=r"prune names no path of the net|self_distillation needs at least 3 blocks, not 2"
    ):
        timm.create_model("path_ensemble_tiny", **{"depths": (DEPTH,)} | kwargs)
