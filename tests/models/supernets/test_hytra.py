"""The supernet of BossNAS has BossNet's blocks, and learns from ensembles."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import models  # noqa: F401
from models.supernets.hytra import distance
from models.supernets.hytra_space import STAGES, Choice, encoding, from_text, paths, to_text

SMALL: Any = {"blocks": 2, "layers": 2, "dim": 4, "stem_stride": 1, "hidden": 8, "out": 6}


def supernet(**kwargs) -> Any:
    torch.manual_seed(0)
    net = timm.create_model("hytra_supernet", **SMALL | kwargs)
    for parameter in net.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return net


def is_legal(path, start):
    for stage, conv in path:
        if not start <= stage <= start + 1 or (not conv and stage < 2):
            return False
        start = stage
    return True


@pytest.mark.parametrize(("start", "count"), [(0, 51), (1, 99), (2, 80), (3, 16)])
def test_the_space_is_that_of_the_paper(start, count):
    """The numbers are those of the authors' lists of paths for blocks of four layers."""
    found = paths(start, 4)
    assert len(found) == len(set(found)) == count and all(is_legal(path, start) for path in found)
    assert all(from_text(to_text(path)) == path for path in found)


def test_bossnet_t0_is_in_the_space():
    default: Any = timm.create_model("bossnet_t0").stages
    layers = [
        Choice(i, type(block).__name__ == "ConvBlock") for i, stage in enumerate(default) for block in stage.blocks
    ]
    start, chosen = 0, []
    for block in range(4):
        path = tuple(layers[4 * block : 4 * block + 4])
        assert path in paths(start, 4)
        chosen.append(path)
        start = path[-1].stage
    assert encoding(chosen) == [[1], [1], [1, 1, 1, 0, 1], [0, 0, 0, 1, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("texts", [("1c-2c", "3a-3c"), ("2c-3a", "3c-4a"), ("1c-1c", "1c-2c"), ("2c-3c", "4a-4c")])
@torch.no_grad()
def test_a_path_computes_what_bossnet_computes(texts):
    chosen = [from_text(text) for text in texts]
    net, images = supernet(block=1, chosen=[texts[0]]), torch.randn(4, 3, 32, 30)
    alone: Any = timm.create_model("bossnet_nano", encoding=encoding(chosen), dim=4, squeeze=False, num_classes=0)
    alone.stages[0].downsample.load_state_dict(net.online.stem.state_dict(), strict=False)
    stage, used = 0, [0] * STAGES
    for block, path in enumerate(chosen):
        for layer, choice in zip(net.online.blocks[block], path, strict=True):
            state = layer[str(choice)].block_state(choice.stage > stage)
            target = alone.stages[choice.stage].blocks[used[choice.stage]]
            unset = target.load_state_dict(state, strict=False)
            assert not unset.unexpected_keys
            # The supernet keeps no running statistics.
            assert all("running" in key or "num_batches" in key for key in unset.missing_keys)
            used[choice.stage] += 1
            stage = choice.stage
    alone.train()
    x = net.online.stem(images)
    for block, path in enumerate(chosen):
        x = net.online.run(x, block, path, chosen[block - 1][-1].stage if block else 0)
    torch.testing.assert_close(x, alone.forward_features(images), rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_distance_of_each_path_from_the_mean_of_all():
    net = supernet()
    drawn = net.paths[1:4]
    one, other = torch.randn(2, 3, 5, 3, 32, 32)
    expected = torch.zeros(())
    for mine, theirs in ((one, other), (other, one)):
        projections = [net.project(net.target, x, path) for x, path in zip(theirs, drawn, strict=True)]
        ensemble = torch.stack([F.normalize(projection, dim=1) for projection in projections]).sum(0)
        for x, path in zip(mine, drawn, strict=True):
            prediction = net.predictors[0](net.online.projectors[0](
                net.online.run(net.online.stem(x), 0, path, 0), path[-1].stage))  # fmt: skip
            expected = expected + (F.normalize(prediction, dim=1) - F.normalize(ensemble, dim=1)).square().sum(1).mean()
    torch.testing.assert_close(net.loss(one, other, drawn), expected)


@pytest.mark.parametrize(("block", "chosen"), [(0, []), (1, ["1c-2c"])])
def test_all_of_the_trained_block_learns_and_nothing_else(block, chosen):
    net = supernet(block=block, chosen=chosen)
    one, other = torch.randn(2, len(net.paths), 3, 3, 32, 32)
    net.loss(one, other, net.paths).backward()
    parts = (f"online.blocks.{block}.", f"online.projectors.{block}.", f"predictors.{block}.")
    parts = (*parts, "online.stem.") if not block else parts
    start = net.start
    for name, parameter in net.named_parameters():
        assert parameter.requires_grad == name.startswith(parts), name
        if parameter.requires_grad and is_reachable(name, start):
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def is_reachable(name, start):
    """Tell whether a path that begins at the stage uses a parameter of the online branch or of a predictor."""
    parts = name.split(".")
    if parts[1] == "projectors" and parts[3] == "reduce":
        return start <= int(parts[4]) <= start + 2
    if parts[1] != "blocks":
        return True
    layer, stage, entry = int(parts[3]), int(parts[4][0]) - 1, parts[5] == "reduce"
    # Biases before a batch norm have no effect.
    if name.endswith("peg.bias"):
        return False
    if entry:
        return start < stage <= start + layer + 1
    if parts[6] in ("downsample", "conv1", "peg", "bn1") and not entry:
        return start <= stage <= start + layer if int(parts[2]) or layer else True
    return start <= stage <= start + layer + 1


@torch.no_grad()
def test_the_rating_is_the_distance_from_the_ensemble_of_all_paths():
    net = supernet()
    one, other = torch.randn(2, 4, 3, 32, 32)
    rating = net.rate(one, other, net.paths)
    for i, path in enumerate(net.paths):
        expected = 0.0
        for mine, theirs in ((one, other), (other, one)):
            ensemble = torch.stack([net.project(net.target, theirs, p) for p in net.paths]).sum(0)
            expected += distance(net.predict(mine, path), ensemble)
        torch.testing.assert_close(rating[i].mean(), expected)


def test_no_batch_norm_keeps_statistics_and_the_target_is_a_copy():
    net: Any = timm.create_model("hytra_supernet", **SMALL)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert norms and all(norm.running_mean is None for norm in norms)
    for online, target in net.trained_pairs():
        assert online is not target and torch.equal(online, target)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": 2}, r"block=2 must be below 2"),
        ({"block": 1}, r"with a chosen path for each block before"),
        ({"block": 1, "chosen": ["1c-3c"]}, "1c-3c is no path from stage 1"),
        ({"block": 1, "chosen": ["1x"]}, "a path is written as 1c-2c-3a-3a, not '1x'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        supernet(**arguments)
