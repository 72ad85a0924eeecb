"""Kinds of sight that are curves, matrices and tables."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retinue.benchmarks.timing import print_rows, write_csv
from retinue.evaluation.sight import features, influence, pictures
from retinue.evaluation.sight.attention import capture
from retinue.evaluation.sight.blocks import find_blocks, record_maps
from retinue.evaluation.sight.rows import all_rows, distances
from retinue.results.sight.subject import SHOWN_BLOCKS, Choices, Subject, choose_attention, choose_blocks

# Number of images in a batch of CKA.
CKA_BATCH = 64


def see_distance(subject: Subject, choices: Choices, out: Path) -> None:
    """Mean distance of attention by head and depth, and attention strength against distance."""
    rows: list[dict[str, Any]] = []
    profiles: dict[str, Any] = {}
    means: dict[str, list[float]] = {}
    calls = capture(subject.net, subject.images[:1])
    names = choose_attention(subject, choices.blocks)
    for name in names:
        heads = []
        for i in range(min(choices.pictures, len(subject.images))):
            call = capture(subject.net, subject.images[i : i + 1])[name]
            heads.append(all_rows(call).map.flatten(2)[:, call.extra :].abs())
        weights = torch.stack(heads).mean(0).cpu()
        size = calls[name].size
        apart = distances(size)
        share = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
        mean = (share * apart).sum(-1).mean(-1)
        stride = subject.images.shape[2] / size[0]
        for head, value in enumerate(mean.tolist()):
            rows.append({"module": name, "head": head, "distance_tokens": value, "distance_pixels": value * stride})
        counts = influence.by_distance(torch.ones_like(weights[:1]), size)
        strength = influence.by_distance(weights, size) / counts.clamp_min(1)
        profiles[name] = strength.mean(0).tolist()
        means[name] = (mean * stride).tolist()
    write_csv(out / "distance.csv", rows)
    longest = max(map(len, profiles.values()))
    panels = {
        "mean distance, px": {
            f"head {h}": [means[name][h] if h < len(means[name]) else math.nan for name in names]
            for h in range(max(map(len, means.values())))
        }
    }
    title = f"attention and distance, {subject.title}"
    pictures.draw_curves(out / "distance.png", panels, names, title, "module")
    strengths = {"mean weight of a token": profiles}
    pictures.draw_curves(out / "strength.png", strengths, list(range(longest)), title, "distance, tokens (longer axis)")
    write_csv(
        out / "strength.csv",
        [{"module": name, "distance": d, "weight": w} for name, ws in profiles.items() for d, w in enumerate(ws)],
    )
    print_rows(rows, subject.title)


def see_cka(subject: Subject, choices: Choices, out: Path) -> None:
    """Linear CKA between all blocks of a net, or of two nets on the same images."""
    other = choices.other or subject
    if not torch.equal(subject.labels, other.labels):
        raise ValueError(f"CKA compares nets on the same test images; those of other={other.title} are others")
    names = [choose_blocks(list(find_blocks(each.net)), choices.blocks) for each in (subject, other)]
    cka = features.MinibatchCKA()
    number = min(len(subject.images), len(other.images))
    size = CKA_BATCH if number >= CKA_BATCH else number
    # A last batch that is not full has too few images for the same precision, so it is left out.
    for start in range(0, number - size + 1, size):
        maps = [
            list(record_maps(each.net, each.images[start : start + size], chosen).values())
            for each, chosen in zip((subject, other), names, strict=True)
        ]
        cka.add(maps[0], maps[1])
    matrix = cka.result()
    title = f"linear CKA, rows: {subject.title}" + (f"; columns: {other.title}" if choices.other else "")
    pictures.draw_matrix(out / "cka.png", matrix, names[0], names[1], title)
    rows = [
        {"block": name} | dict(zip(names[1], row, strict=True))
        for name, row in zip(names[0], matrix.tolist(), strict=True)
    ]
    write_csv(out / "cka.csv", rows)


def _by_depth(
    subject: Subject, choices: Choices, out: Path, kind: str, quantities: Mapping[str, Callable[[Tensor], float]]
) -> None:
    """Write statistics of each block's map: at the data's size of images, and at further ones."""
    names = choose_blocks(list(find_blocks(subject.net)), choices.blocks)
    subjects = {int(subject.images.shape[2]): subject, **choices.resized}
    rows: list[dict[str, Any]] = []
    panels: dict[str, dict[str, list[float]]] = {quantity: {} for quantity in quantities}
    for size, each in subjects.items():
        maps = record_maps(each.net, each.images, names)
        for name in names:
            H, W = maps[name].shape[1:3]
            values = {quantity: function(maps[name]) for quantity, function in quantities.items()}
            rows.append({"block": name, "image_size": size, "map": f"{H}x{W}", **values})
            for quantity, value in values.items():
                panels[quantity].setdefault(f"{size} px", []).append(value)
    pictures.draw_curves(out / f"{kind}.png", panels, names, subject.title, "block")
    write_csv(out / f"{kind}.csv", rows)
    print_rows(rows, subject.title)


def see_frequency(subject: Subject, choices: Choices, out: Path) -> None:
    """Share of high frequencies in the maps, by depth."""
    quantities = {
        "high_frequency_share": features.high_frequency_share,
        "relative_log_amplitude": features.relative_amplitude,
    }
    _by_depth(subject, choices, out, "frequency", quantities)


def see_similarity(subject: Subject, choices: Choices, out: Path) -> None:
    """Similarity of an image's tokens and their effective rank, by depth and size of the images."""
    quantities = {"token_similarity": features.token_similarity, "effective_rank": features.effective_rank}
    _by_depth(subject, choices, out, "similarity", quantities)


