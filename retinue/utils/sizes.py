"""The net that a config chooses: its size, its registry name and its arguments."""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from retinue.utils.suggestions import nearest
from retinue.utils.tasks import CLASSIFIERS


def resolve(model_cfg: Mapping, pixels: int, under_head: bool = False) -> tuple[str, dict[str, Any]]:
    """Return the registry name and the arguments of the net of a `conf/model/*.yaml`.

    These keys have a meaning of their own:

    - `name`: the net's name in timm's registry.
    - `sizes`: a mapping from the names of sizes to arguments of `timm.create_model`, the net's `name` among them. In
      a size, `images_up_to` is the largest side of an image, in pixels, for which the size is a default, and `dense`
      holds arguments for the net under a detection or segmentation head.
    - `size`: the size to take; null takes the first size that is a default for images of `pixels`.
    - `args`: further arguments.
    - `recipe`: not read here.

    Every other key is an argument too. Arguments outside `sizes` win over those of the size, and null ones are left
    out.

    Args:
        model_cfg: The composed config of the model, or any mapping with its keys.
        pixels: Longer side of the images, in pixels.
        under_head: Return the arguments for the net under a detection or segmentation head.

    Raises:
        ValueError: The size is unknown, or there is no name.
    """
    cfg: Any = OmegaConf.to_container(model_cfg, resolve=True) if OmegaConf.is_config(model_cfg) else model_cfg
    args = dict(pick_size(cfg.get("sizes") or {}, cfg.get("size"), pixels))
    args_under_head = args.pop("dense", {})
    if under_head:
        args |= args_under_head
    args |= {key: value for key, value in cfg.items() if key not in ("recipe", "size", "sizes", "args")}
    args |= cfg.get("args") or {}
    args = {key: value for key, value in args.items() if value is not None}
    args.pop("images_up_to", None)
    name = args.pop("name", None)
    if name is None:
        raise ValueError("model.name must be the name of a net, such as model.name=resnet50")
    return name, args


def size_pixels(data_cfg: Mapping) -> int:
    """Return the side of images, in pixels, by which `resolve` chooses a model's size if the config names none.

    This is the longer side of the images of a `conf/data/*.yaml`; if its `image_size` is null, that of its `own`. The
    small detection and segmentation data sets are an exception: their images are large, but their models are to be the
    smallest, so the side is 1.
    """
    if data_cfg["task"] not in CLASSIFIERS and data_cfg["kind"] == "small":
        return 1
    size = data_cfg["image_size"]
    if size is None:
        size = data_cfg["own"]["image_size"]
    return size if isinstance(size, int) else max(size)


def model_name(model_cfg: Mapping, img_size: int | Sequence[int]) -> str:
    """Return the registry name of the net that `create_model` would create for images of `img_size` pixels."""
    pixels = img_size if isinstance(img_size, int) else max(img_size)
    size = pick_size(model_cfg.get("sizes") or {}, model_cfg.get("size"), pixels)
    return str(size["name"] if size else model_cfg["name"])


def pick_size(sizes: Mapping[str, dict], size: str | None, pixels: int) -> dict:
    """Return the arguments of one size of a model, {} if the model has no sizes.

    Args:
        sizes: Arguments by the size's name, as `resolve` explains them.
        size: Name of the size; None picks the first that is a default for images of `pixels`.
        pixels: Longer side of the images, in pixels.

    Raises:
        ValueError: The size is unknown.
    """
    if not sizes:
        return {}
    if size is None:
        return next(args for args in sizes.values() if pixels <= args.get("images_up_to", pixels))
    if size not in sizes:
        raise ValueError(f"model.size {size!r} is unknown.{nearest(size, sizes)} There are: {', '.join(sizes)}")
    return sizes[size]
