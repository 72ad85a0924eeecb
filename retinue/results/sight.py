"""What a net looks at, each kind as a picture and as data: `scripts/see.py`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from models import load_weights
from ops.backend import set_backend
from retinue.benchmarks.timing import print_rows, write_csv
from retinue.evaluation.sight import features, influence, pictures
from retinue.evaluation.sight.attention import all_rows, attention_rows, capture, distances
from retinue.evaluation.sight.blocks import find_blocks, record_maps
from retinue.evaluation.sight.receptive_field import contributions, covered_area
from retinue.runs.config import check, with_run
from retinue.runs.many import compose_evaluation
from retinue.runs.preprocessing import resolved_data
from retinue.runs.training import build_data, build_task, quiet_libraries
from retinue.utils.files import replacing
from retinue.utils.paths import CONF
from retinue.utils.sizes import model_name, size_pixels
from retinue.utils.suggestions import nearest

# Number of blocks that a picture of images shows, unless the user names blocks.
SHOWN_BLOCKS = 4
# Number of images in a batch of CKA.
CKA_BATCH = 64


@dataclass(frozen=True)
class Subject:
    """Net and test images that are looked at.

    Attributes:
        net: Classifier in evaluation mode, with frozen parameters.
        images: Normalised images (B, C, h, w).
        labels: Their classes, int64 (B,).
        photos: The images as colours from 0 to 1, (B, h, w, 3).
        title: Net, data and weights in one line.
    """

    net: Any
    images: Tensor
    labels: Tensor
    photos: np.ndarray
    title: str


@dataclass(frozen=True)
class Choices:
    """What the user chooses beside the net; `scripts/see.py` explains each.

    Attributes:
        pictures: Number of images that are drawn, and of which attention is computed.
        query: Place of the query as shares of the height and width, from 0 to 1; None for the first extra token.
        blocks: Names of blocks or attention modules; None for a choice.
        method: Method of class activation.
        other: Second net of CKA; None for the same net.
        resized: The same net and images at further sizes, by size in px.
    """

    pictures: int
    query: tuple[float, float] | None
    blocks: Sequence[str] | None
    method: str
    other: Subject | None
    resized: Mapping[int, Subject]


def load(run: Path | None, overrides: Sequence[str], number: int, device: torch.device) -> Subject:
    """Build a net with its weights, and read the first test images.

    Args:
        run: Folder of a run; None for a net that the overrides choose, untrained unless they name `weights`.
        overrides: Overrides of eval.py.
        number: Number of test images; all if there are fewer.
        device: Device that computes.

    Raises:
        ValueError: There is no such run, an override is wrong, or the net is no classifier.
    """
    if run is not None:
        cfg = compose_evaluation(run, overrides)
    else:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("eval", [*overrides, "run_dir=."])
        cfg = with_run(cfg, overrides, ())
    check(cfg)
    if cfg.task.name not in ("classification", "multi_label"):
        raise ValueError(f"see.py is for task=classification or multi_label, not task={cfg.task.name}")
    quiet_libraries()
    set_backend(cfg.ops.backend)
    pl.seed_everything(cfg.seed, verbose=False)
    datamodule = build_data(cfg)
    net: Any = build_task(cfg, datamodule).model
    trained = bool(cfg.weights or cfg.model.get("pretrained"))
    if cfg.weights:
        load_weights(net, cfg.weights)
    net.to(device).eval().requires_grad_(False)
    images, labels = _read(datamodule, number, device)
    data = resolved_data(cfg)
    title = f"{model_name(cfg.model, size_pixels(data))} on {cfg.data.name}"
    return Subject(net, images, labels, _photos(images, data), title if trained else f"{title}, untrained")


def _read(datamodule: Any, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in datamodule.ordered_dataloader("test"):
        batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        batch = datamodule.on_after_batch_transfer(batch, 0)
        readable = batch["index"] >= 0
        images.append(batch["image"][readable].float())
        labels.append(batch["label"][readable])
        if sum(map(len, images)) >= number:
            break
    return torch.cat(images)[:number], torch.cat(labels)[:number]


def _photos(images: Tensor, data: Mapping[str, Any]) -> np.ndarray:
    mean, std = (torch.tensor(list(data[key]), device=images.device).view(1, -1, 1, 1) for key in ("mean", "std"))
    colours = (images * std + mean).clamp(0, 1)
    # Images of one or of many bands are shown as their mean.
    colours = colours if colours.shape[1] == 3 else colours.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return colours.permute(0, 2, 3, 1).cpu().numpy()


def _choose(names: Sequence[str], wanted: Sequence[str] | None, number: int | None = None) -> list[str]:
    """Return the wanted names, or `number` of all names, evenly spread with the last one; None takes all.

    Raises:
        ValueError: A wanted name is not among the names.
    """
    for name in wanted or ():
        if name not in names:
            raise ValueError(f"there is no block {name!r}.{nearest(name, names)} There are: {', '.join(names)}")
    if wanted is not None:
        return list(wanted)
    count = len(names) if number is None else min(number, len(names))
    return [names[(i + 1) * len(names) // count - 1] for i in range(count)]


def _save(path: Path, **arrays: Any) -> None:
    with replacing(path) as temporary:
        np.savez_compressed(temporary, **arrays)


def see_erf(subject: Subject, choices: Choices, out: Path) -> None:
    """Effective receptive field of the central token of some blocks, and the area that holds shares of it."""
    names = _choose(list(find_blocks(subject.net)), choices.blocks, SHOWN_BLOCKS)
    fields = {name: contributions(subject.net, subject.images, name) for name in names}
    areas = {name: covered_area(field) for name, field in fields.items()}
    rows = [{"block": name} | {f"area_{t:.0%}": area for t, area in areas[name].items()} for name in names]
    # The paper draws log10(1 + contribution), with the largest contribution as 1 after the logarithm.
    shown = {name: np.log10(field / len(subject.images) / field.max() * 1e4 + 1) for name, field in fields.items()}
    cells = [[(f"{name}\n99 % in {areas[name][0.99]:.0%} of the area", None, shown[name]) for name in names]]
    pictures.draw_grid(out / "erf.png", cells, f"effective receptive field (log), {subject.title}")
    _save(out / "erf.npz", blocks=np.array(names), fields=np.stack(list(fields.values())))
    write_csv(out / "erf.csv", rows)
    print_rows(rows, subject.title)


def see_attention(subject: Subject, choices: Choices, out: Path) -> None:
    """Attention of a query in each head of some ops, on one row for each op and image."""
    cells, data = [], {}
    for i in range(min(choices.pictures, len(subject.images))):
        calls = capture(subject.net, subject.images[i : i + 1])
        for name in _choose(list(calls), choices.blocks, SHOWN_BLOCKS):
            rows = attention_rows(calls[name], [_query(calls[name], choices.query)])
            heat = rows.map[:, 0].cpu().numpy()
            data[f"{i}/{name}"] = heat
            # Weights below 0, which softmax-free ops have, are drawn by their size.
            shown = [("mean of heads", heat.mean(0)), *((f"head {h}", row) for h, row in enumerate(heat[:8]))]
            caption = f"image {i}\n{name}"
            cells.append(
                [(caption, subject.photos[i], None), *((text, subject.photos[i], np.abs(m)) for text, m in shown)]
            )
    width = max(map(len, cells))
    cells = [row + [("", None, None)] * (width - len(row)) for row in cells]
    pictures.draw_grid(out / "attention.png", cells, f"attention of the query x, {subject.title}", choices.query)
    _save(out / "attention.npz", **data)


def _query(call: Any, query: tuple[float, float] | None) -> int:
    if query is not None:
        return call.token(*query)
    if not call.extra:
        raise ValueError("query=class needs an op with a class token; query=[0.5,0.5] is the middle of the image")
    return 0


def see_routes(subject: Subject, choices: Choices, out: Path) -> None:
    """Regions that a query's op chooses for it, and its attention there, as in BiFormer's figure (arXiv:2303.08810)."""
    if choices.query is None:
        raise ValueError("kind=routes takes a place as query, such as query=[0.5,0.5]")
    cells, data = [], {}
    for i in range(min(choices.pictures, len(subject.images))):
        calls = capture(subject.net, subject.images[i : i + 1])
        row = [(f"image {i}", subject.photos[i], None)]
        for name in _choose(list(calls), choices.blocks, SHOWN_BLOCKS):
            heat = attention_rows(calls[name], [calls[name].token(*choices.query)]).map[:, 0].abs().mean(0)
            routes = (heat > 0).cpu().numpy()
            data[f"{i}/{name}/routes"], data[f"{i}/{name}/attention"] = routes, heat.cpu().numpy()
            # Tokens that the query does not attend to are dark.
            side = np.kron(routes, np.ones((8, 8)))
            photo = torch.from_numpy(subject.photos[i]).permute(2, 0, 1)[None]
            photo = torch.nn.functional.interpolate(photo, side.shape, mode="nearest")[0].permute(1, 2, 0).numpy()
            row += [
                (f"{name}\nroutes: {routes.mean():.0%}", photo * (0.25 + 0.75 * side[..., None]), None),
                ("attention", subject.photos[i], heat.cpu().numpy()),
            ]
        cells.append(row)
    pictures.draw_grid(out / "routes.png", cells, f"routes of the query x, {subject.title}", choices.query)
    _save(out / "routes.npz", **data)


def see_distance(subject: Subject, choices: Choices, out: Path) -> None:
    """Mean distance of attention by head and depth, and attention strength against distance."""
    rows: list[dict[str, Any]] = []
    profiles: dict[str, Any] = {}
    means: dict[str, list[float]] = {}
    calls = capture(subject.net, subject.images[:1])
    names = _choose(list(calls), choices.blocks)
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
            rows.append(
                {"module": name, "head": head, "distance_tokens": value, "distance_pixels": value * stride}
            )
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


def see_gradcam(subject: Subject, choices: Choices, out: Path) -> None:
    """Class activation of the predicted class, on one row for each image."""
    # The library is imported only where it is needed.
    from retinue.evaluation.sight.class_activation import METHODS, class_activation

    if choices.method not in METHODS:
        known = ", ".join(METHODS)
        raise ValueError(f"method must be one of {known}, not {choices.method}.{nearest(choices.method, METHODS)}")
    names = _choose(list(find_blocks(subject.net)), choices.blocks, SHOWN_BLOCKS)
    images, photos = subject.images[: choices.pictures], subject.photos
    found = {name: class_activation(subject.net, images, name, choices.method) for name in names}
    classes = next(iter(found.values()))[1]
    cells = []
    for i in range(len(images)):
        heats = [(name, photos[i], maps[i].cpu().numpy()) for name, (maps, _) in found.items()]
        label = int(subject.labels[i]) if subject.labels.ndim == 1 else "?"
        cells.append([(f"image {i}\npredicted {classes[i]}, true {label}", photos[i], None), *heats])
    pictures.draw_grid(out / "gradcam.png", cells, f"{choices.method}, {subject.title}")
    arrays = {name: maps.cpu().numpy() for name, (maps, _) in found.items()}
    _save(out / "gradcam.npz", classes=np.array(classes), **arrays)


def see_cka(subject: Subject, choices: Choices, out: Path) -> None:
    """Linear CKA between all blocks of a net, or of two nets on the same images."""
    other = choices.other or subject
    names = [_choose(list(find_blocks(each.net)), choices.blocks) for each in (subject, other)]
    cka = features.MinibatchCKA()
    number = min(len(subject.images), len(other.images))
    size = CKA_BATCH if number >= CKA_BATCH else number
    # A last batch that is not full has too few images for the same precision, so it is left out.
    for start in range(0, number - size + 1, size):
        maps = [
            list(record_maps(each.net, each.images[start : start + size], chosen).values())
            for each, chosen in zip((subject, other), names, strict=True)
        ]
        cka.add(*maps)
    matrix = cka.result()
    title = f"linear CKA, rows: {subject.title}" + (f"; columns: {other.title}" if choices.other else "")
    pictures.draw_matrix(out / "cka.png", matrix, *names, title)
    rows = [{"block": name, **dict(zip(names[1], map(float, row), strict=True))} for name, row in zip(names[0], matrix)]
    write_csv(out / "cka.csv", rows)


def see_pca(subject: Subject, choices: Choices, out: Path) -> None:
    """First three principal components of a block's tokens as colours, shared by the images that are drawn."""
    names = _choose(list(find_blocks(subject.net)), choices.blocks, SHOWN_BLOCKS)
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
    pictures.draw_grid(out / "pca.png", cells, f"principal components of tokens, {subject.title}")
    _save(out / "pca.npz", **{name: colours[:number] for name, (colours, _) in found.items()})


