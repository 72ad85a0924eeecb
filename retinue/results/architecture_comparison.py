"""Comparison of the nets that searches find with random nets of the same budget, each trained from scratch."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from scipy.stats import kendalltau

from retinue.benchmarks.timing import Row
from retinue.results.architecture_search import ArchitectureSearch, Candidate, SupernetRun
from retinue.results.evolution import Evolution, draw_new
from retinue.runs.training import train
from retinue.utils.paths import CONF


def train_at(folder: Path, overrides: Sequence[str]) -> float:
    """Train by train.py's overrides in a folder, unless the folder has the result; return the accuracy of the test."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", list(overrides))
    cfg.run_dir = str(folder)
    return train(cfg)["test/top1"]


def compare(
    folder: Path, seed: int, budget: int, random: int, supernet: Sequence[str], net: Sequence[str], device: torch.device
) -> list[Row]:
    """Train a supernet, search, and train the net that was found and random ones; return a row for each net.

    The accuracy of a row is that of the net's own training on the test split, which the search never sees.

    Args:
        folder: Folder of the comparison; finished trainings in it are not repeated.
        seed: Seed of the supernet, of the search, of the random nets and of the trainings.
        budget: Maximum number of MACs.
        random: Number of random nets.
        supernet: Overrides of train.py for the supernet.
        net: Overrides of train.py for the nets.
        device: Device that judges candidates.
    """
    place = folder / f"seed-{seed}"
    train_at(place / "supernet", ["task=supernet", "model=vit_resnas_supernet", f"seed={seed}", *supernet])
    run = SupernetRun(place / "supernet", device)
    evolution = Evolution(run.space, run.macs, budget)
    search = ArchitectureSearch(
        run, place / "search", evolution, generations=8, population=60, parents=15, children=15, seed=seed
    )
    found = [ranked[0] for ranked in search.go()][-1]
    rng = np.random.default_rng([seed, len(search.known)])
    drawn = draw_new(lambda: evolution.random(rng), random, [])
    nets = {"found": found} | {f"random-{i}": run.judge(architecture, 0) for i, architecture in enumerate(drawn)}

    def row(name: str, candidate: Candidate) -> Row:
        overrides = [*search.train_overrides(candidate), f"seed={seed}", *net]
        top1 = train_at(place / name, overrides)
        return {
            "what": name, "seed": seed, "top1": top1, "shared_top1": candidate.top1, "shared_loss": candidate.loss,
            "macs": candidate.macs, "params": candidate.params,
        }  # fmt: skip

    return [row(name, candidate) for name, candidate in nets.items()]


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Return for each seed the accuracy of the net that was found and the median of the random nets.

    `tau` is Kendall's rank correlation, over the random nets, between a net's loss with shared weights and the accuracy
    of its own training; 1 says that the supernet ranks the nets rightly.
    """
    summary: list[Row] = []
    correlate: Any = kendalltau
    for seed in dict.fromkeys(row["seed"] for row in rows):
        own = [row for row in rows if row["seed"] == seed]
        random = [row for row in own if row["what"] != "found"]
        accuracy = [float(row["top1"]) for row in random]  # pyright: ignore[reportArgumentType]
        loss = [float(row["shared_loss"]) for row in random]  # pyright: ignore[reportArgumentType]
        found = next(float(row["top1"]) for row in own if row["what"] == "found")  # pyright: ignore[reportArgumentType]
        summary.append({
            "what": f"seed {seed}", "found": found, "median": statistics.median(accuracy), "best_random": max(accuracy),
            "below_found": sum(value < found for value in accuracy), "random": len(accuracy),
            "tau": float(correlate([-value for value in loss], accuracy).statistic),
        })  # fmt: skip
    return summary
