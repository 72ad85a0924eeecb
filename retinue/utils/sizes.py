"""The net that a config chooses: its size, its registry name and its arguments."""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from retinue.utils.suggestions import nearest


def resolve(model_cfg: Mapping, pixels: int, dense: bool = False) -> tuple[str, dict[str, Any]]:
    """Return the registry name and the arguments of the net that a `conf/model/*.yaml` chooses.

    `sizes` maps names to arguments of `timm.create_model`, `name` among them; `size` picks an entry. If `size` is
    null, the first entry that suits the images is picked: an entry with `images_up_to` is for images of at most so
    many pixels a side. The arguments in an entry's `dense` apply only under a head for detection or segmentation.
    `args` and all other keys except `recipe` are further arguments; null arguments are left out.

    Args:
        model_cfg: the config's section `model`.
        pixels: longer side of the images; see `size_pixels`.
        dense: whether the net is the backbone under a head for detection or segmentation.

    Raises:
        ValueError: the size is unknown, or there is no name.
    """
    cfg: Any = OmegaConf.to_container(model_cfg, resolve=True) if OmegaConf.is_config(model_cfg) else model_cfg
    entry = {**pick_size(cfg.get("sizes") or {}, cfg.get("size"), pixels)}
    entry |= {key: value for key, value in entry.pop("dense", {}).items() if dense}
    direct = {key: value for key, value in cfg.items() if key not in ("recipe", "size", "sizes", "args")}
    args = {key: value for key, value in {**entry, **direct, **(cfg.get("args") or {})}.items() if value is not None}
    args.pop("images_up_to", None)
    name = args.pop("name", None)
    if name is None:
        raise ValueError("model.name must be the name of a net, such as model.name=resnet50")
    return name, args


def size_pixels(data_cfg: Mapping) -> int:
    """Return the longer side of the images of a `conf/data/*.yaml`, by which a model's size is chosen if none is named.

    Small data for detection and segmentation returns 1, so that the smallest size is chosen for its large images too.
    """
    if data_cfg["task"] != "classification" and data_cfg["kind"] == "small":
        return 1
    size = data_cfg["image_size"]
    return size if isinstance(size, int) else max(size)


def model_name(model_cfg: Mapping, img_size: int | Sequence[int]) -> str:
    """Return the registry name of the net that `models.create_model` would make for images of `img_size` pixels."""
    pixels = img_size if isinstance(img_size, int) else max(img_size)
    entry = pick_size(model_cfg.get("sizes") or {}, model_cfg.get("size"), pixels)
    return str(entry["name"] if entry else model_cfg["name"])


def pick_size(sizes: Mapping[str, dict], size: str | None, pixels: int) -> dict:
    """Return the entry of `sizes` called `size`; for None, the first entry that suits images of `pixels` a side.

    Raises:
        ValueError: no size has this name.
    """
    if not sizes:
        return {}
    if size is None:
        return next(entry for entry in sizes.values() if pixels <= entry.get("images_up_to", pixels))
    if size not in sizes:
        raise ValueError(f"model.size {size!r} is unknown.{nearest(size, sizes)} There are: {', '.join(sizes)}")
    return sizes[size]