def _by_depth(
    subject: Subject, choices: Choices, out: Path, kind: str, quantities: Mapping[str, Callable[[Tensor], float]]
) -> None:
    """Write statistics of each block's map: at the data's size of images, and at further ones."""
    names = _choose(list(find_blocks(subject.net)), choices.blocks)
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
    calls = capture(subject.net, subject.images[:1])
    rows: list[dict[str, Any]] = []
    data: list[dict[str, Any]] = []
    panels: dict[str, Any] = {}
    for name in _choose(list(calls), choices.blocks, None if choices.blocks else SHOWN_BLOCKS):
        total: Any = 0
        for i in range(min(choices.pictures, len(subject.images))):
            matrix, size = influence.influence(subject.net, subject.images[i : i + 1], name)
            total = total + influence.by_distance(matrix, size)
        profile = (total / min(choices.pictures, len(subject.images))).cpu().numpy()
        for head, (needed, values) in enumerate(zip(influence.span(profile), profile, strict=True)):
            side = 2 * int(needed) + 1
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


def see_sinks(subject: Subject, choices: Choices, out: Path) -> None:
    """Massive activations of each block, and the attention that each token receives from all queries."""
    rows = influence.massive_channels(subject.net, subject.images)
    cells, sinks = [], []
    for i in range(min(choices.pictures, len(subject.images))):
        calls = capture(subject.net, subject.images[i : i + 1])
        row = [(f"image {i}", subject.photos[i], None)]
        for name in _choose(list(calls), choices.blocks, SHOWN_BLOCKS):
            found = all_rows(calls[name])
            received, extra = found.map.mean((0, 1)).cpu().numpy(), found.extra.mean((0, 1)).cpu().numpy()
            # Relative to attention that is the same for all tokens.
            uniform = 1 / (received.size + extra.size)
            top = float(received.max() / uniform)
            share = {f"extra_{k}": float(value) for k, value in enumerate(extra)}
            sinks.append({"image": i, "module": name, "top_token_to_uniform": top, **share})
            row.append((f"{name}\ntop {top:.1f} x, extra {extra.sum():.0%}", None, np.maximum(received, 0)))
        cells.append(row)
    pictures.draw_grid(out / "sinks.png", cells, f"attention that tokens receive, {subject.title}")
    write_csv(out / "sinks.csv", sinks)
    write_csv(out / "massive.csv", rows)
    print_rows(rows, f"massive activations, {subject.title}")


KINDS: dict[str, Callable[[Subject, Choices, Path], None]] = {
    "erf": see_erf,
    "attention": see_attention,
    "routes": see_routes,
    "distance": see_distance,
    "gradcam": see_gradcam,
    "cka": see_cka,
    "pca": see_pca,
    "frequency": see_frequency,
    "similarity": see_similarity,
    "influence": see_influence,
    "heads": see_heads,
    "sinks": see_sinks,
    "paths": see_paths,
}