def see_influence(subject: Subject, choices: Choices, out: Path) -> None:
    """First-order influence of attention on the loss against distance, and the span that each head needs."""
    rows: list[dict[str, Any]] = []
    data: list[dict[str, Any]] = []
    panels: dict[str, Any] = {}
    for name in choose_attention(subject, choices.blocks, SHOWN_BLOCKS):
        total: Any = 0
        for i in range(min(choices.pictures, len(subject.images))):
            matrix, size = influence.influence(subject.net, subject.images[i : i + 1], name)
            total = total + influence.by_distance(matrix, size)
        profile = (total / min(choices.pictures, len(subject.images))).cpu().numpy()
        for head, (needed, values) in enumerate(zip(influence.span(profile), profile, strict=True)):
            # Only the class token of the last block acts on the scores, so queries of the map have no influence there.
            side = 2 * int(needed) + 1 if values.sum() > 0 else None
            rows.append({"module": name, "head": head, "influence": float(values.sum()), "span_95": side})
            data += [{"module": name, "head": head, "distance": d, "influence": v} for d, v in enumerate(values)]
        shares = profile / np.maximum(profile.sum(1, keepdims=True), 1e-300)
        panels[name] = {f"head {head}": values.cumsum() for head, values in enumerate(shares)}
    longest = max(len(values) for curves in panels.values() for values in curves.values())
    title = f"share of the influence within a distance, {subject.title}"
    pictures.draw_curves(out / "influence.png", panels, list(range(longest)), title, "distance, tokens (longer axis)")
    write_csv(out / "influence.csv", data)
    write_csv(out / "spans.csv", rows)
    print_rows(rows, f"{subject.title}; span_95: side in tokens of the square that holds 95 % of the influence")


def see_heads(subject: Subject, choices: Choices, out: Path) -> None:
    """Change of loss and accuracy without each head."""
    rows = influence.head_importance(subject.net, subject.images, _single_labels(subject))
    _bars(rows, [f"{row['module']} head {row['head']}" for row in rows], out / "heads", subject.title)


def see_paths(subject: Subject, choices: Choices, out: Path) -> None:
    """Change of loss and accuracy without each path to the classifier."""
    rows = influence.path_contributions(subject.net, subject.images, _single_labels(subject))
    _bars(rows, [row["path"] for row in rows], out / "paths", subject.title)


def _single_labels(subject: Subject) -> Tensor:
    if subject.labels.ndim != 1:
        raise ValueError("kind=heads and kind=paths need one class for each image: data of task=classification")
    return subject.labels


def _bars(rows: list[dict[str, Any]], names: list[str], path: Path, title: str) -> None:
    panels = {quantity: [row[quantity] for row in rows] for quantity in ("loss_change", "accuracy_change")}
    pictures.draw_bars(path.with_suffix(".png"), panels, names, title)
    write_csv(path.with_suffix(".csv"), rows)
    print_rows(rows, title)
