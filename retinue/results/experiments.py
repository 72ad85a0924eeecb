"""The rows of the papers' tables that are experiments of conf/experiment, by the names of the experiments."""

import re
from collections.abc import Mapping
from typing import Any

from retinue.results.papers import DENSE_DATA, model_choice, read_paper


def experiments(paper: str) -> dict[str, dict[str, Any]]:
    """Return the rows that a training from scratch on ImageNet-1k reproduces, by the names of their experiments.

    For each net and each row name this is the first row at the smallest images, because rows at larger images and with
    other data are fine-tuned. Rows of other data sets, rows trained by token labelling or distillation and nets that no
    size in conf/model names, whose recipe is unknown, are left out. A row with `train` (overrides of train.py beyond
    the model's own recipe) is an experiment in any case.

    Args:
        paper: Name of the paper.
    """
    rows = [row for row in read_paper(paper)["variants"] if "net" in row and row.get("input")]
    named: dict[str, dict[str, Any]] = {}
    for row in rows:
        smallest = min(other["input"] for other in rows if row["net"] == other["net"] or row["name"] == other["name"])
        choice = dict(part.split("=", 1) for part in model_choice(row["net"], row.get("args", {}), row["input"]))
        from_scratch = (
            row["input"] == smallest
            and row["top1"] is not None
            and row.get("dataset", "ImageNet").startswith("ImageNet")
            and re.fullmatch("(imagenet|in)-1k", row["pretrain"] or "ImageNet-1K", re.IGNORECASE)
            and not re.search("token label|distill", row["name"], re.IGNORECASE)
            and "model.size" in choice
            and row["net"] not in (other["net"] for other in named.values())
        )
        if from_scratch or "train" in row:
            size = str(choice.get("model.size", row["net"]))
            names_pixels = row["input"] == smallest or str(row["input"]) in size
            suffix = "" if names_pixels else f"_{row['input']}"
            named[f"{paper}/{size}{suffix}_in1k"] = row
    return named


def dense_experiments(paper: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return (table, row) of the detectors and segmentors that have a `train`, by the names of their experiments.

    Each row gets the `net` and `args` of the variant that its `backbone` names.

    Args:
        paper: Name of the paper.
    """
    facts = read_paper(paper)
    # Reversed, so that the first of several variants with one name counts.
    variants = {row["name"]: row for row in reversed(facts["variants"]) if "net" in row}
    named: dict[str, tuple[str, dict[str, Any]]] = {}
    for table in DENSE_DATA:
        for row in facts.get(table, []):
            if "train" not in row:
                continue
            variant = variants[row["backbone"]]
            row = row | {key: variant[key] for key in ("net", "args") if key in variant}
            size = model_choice(row["net"], row.get("args", {}), None)[1].partition("=")[2]
            named[f"{paper}/{size}_{head_of_experiment(row)}_{row['schedule'].lower()}"] = (table, row)
    return named


def head_of_experiment(row: Mapping[str, Any]) -> str:
    """Return the choice in conf/head that a row's `train` makes; its first override is `head=...`."""
    return row["train"][0].partition("=")[2]
