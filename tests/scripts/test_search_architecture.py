"""A supernet is trained, searched, and the net that was found is trained."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

from retinue.results.architecture_search import SupernetRun, read_candidates
from retinue.results.evolution import Evolution
from retinue.runs.config import register_resolvers
from retinue.runs.training import train
from retinue.utils.paths import CONF
from scripts import search_architecture
from tests.retinue.runs.cli import CommandLine, result, rows
from tests.retinue.runs.test_resume import assert_a_killed_run_ends_the_same

SUPERNET = (
    "task=supernet", "model=vit_resnas_supernet", "data=digits", "trainer=cpu", "logger=none", "recipe.epochs=2",
    "recipe.batch_size=32", "trainer.limit_train_batches=4",
)  # fmt: skip
SEARCH = ("run=run", "budget_macs=3e6", "population=6", "parents=3", "children=2", "device=cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train a supernet, and return the folder that holds its run."""
    folder = tmp_path_factory.mktemp("supernet")
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", list(SUPERNET))
    cfg.run_dir = str(folder / "run")
    train(cfg)
    return folder


def candidates(folder):
    return [tuple(row.values()) for row in rows(folder / "candidates.csv")]


def test_a_search_is_resumed_and_its_best_net_is_trained(run, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(run)
    search_architecture.main([*SEARCH, "generations=3"])
    folder = run / "run/architectures/3000000-s0"
    whole = candidates(folder)
    assert len(whole) == 6 + 2 * 4
    for candidate in read_candidates(folder):
        assert 0.975 * 3e6 <= candidate.macs <= 3e6

    # A search that was killed in the middle of a line judges only what it lacks.
    lines = (folder / "candidates.csv").read_text().splitlines(keepends=True)
    judged: list[int] = []
    judge = SupernetRun.judge
    monkeypatch.setattr(SupernetRun, "judge", lambda self, *arguments: judged.append(1) or judge(self, *arguments))
    (folder / "candidates.csv").write_text("".join(lines[:8]) + lines[8][:20])
    capfd.readouterr()
    search_architecture.main([*SEARCH, "generations=3"])
    assert candidates(folder) == whole and len(judged) == len(whole) - 7
    search_architecture.main([*SEARCH, "generations=4"])
    assert candidates(folder)[: len(whole)] == whole and len(candidates(folder)) > len(whole)
    with pytest.raises(ValueError, match="holds a search with population=6, not 7"):
        search_architecture.main([*SEARCH[:2], "population=7", *SEARCH[3:]])

    command = re.findall(r"best: python train\.py (.*)", capfd.readouterr().out)[-1]
    cli = CommandLine(capfd, monkeypatch, tmp_path)
    trained = cli("train", *shlex.split(command), "trainer=cpu", "logger=none", "recipe.epochs=1",
                  "trainer.limit_train_batches=1", "hydra.run.dir=found")  # fmt: skip
    assert trained.code == 0, trained.err
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert (result(Path("found"))["macs"], result(Path("found"))["params"]) == (best["macs"], best["params"])


def test_a_candidate_is_judged_by_held_out_training_images_with_the_shared_weights(run):
    register_resolvers()
    supernet = SupernetRun(run / "run", torch.device("cpu"))
    names = supernet.datamodule.names("val")
    assert len(names) == 250 and all(name.startswith("digits/train/") for name in names)
    architecture = Evolution(supernet.space, supernet.macs, 3_000_000).random(np.random.default_rng(0))
    candidate = supernet.judge(architecture, 0)
    net, right, loss = supernet.net(architecture), 0, 0.0
    images = supernet.datamodule.images("val")
    transform = supernet.datamodule.eval_transform
    for i in range(len(images)):
        sample = transform(images[i])
        x = torch.tensor(sample["image"]).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            scores = net((x - 0.309) / 0.349)[0]
        right += int(scores.argmax() == int(images.labels[i]))
        loss -= float(scores.log_softmax(0)[int(images.labels[i])])
    assert candidate.top1 == right / 250 and candidate.loss == pytest.approx(loss / 250, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("task=supernet",), "task=supernet needs model=vit_resnas_supernet, not a BiFormer"),
        (("task=supernet", "model=vit_resnas_supernet", "recipe.ema.decay=0.9"), r"recipe\.ema\.decay=null"),
        (
            ("task=supernet", "data=voc", "model=vit_resnas_supernet"),
            "data=voc is for task=detection, not task=supernet",
        ),
        (("task=supernet", "model=vit_resnas_supernet", "trainer.strategy=fsdp"), r"trainer\.strategy=ddp"),
        (("task=supernet", "model=vit_resnas_supernet", "task.holdout=0"), r"task\.holdout must be .*1"),
    ],
)
def test_what_makes_no_supernet_is_refused_in_one_line(arguments, message, capfd, monkeypatch, tmp_path):
    outcome = CommandLine(capfd, monkeypatch, tmp_path)("train", *arguments, "trainer=cpu", "logger=none")
    assert re.search(message, outcome.error)


def test_other_runs_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"run=nowhere is no run folder"):
        search_architecture.main(["run=nowhere", "budget_macs=3e6"])
    other = tmp_path / "other"
    other.mkdir()
    text = (run / "run/config.yaml").read_text().replace("name: supernet", "name: classification")
    (other / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match="must be a run of task=supernet, not task=classification"):
        search_architecture.main(["run=other", "budget_macs=3e6"])


@pytest.mark.slow
def test_a_killed_supernet_ends_the_same(tmp_path):
    assert_a_killed_run_ends_the_same(
        (*SUPERNET, "recipe.epochs=4", "checkpoint.every_steps=1", "hydra.run.dir=run"), tmp_path
    )
