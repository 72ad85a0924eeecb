"""Kinds of sight that are drawn over images: each returns a view, which is written as a picture and as data."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retinue.benchmarks.timing import Row, print_rows, write_csv
from retinue.evaluation.sight import features, pictures
from retinue.evaluation.sight.attention import capture
from retinue.evaluation.sight.blocks import find_blocks, record_maps
from retinue.evaluation.sight.influence import massive_channels
from retinue.evaluation.sight.receptive_field import contributions, covered_area
from retinue.evaluation.sight.rows import all_rows, attention_rows
from retinue.results.sight.subject import SHOWN_BLOCKS, Choices, Subject, choose_attention, choose_blocks
from retinue.utils.arithmetic import ceil_div
from retinue.utils.files import replacing
from retinue.utils.suggestions import nearest


@dataclass(frozen=True)
class View:
    """One kind of sight of a net, ready to be drawn and written.

    Attributes:
        title: What is shown, without the net.
        cells: Rows of cells, as of `retinue.evaluation.sight.pictures.draw_grid`.
        arrays: The data of the cells by name.
        tables: Name of each CSV file -> its rows; the first one is printed.
        mark: Place that is marked in each cell, as shares of the height and width.
    """

    title: str
    cells: Sequence[Sequence[pictures.Cell]]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    mark: tuple[float, float] | None = None


def write_view(kind: str, view: View, net: str, out: Path) -> None:
    """Write a view of a net to a folder: `<kind>.png`, its data `<kind>.npz`, and its tables."""
    pictures.draw_grid(out / f"{kind}.png", view.cells, f"{view.title}, {net}", view.mark)
    if view.arrays:
        save_arrays(out / f"{kind}.npz", view.arrays)
    for name, rows in view.tables.items():
        write_csv(out / f"{name}.csv", rows)
    for rows in list(view.tables.values())[:1]:
        print_rows(rows, net)


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays to an npz file, which appears when it is whole."""
    with replacing(path) as temporary:
        np.savez_compressed(temporary, **arrays)  # pyright: ignore[reportArgumentType]


def view_erf(subject: Subject, choices: Choices) -> View:
    """Effective receptive field of the central token of some blocks, and the area that holds shares of it."""
    names = choose_blocks(list(find_blocks(subject.net)), choices.blocks, SHOWN_BLOCKS)
    fields = {name: contributions(subject.net, subject.images, name) for name in names}
    areas = {name: covered_area(field) for name, field in fields.items()}
    rows: list[Row] = [{"block": name, **{f"area_{t:.0%}": area for t, area in areas[name].items()}} for name in names]
    # The scale is logarithmic as in the paper, here over three decades below the largest contribution.
    shown = {name: np.log10(1 + 1e3 * field / field.max()) for name, field in fields.items()}
    cells = [[(f"{name}\n99 % in {areas[name][0.99]:.0%} of the area", None, shown[name]) for name in names]]
    arrays = {"blocks": np.array(names), "fields": np.stack(list(fields.values()))}
    return View("effective receptive field (log)", cells, arrays, {"erf": rows})


def view_attention(subject: Subject, choices: Choices) -> View:
    """Attention of a query in each head of some ops, on one row for each op and image."""
    cells, data = [], {}
    names = choose_attention(subject, choices.blocks, SHOWN_BLOCKS)
    for i in range(min(choices.pictures, len(subject.images))):
        calls = capture(subject.net, subject.images[i : i + 1])
        for name in names:
            rows = attention_rows(calls[name], [_query(calls[name], choices.query)])
            heat = rows.map[:, 0].cpu().numpy()
            data[f"{i}/{name}"] = heat
            # Weights below 0, which softmax-free ops have, are drawn by their size.
            shown = [("mean of heads", heat.mean(0)), *((f"head {h}", row) for h, row in enumerate(heat[:8]))]
            caption = f"image {i}\n{name}"
            cells.append(
                [(caption, subject.photos[i], None), *((text, subject.photos[i], np.abs(m)) for text, m in shown)]
            )
    return View("attention of the query x", cells, data, mark=choices.query)


def _query(call: Any, query: tuple[float, float] | None) -> int:
    if query is not None:
        return call.token(*query)
    if not call.extra:
        raise ValueError("query=class needs an op with a class token; query=[0.5,0.5] is the middle of the image")
    return 0


