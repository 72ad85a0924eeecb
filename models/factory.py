"""Nets from config."""

import inspect
import re
from collections.abc import Mapping, Sequence
from itertools import islice

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from retinue.utils.sizes import resolve
from retinue.utils.suggestions import nearest


def create_model(model_cfg: Mapping, num_classes: int, in_chans: int, img_size: int | Sequence[int]) -> nn.Module:
    """The classification net of a `conf/model/*.yaml`, as `resolve` reads it.

    Raises:
        ValueError: the size, the name or an argument is unknown, or the net cannot take images of `img_size`.
    """
    image = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
    name, args = resolve(model_cfg, max(image))
    return build(name, image, num_classes=num_classes, in_chans=in_chans, **args)


def check_name(name: str) -> str:
    """The name without the tag of weights that may follow a dot; a ValueError where no net is registered under it."""
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise ValueError(f"no net is called {name!r}.{nearest(architecture, timm.list_models())}")
    return architecture


def build(name: str, image: tuple[int, int] | None = None, **args) -> nn.Module:
    """`timm.create_model`, for images of that size in pixels if one is given.

    Raises:
        ValueError: the name or an argument is unknown, or the net cannot take such images.
    """
    architecture = check_name(name)
    if image is not None:
        if timm.models.model_entrypoint(architecture).__module__.startswith("timm."):  # ours take any size
            check_size(name, image, args)
        args |= sized(name, image)
    try:
        return timm.create_model(name, **args)
    except TypeError as error:
        raise ValueError(_reason(name, error)) from error


def sized(name: str, image: tuple[int, int]) -> dict:
    """The image size as an argument, for nets that are built for one."""
    cfg = get_pretrained_cfg(name)
    return {"img_size": image} if cfg is not None and cfg.fixed_input_size else {}


def check_size(name: str, image: tuple[int, int], args: Mapping) -> None:
    """Raise a ValueError where a net of timm's does not run on such images: tried on the meta device."""
    if _problem(name, image, args) is None:
        return
    cfg = get_pretrained_cfg(name)
    default = cfg.input_size[1:] if cfg is not None else image
    error = _problem(name, default, args)
    if error is not None:
        raise ValueError(_reason(name, error)) from error
    near = []
    for step in (-16, 16):
        start = max(image) // 16 * 16 + max(step, 0)
        tried = (side for side in range(start, start + 16 * step, step) if side > 0)
        near += islice((str(side) for side in tried if _problem(name, (side, side), args) is None), 1)
    sides = ", ".join(near or map(str, default))
    raise ValueError(f"{name} takes no images of {image[0]} x {image[1]} pixels; sides near that it takes: {sides}")


def _problem(name: str, image: tuple[int, int], args: Mapping) -> Exception | None:
    """What keeps a net from being built for such images and run on them."""
    try:
        with torch.device("meta"), torch.no_grad():
            net = timm.create_model(name, **sized(name, image), **{**args, "pretrained": False}).eval()
            patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
            # a number is EfficientViT's, whose padded convolutions cut nothing off
            if isinstance(patch, tuple) and any(side % p for side, p in zip(image, patch, strict=True)):
                raise ValueError("pixels beyond the last whole patch would be cut off")
            net(torch.empty(1, args.get("in_chans", 3), *image))
    except Exception as error:  # nets refuse sizes in every way
        return error
    return None


def _reason(name: str, error: Exception) -> str:
    """One line on why a net cannot be built."""
    text = str(error).strip().partition("\n")[0]
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unknown:
        with torch.device("meta"):
            arguments = inspect.signature(type(timm.create_model(name)).__init__).parameters
        return f"{name} takes no argument {unknown[1]!r}.{nearest(unknown[1], arguments)}"
    return text if isinstance(error, ValueError) else f"{name} cannot be built so: {text or type(error).__name__}"
