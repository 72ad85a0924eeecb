"""Blocks of a net, and their outputs as maps in one layout."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from retinue.utils.arithmetic import ceil_div

BLOCK = re.compile(r"(^|\.)blocks\.\d+$")
# Largest number of tokens beside the map's by which we recognise them: a class token and registers.
MAX_EXTRA = 16


def find_blocks(net: Any) -> dict[str, nn.Module]:
    """Return the blocks of a net by name, in their order; the modules of its feature maps if it has no `blocks`."""
    names = [name for name, _ in net.named_modules() if BLOCK.search(name)]
    outer = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    names = outer or [info["module"] for info in net.feature_info]
    return {name: net.get_submodule(name) for name in names}


def split_tokens(net: Any, output: Any, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return what a block returns as a map (B, H, W, C) and extra tokens (B, E, C), such as a class token.

    Args:
        net: Net with timm's interface.
        output: A map in the net's layout, tokens (B, E + H * W, C), or a tuple that begins with one of both.
        image_size: Height and width of the images, px.

    Raises:
        ValueError: The number of tokens fits no map of the net.
    """
    x = output[0] if isinstance(output, (tuple, list)) else output
    if x.ndim == 4:
        x = x if getattr(net, "output_fmt", "NCHW") == "NHWC" else x.permute(0, 2, 3, 1)
        return x, x.new_empty(len(x), 0, x.shape[-1])
    H, W = token_grid(net, x.shape[1], image_size)
    extra = x.shape[1] - H * W
    return x[:, extra:].unflatten(1, (H, W)), x[:, :extra]


def token_grid(net: Any, tokens: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Return the size (H, W) of the map among so many tokens, of which the first ones may be extra ones.

    Raises:
        ValueError: The number of tokens fits no map of the net.
    """
    for info in net.feature_info:
        H, W = (ceil_div(side, int(info["reduction"])) for side in image_size)
        if 0 <= tokens - H * W <= MAX_EXTRA:
            return H, W
    raise ValueError(f"{tokens} tokens are no map of {type(net).__name__} for images of {image_size} px")


@torch.no_grad()
def record_maps(net: Any, images: Tensor, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Run images (B, C, h, w) and return the output of each block as a map (B, H, W, C).

    Args:
        net: Net with timm's interface.
        images: Normalised images.
        names: Names of modules; by default those of all blocks.
    """
    maps: dict[str, Tensor] = {}
    size = (images.shape[2], images.shape[3])

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            maps[name] = split_tokens(net, output, size)[0]

        return hook

    names = find_blocks(net) if names is None else names
    handles = [net.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        net(images)
    finally:
        for handle in handles:
            handle.remove()
    return maps
