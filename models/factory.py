"""Create classification nets from a config, and check names, arguments and image sizes on the way."""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg
from torch import nn

from models.gates import insert_gates
from models.layers.pool import insert_gem
from models.reduction import insert_reduction
from retinue.utils.sizes import resolve
from retinue.utils.suggestions import nearest


def create_model(model_cfg: Mapping, num_classes: int, in_chans: int, img_size: int | Sequence[int]) -> nn.Module:
    """Create the classification net of a `conf/model/*.yaml`.

    Args:
        model_cfg: The composed config of the model, or any mapping with its keys; `resolve` explains them.
        num_classes: Number of classes; 0 leaves out the classifier.
        in_chans: Number of image channels.
        img_size: Side of square images, or (height, width), in pixels.

    Raises:
        ValueError: The size, the name or an argument is unknown, or the net cannot take images of `img_size`.

    Example:
        >>> net = create_model({"name": "swin_tiny", "mixers": "agent"}, num_classes=10, in_chans=3, img_size=224)
    """
    image = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
    name, args = resolve(model_cfg, max(image))
    return build(name, image, num_classes=num_classes, in_chans=in_chans, **args)


def check_name(name: str) -> str:
    """Return the name of the architecture: `name` without a tag of weights, as in `resnet50.a1_in1k`.

    Raises:
        ValueError: No net is registered under the name.
    """
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise ValueError(f"no net is called {name!r}.{nearest(architecture, timm.list_models())}")
    return architecture


def build(name: str, image: tuple[int, int] | None = None, **args) -> nn.Module:
    """Call `timm.create_model`, with errors of one line.

    Args:
        name: Name of a net in timm's registry, with or without a tag of weights.
        image: (height, width) of the images in pixels. timm's nets are checked to take them, and built for them if
            they are built for one size; ours take any size.
        args: Arguments of `timm.create_model`, of which `global_pool` may also be "gem", `reduction`, as
            `models.reduction.insert_reduction` reads it, and `gates`, as `models.gates.insert_gates` reads them.

    Raises:
        ValueError: The name or an argument is unknown, or the net cannot take such images.
    """
    architecture = check_name(name)
    gates, reduction = args.pop("gates", None), args.pop("reduction", None)
    gem = args.get("global_pool") == "gem"
    if gem:
        args["global_pool"] = "avg"
    if (gates is not None or reduction is not None) and args.get("features_only"):
        # timm's other wrappers take a net apart.
        args.setdefault("feature_cls", "getter")
    if image is not None:
        if timm.models.model_entrypoint(architecture).__module__.startswith("timm."):
            check_image_size(name, image, args)
        args |= image_size_argument(name, image)
    try:
        net: Any = timm.create_model(name, **args)
    except TypeError as error:
        raise ValueError(_one_line_reason(name, error)) from error
    if gem:
        insert_gem(net)
    if reduction is not None:
        insert_reduction(net, reduction)
    if gates is not None:
        in_chans, *default_size = net.pretrained_cfg["input_size"]
        height, width = image or to_2tuple(args.get("img_size", default_size))
        insert_gates(net, gates, int(args.get("in_chans", in_chans)), (int(height), int(width)))
    return net


def image_size_argument(name: str, image: tuple[int, int]) -> dict[str, Any]:
    """Return the argument `img_size` for a net that is built for images of one size, else {}."""
    cfg = get_pretrained_cfg(name)
    return {"img_size": image} if cfg is not None and cfg.fixed_input_size else {}


def check_image_size(name: str, image: tuple[int, int], args: Mapping) -> None:
    """Run one of timm's nets on the meta device with an image of (height, width) pixels.

    Raises:
        ValueError: The net does not take such an image, or cannot be built at all. In the first case the message
            names the nearest multiples of 16 that the net takes as sides of a square image.
    """
    if _error_for_image(name, image, args) is None:
        return
    cfg = get_pretrained_cfg(name)
    default = cfg.input_size[1:] if cfg is not None else image
    error = _error_for_image(name, default, args)
    if error is not None:
        raise ValueError(_one_line_reason(name, error)) from error
    below = max(image) // 16 * 16
    near = []
    for sides in (range(below, max(below - 256, 0), -16), range(below + 16, below + 272, 16)):
        side = next((side for side in sides if _error_for_image(name, (side, side), args) is None), None)
        if side is not None:
            near.append(str(side))
    sides = ", ".join(near or map(str, default))
    raise ValueError(f"{name} takes no images of {image[0]} x {image[1]} pixels; sides near that it takes: {sides}")


def _error_for_image(name: str, image: tuple[int, int], args: Mapping) -> Exception | None:
    """Build a net on the meta device and run it on one image; return the exception, or None if there is none."""
    try:
        with torch.device("meta"), torch.no_grad():
            net = timm.create_model(name, **image_size_argument(name, image), **{**args, "pretrained": False}).eval()
            patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
            # EfficientViT's patch size is a number: its patches are padded convolutions, which cut no pixels off.
            if isinstance(patch, tuple) and any(side % p for side, p in zip(image, patch, strict=True)):
                raise ValueError("pixels beyond the last whole patch would be cut off")
            net(torch.empty(1, args.get("in_chans", 3), *image))
    except Exception as error:
        # Nets refuse an image size by exceptions of any kind.
        return error
    return None


def _one_line_reason(name: str, error: Exception) -> str:
    """Return one line on why a net cannot be built, with the nearest argument in place of an unknown one."""
    text = str(error).strip().partition("\n")[0]
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unknown:
        with torch.device("meta"):
            arguments = inspect.signature(type(timm.create_model(name)).__init__).parameters
        return f"{name} takes no argument {unknown[1]!r}.{nearest(unknown[1], arguments)}"
    return text if isinstance(error, ValueError) else f"{name} cannot be built: {text or type(error).__name__}"