def view_routes(subject: Subject, choices: Choices) -> View:
    """Regions that a query's op chooses for it, and its attention there, as in BiFormer's figure (arXiv:2303.08810)."""
    if choices.query is None:
        raise ValueError("kind=routes takes a place as query, such as query=[0.5,0.5]")
    cells, data = [], {}
    names = choose_attention(subject, choices.blocks, SHOWN_BLOCKS)
    for i in range(min(choices.pictures, len(subject.images))):
        calls = capture(subject.net, subject.images[i : i + 1])
        row: list[Any] = [(f"image {i}", subject.photos[i], None)]
        for name in names:
            heat = attention_rows(calls[name], [calls[name].token(*choices.query)]).map[:, 0].abs().mean(0)
            routes = (heat > 0).cpu().numpy()
            data[f"{i}/{name}/routes"], data[f"{i}/{name}/attention"] = routes, heat.cpu().numpy()
            # Tokens that the query does not attend to are dark.
            factor = ceil_div(max(subject.photos[i].shape[:2]), max(routes.shape))
            side = np.kron(routes, np.ones((factor, factor)))
            photo = torch.from_numpy(subject.photos[i]).permute(2, 0, 1)[None]
            photo = torch.nn.functional.interpolate(photo, side.shape, mode="nearest")[0].permute(1, 2, 0).numpy()
            row += [
                (f"{name}\nroutes: {routes.mean():.0%}", photo * (0.25 + 0.75 * side[..., None]), None),
                ("attention", subject.photos[i], heat.cpu().numpy()),
            ]
        cells.append(row)
    return View("routes of the query x", cells, data, mark=choices.query)


def view_gradcam(subject: Subject, choices: Choices) -> View:
    """Class activation of the predicted class, on one row for each image."""
    # The library is imported only where it is needed.
    from retinue.evaluation.sight.class_activation import METHODS, class_activation

    if choices.method not in METHODS:
        known = ", ".join(METHODS)
        raise ValueError(f"method must be one of {known}, not {choices.method}.{nearest(choices.method, METHODS)}")
    names = choose_blocks(list(find_blocks(subject.net)), choices.blocks, SHOWN_BLOCKS)
    images, photos = subject.images[: choices.pictures], subject.photos
    found = {name: class_activation(subject.net, images, name, choices.method) for name in names}
    classes = next(iter(found.values()))[1]
    cells = []
    for i in range(len(images)):
        heats = [(name, photos[i], maps[i].cpu().numpy()) for name, (maps, _) in found.items()]
        label = int(subject.labels[i]) if subject.labels.ndim == 1 else "?"
        cells.append([(f"image {i}\npredicted {classes[i]}, true {label}", photos[i], None), *heats])
    arrays = {name: maps.cpu().numpy() for name, (maps, _) in found.items()}
    return View(choices.method, cells, {"classes": np.array(classes), **arrays})


def view_pca(subject: Subject, choices: Choices) -> View:
    """First three principal components of a block's tokens as colours, shared by the images that are drawn."""
    names = choose_blocks(list(find_blocks(subject.net)), choices.blocks, SHOWN_BLOCKS)
    number = min(choices.pictures, len(subject.images))
    maps = record_maps(subject.net, subject.images, names)
    # The components are those of all images, of which the first are drawn.
    found = {name: features.principal_colours(maps[name]) for name in names}
    cells = [
        [(f"image {i}", subject.photos[i], None)]
        + [
            (f"{name}\n{shares.sum():.0%} of the variance" if not i else "", colours[i], None)
            for name, (colours, shares) in found.items()
        ]
        for i in range(number)
    ]
    arrays = {name: colours[:number] for name, (colours, _) in found.items()}
    return View("principal components of tokens", cells, arrays)


def view_sinks(subject: Subject, choices: Choices) -> View:
    """Massive activations of each block, and the attention that each token receives from all queries."""
    rows = massive_channels(subject.net, subject.images)
    cells, sinks = [], []
    names = choose_attention(subject, choices.blocks, SHOWN_BLOCKS)
    for i in range(min(choices.pictures, len(subject.images))):
        calls = capture(subject.net, subject.images[i : i + 1])
        row: list[Any] = [(f"image {i}", subject.photos[i], None)]
        for name in names:
            found = all_rows(calls[name])
            received, extra = found.map.mean((0, 1)).cpu().numpy(), found.extra.mean((0, 1)).cpu().numpy()
            # Relative to attention that is the same for all tokens.
            uniform = 1 / (received.size + extra.size)
            top = float(received.max() / uniform)
            share = {f"extra_{k}": float(value) for k, value in enumerate(extra)}
            sinks.append({"image": i, "module": name, "top_token_to_uniform": top, **share})
            row.append((f"{name}\ntop {top:.1f} x, extra {extra.sum():.0%}", None, np.maximum(received, 0)))
        cells.append(row)
    return View("attention that tokens receive", cells, tables={"massive": rows, "sinks": sinks})
