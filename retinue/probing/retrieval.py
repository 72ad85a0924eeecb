"""Retrieval by features: average precision and recall, of cosine similarities and of binary codes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retinue.evaluation.statistics import draw_images, percentile_intervals
from retinue.probing.features import Features

# Number of entries of the matrix of similarities that is sorted at a time.
ENTRIES = 2**25


@torch.no_grad()
def retrieve(query: Features, gallery: Features, ranks: Sequence[int], leave_one_out: bool) -> dict[str, np.ndarray]:
    """Rank the gallery for each query by cosine similarity, and by the Hamming distance of binary codes.

    The code of an image has a bit for each channel: whether the value is above the channel's mean over the gallery.
    Gallery images of the query's class are the relevant ones.

    Args:
        query: Features (Q, D) of the queries.
        gallery: Features (N, D) of the images that are searched.
        ranks: Ranks k of the recall.
        leave_one_out: Leave each query out of its gallery, which is the same set of images in the same order.

    Returns:
        Values of the Q queries by figure, float64; NaN for a query without a relevant image: `map`, the average
        precision; `recall<k>`, 1 if one of the first k images is relevant, else 0; and `hamming_map`, the average
        precision by Hamming distance.
    """
    unit_query, unit_gallery = F.normalize(query.values), F.normalize(gallery.values)
    mean = gallery.values.mean(0)
    query_bits, gallery_bits = ((part.values > mean).float() * 2 - 1 for part in (query, gallery))
    parts: list[dict[str, Tensor]] = []
    for rows in torch.arange(len(query.label), device=mean.device).split(max(1, ENTRIES // len(gallery.label))):
        relevant = query.label[rows][:, None] == gallery.label
        similarity = unit_query[rows] @ unit_gallery.T
        # Products of signs: the number of channels minus twice the Hamming distance.
        agreement = query_bits[rows] @ gallery_bits.T
        if leave_one_out:
            own = torch.arange(len(rows), device=rows.device), rows
            relevant[own], similarity[own], agreement[own] = False, -torch.inf, -torch.inf
        found = relevant.gather(1, similarity.topk(min(max(ranks), len(gallery.label))).indices)
        values = {"map": average_precision(similarity, relevant)}
        values |= {f"recall{rank}": found[:, :rank].any(1).double() for rank in ranks}
        values["hamming_map"] = average_precision(agreement, relevant)
        answerable = relevant.any(1)
        parts.append({name: value.masked_fill(~answerable, torch.nan).cpu() for name, value in values.items()})
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


def average_precision(scores: Tensor, relevant: Tensor) -> Tensor:
    """Return the average precision of each row: the mean over the relevant entries of the precision at their rank.

    Entries with equal scores have one rank, the last of theirs, as in scikit-learn; so no order of them is preferred.

    Args:
        scores: (Q, N), higher for entries that come first.
        relevant: bool (Q, N).

    Returns:
        float64 (Q,); 0 for a row without relevant entries.
    """
    ordered, order = scores.sort(dim=1, descending=True)
    hits = relevant.gather(1, order)
    places = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    precision = hits.cumsum(1).double() / places
    last = torch.ones_like(hits)
    last[:, :-1] = ordered[:, :-1] != ordered[:, 1:]
    # Position of the last entry with the same score: the next one that ends a group.
    ends = (places - 1).expand_as(order).masked_fill(~last, scores.shape[1]).flip(1).cummin(1).values.flip(1)
    return (precision.gather(1, ends) * hits).sum(1) / hits.sum(1).clamp(min=1)


def summarise_queries(values: Mapping[str, np.ndarray], *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Return the mean of each figure with its 95 % interval, a percentile bootstrap over the queries.

    Args:
        values: Values of the queries (Q,) by figure; those of a query without a relevant image are NaN.
        resamples: Number of resamples.
        seed: Seed of the bootstrap.

    Returns:
        The figures, `<name>_ci95` of each, and `n`, the number of queries that have a relevant image.

    Raises:
        ValueError: No query has a relevant image.
    """
    table = np.stack(list(values.values()), axis=1)
    table = table[np.isfinite(table).all(1)]
    if not len(table):
        raise ValueError("no query has an image of its class in the gallery")
    draws = draw_images(len(table), resamples, seed)
    resampled = np.stack([counts @ table for counts in draws]) / len(table)
    observed = table.mean(0)
    intervals = percentile_intervals(observed, resampled).tolist()
    figures: dict[str, Any] = {"n": len(table)}
    for name, mean, interval in zip(values, observed.tolist(), intervals, strict=True):
        figures |= {name: mean, f"{name}_ci95": interval}
    return figures
