"""BossNAS's blocks are trained and chosen in turn, and the net that was found is trained."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from models.complexity import complexity
from models.supernets.hytra_space import from_text, paths
from retinue.results.bossnas_search import BlockSearch
from retinue.runs.config import register_resolvers
from retinue.runs.training import build_data
from tests.retinue.runs.cli import CommandLine, result, rows
from tests.retinue.runs.test_resume import assert_a_killed_run_ends_the_same

QUICK = (
    "trainer=cpu", "logger=none", "recipe.epochs=1", "recipe.batch_size=16", "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1", "+model.args.dim=4", "+model.args.hidden=16", "+model.args.out=8",
    "+model.args.layers=1",
)  # fmt: skip


@pytest.mark.slow
def test_blocks_are_chosen_by_their_ratings_and_the_net_is_trained(capfd, monkeypatch, tmp_path):
    cli = CommandLine(capfd, monkeypatch, tmp_path)
    search = ("scripts/search_bossnas", "name=small", "device=cpu", "+model.args.blocks=2", *QUICK)
    first = cli(*search)
    assert first.code == 0, first.err
    folder = Path("outputs/bossnas_search/small")
    start, chosen = 0, []
    for block in range(2):
        ratings = rows(folder / f"ratings-{block}.csv")
        assert {row["path"] for row in ratings} == {str(path[0]) for path in paths(start, 1)}
        distances = [float(row["distance"]) for row in ratings]
        assert distances == sorted(distances) and 0 < distances[0] <= 8
        chosen.append(ratings[0]["path"])
        start = from_text(chosen[-1])[-1].stage
        assert f"block {block}: {chosen[-1]}" in first.out
    assert result(folder / "block-0")["metrics"]["test/n"] == 357

    # All parts before the second block are fixed.
    before, after = (
        torch.load(folder / f"block-{i}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for i in (0, 1)
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(re.search(r"\.(blocks|projectors)\.1\.|predictors\.1\.", name) for name in changed), changed
    assert {name.split(".")[1] for name in changed} == {"online", "target", "predictors"}

    times = [path.stat().st_mtime_ns for path in sorted(folder.rglob("ratings-*.csv"))]
    again = cli(*search)
    assert again.code == 0 and "epoch 1/1" not in again.err
    assert times == [path.stat().st_mtime_ns for path in sorted(folder.rglob("ratings-*.csv"))]

    command = re.findall(r"found: python train\.py (.*)", again.out)[-1]
    trained = cli("train", *shlex.split(command), "trainer=cpu", "logger=none", "recipe.epochs=1",
                  "trainer.limit_train_batches=1", "trainer.limit_val_batches=1", "+model.args.dim=4",
                  "hydra.run.dir=found")  # fmt: skip
    assert trained.code == 0, trained.err


def test_the_views_of_a_rating_are_two_augmentations_of_held_out_training_images(tmp_path):
    register_resolvers()
    search = BlockSearch(tmp_path, QUICK, torch.device("cpu"))
    datamodule = build_data(search.config(0, []))
    assert all(name.startswith("digits/train/") for name in datamodule.names("val"))
    batches = [(one.clone(), other.clone()) for one, other in search.views(datamodule, 128)]
    assert [len(one) for one, _ in batches] == [125, 125]
    for one, other in batches:
        assert one.shape == other.shape == (125, 3, 32, 32)
        assert ((one - other).flatten(1).abs().amax(1) > 0).float().mean() > 0.9
        # Views of the same image are more alike than views of different images.
        assert (one - other).square().mean() < (one - other.roll(1, 0)).square().mean()
    again = list(search.views(datamodule, 128))
    assert all(
        torch.equal(a, b) for pair, same in zip(batches, again, strict=True) for a, b in zip(pair, same, strict=True)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model=swin",), "task=bossnas needs model=hytra_supernet, not a Swin"),
        (("model=hytra_supernet", "recipe.augment.repeats=3"), "recipe.batch_size=64 must be a multiple of 3"),
        (("model=hytra_supernet", "recipe.augment.repeats=1"), "recipe.augment.repeats=1 must be even"),
        (("model=hytra_supernet", "recipe.augment.mixup=0.8"), r"recipe\.augment\.mixup and cutmix must be 0"),
        (
            ("model=hytra_supernet", "trainer.devices=2", "trainer.strategy=ddp"),
            "task=bossnas keeps the views of an image together on one device",
        ),
    ],
)
def test_what_cannot_be_bootstrapped_is_refused_in_one_line(arguments, message, capfd, monkeypatch, tmp_path):
    outcome = CommandLine(capfd, monkeypatch, tmp_path)(
        "train", "task=bossnas", *arguments, "trainer=cpu", "logger=none"
    )
    assert re.search(message, outcome.error)


def test_a_found_net_may_have_stages_without_blocks():
    for encoding in ([[], [1], [1], [0]], [[1], [1], [1, 0], []]):
        net: Any = timm.create_model("bossnet_nano", encoding=encoding, num_classes=3)
        assert net(torch.randn(2, 3, 32, 32)).shape == (2, 3)
        assert complexity(net, 32)[1] > 0
        stride = net.feature_info[-1]["reduction"]
        assert net.forward_intermediates(torch.randn(1, 3, 32, 32))[1][-1].shape[-1] == 32 // stride


@pytest.mark.slow
def test_a_killed_block_ends_the_same(tmp_path):
    block = ("task=bossnas", "model=hytra_supernet", *QUICK, "recipe.epochs=6", "checkpoint.every_steps=1")
    assert_a_killed_run_ends_the_same((*block, "hydra.run.dir=run"), tmp_path)
