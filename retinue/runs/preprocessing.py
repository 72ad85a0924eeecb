"""Fill in the preprocessing that a config leaves open, before the run's identity and folder are known.

`data.mean`, `data.std`, `data.crop_pct`, `data.crop_mode`, `data.interpolation` and `data.image_size` are null by
default. A null value becomes, in this order,

1. the value in the config of the run whose checkpoint is loaded,
2. the value that the published weights of the net were trained with, if other weights are loaded,
3. the value of `data.own`, if training starts from nothing.

A detector or segmentor takes only mean and deviation from the weights: a classifier's image size is not its own.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from retinue.runs.launch import rank
from retinue.utils.sizes import pick_size, resolve, size_pixels

# Keys of `data` that a detector or segmentor takes from the weights of its backbone.
DENSE_KEYS = ("mean", "std")


def resolve_preprocessing(cfg: DictConfig) -> None:
    """Set the open values of `cfg.data`, and print what is used and where each value is from, if any was open.

    Raises:
        ValueError: The net is unknown, or the config of the run of the weights is damaged.
    """
    taken = open_values(cfg)
    for key, (value, _) in taken.items():
        OmegaConf.update(cfg, f"data.{key}", value)
    if taken and rank() == 0:
        print(f"preprocessing: {_describe(cfg.data, taken)}", flush=True)


def resolved_data(cfg: Mapping) -> dict[str, Any]:
    """Return the section `data` of a config as plain values, with its open preprocessing filled in."""
    return {**_plain(cfg["data"]), **{key: value for key, (value, _) in open_values(cfg).items()}}


def open_values(cfg: Mapping) -> dict[str, tuple[Any, str]]:
    """Return (value, source) for each key of `data.own` that is null in `data`.

    Args:
        cfg: A composed config, or plain mappings with its keys.

    Raises:
        ValueError: The net is unknown, or the config of the run of the weights is damaged.
    """
    data = _plain(cfg["data"])
    own = data.get("own") or {}
    is_open = [key for key in own if data.get(key) is None]
    if not is_open:
        return {}
    if data["in_chans"] not in (1, 3) or data.get("bands"):
        check_bands(data, is_open)
    taken = {key: (own[key], "the data's own") for key in is_open}
    from_weights = _from_weights(cfg, data)
    is_dense = data["task"] != "classification"
    taken |= {
        key: value for key, value in from_weights.items() if key in is_open and (key in DENSE_KEYS or not is_dense)
    }
    return {
        key: (_fit_channels(value, data["in_chans"]) if key in ("mean", "std") else value, source)
        for key, (value, source) in taken.items()
    }


def check_bands(data: Mapping, is_open: Sequence[str]) -> None:
    """Refuse bands without a mean and a deviation of their own: those of colours mean nothing in the files' units.

    Args:
        data: Section `data` of a config.
        is_open: Keys that are null.

    Raises:
        ValueError: `mean` or `std` is open, or the data set reads no bands.
    """
    if "bands" not in data:
        raise ValueError(f"data.in_chans must be 1 or 3, not {data['in_chans']}; data=image_folder takes bands")
    if missing := [f"data.{key}" for key in DENSE_KEYS if key in is_open]:
        raise ValueError(
            f"data.in_chans={data['in_chans']} needs {' and '.join(missing)} in the files' units: "
            f"python scripts/band_statistics.py root={data['root']} in_chans={data['in_chans']} prints them"
        )


def _fit_channels(values: Sequence[float], in_chans: int) -> list[float]:
    """Return means or deviations for another number of channels: for grey images, the average over the channels.

    timm's weights of grey nets are the sums of the weights for red, green and blue, which have one mean only.
    """
    return list(values) if len(values) == in_chans else [sum(values) / len(values)] * in_chans


def _from_weights(cfg: Mapping, data: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Return (value, source) of each key that belongs to the weights that the config loads; {} if it loads none."""
    weights, run = cfg.get("weights"), cfg.get("run")
    model = _plain(cfg["model"])
    arguments = model | (model.get("args") or {})
    if not (weights or run or arguments.get("pretrained") or arguments.get("checkpoint_path")):
        return {}
    from models.preprocessing import net_preprocessing, read_run, run_config

    config = Path(run) / "config.yaml" if run and not weights else run_config(weights) if weights else None
    saved: dict[str, tuple[Any, str]] = {}
    if config is not None and config.is_file():
        task, values = read_run(config)
        saved = {
            key: (value, f"as in {_relative(config.parent)}")
            for key, value in values.items()
            if key in DENSE_KEYS or (data["task"] == "classification" and task in ("classification", "pretraining"))
        }
    if run and not weights:
        return saved
    if data["image_size"] is None and "image_size" in saved:
        data = {**data, "image_size": saved["image_size"][0]}
    pixels = size_pixels(data)
    name, args = resolve(model, pixels)
    published = net_preprocessing(name, args)
    # The published size of the images must not choose another net than the size of the data does. For example, our own
    # sizes for small images have no published weights.
    sizes, size = model.get("sizes") or {}, model.get("size")
    if pick_size(sizes, size, pixels) != pick_size(sizes, size, max(_sides(published["image_size"]))):
        published.pop("image_size")
    return {key: (value, f"{name}'s own") for key, value in published.items()} | saved


def _describe(data: Mapping, taken: Mapping[str, tuple[Any, str]]) -> str:
    """Return one line on the preprocessing: values with the same source stand together, followed by the source."""
    from models.preprocessing import KEYS

    shown = [key for key in KEYS if key in data and (data["task"] == "classification" or key in DENSE_KEYS)]
    sources = {key: taken[key][1] if key in taken else "given" for key in shown}
    order = list(dict.fromkeys(sources.values()))
    groups = groupby(sorted(shown, key=lambda key: order.index(sources[key])), key=sources.__getitem__)
    return "; ".join(f"{', '.join(_show(key, data[key]) for key in keys)} ({source})" for source, keys in groups)


def _show(key: str, value: Any) -> str:
    if key in DENSE_KEYS:
        return f"{key} {' '.join(f'{number:g}' for number in value)}"
    if key == "crop_pct":
        return f"crop {value:g}"
    if key == "image_size":
        return f"{' x '.join(str(side) for side in _sides(value))} px"
    return str(value)


def _relative(folder: Path) -> Path:
    """Return the folder relative to the working folder if it is below."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _sides(size: Any) -> list[int]:
    return [size] if isinstance(size, int) else list(size)


def _plain(section: Any) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else section
    return dict(plain)
