"""Masking of a net's patch embeddings, for masked image modelling with any net."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.func import functional_call

from models.hierarchical import HierarchicalBackbone

# Names of the module that embeds patches in timm's nets, in order of preference
STEMS = ("patch_embed", "stem", "conv_stem", "conv1")


def find_stem(net: Any) -> nn.Module:
    """Return the module that embeds the patches of an image, before positions and blocks.

    Raises:
        ValueError: The net has no such module.
    """
    stems = [getattr(net, name, None) for name in STEMS]
    if isinstance(net, HierarchicalBackbone):
        stems = [net.stages[0].downsample]
    for stem in stems:
        if isinstance(stem, nn.Module) and not isinstance(stem, nn.ModuleList):
            # Some nets run the layers of a sequence one by one.
            in_order = isinstance(stem, nn.Sequential) and type(stem).forward is nn.Sequential.forward
            return stem[-1] if in_order else stem  # pyright: ignore[reportIndexIssue]
    raise ValueError(f"{type(net).__name__} has no patch embedding to mask: none of the modules {', '.join(STEMS)}")


class MaskedStem(nn.Module):
    """Learned token that replaces the masked patch embeddings of a net (SimMIM, arXiv:2111.09886).

    The net is not a part of this module: a hook on its stem replaces the embeddings within `masking`.

    Args:
        net: Net with timm's interface.
        image_size: (height, width) of the images in pixels.
        in_chans: Number of image channels.

    Attributes:
        token: (1, C), the token.
        mask: bool (B, rows, columns), True where patches are masked. Each place covers the same number of embeddings.
            None masks nothing.
        map_channels: Number of channels of the net's last map.

    Raises:
        ValueError: The net has no patch embedding. In a forward pass: the mask's grid does not divide the embeddings'.
    """

    def __init__(self, net: nn.Module, image_size: tuple[int, int], in_chans: int):
        super().__init__()
        stem = find_stem(net)
        self.mask: Tensor | None = None
        shape, last = trace_shapes(net, stem, image_size, in_chans)
        self.map_channels = last[1]
        self.channels_last = len(shape) == 3 or is_channels_last(stem, shape, image_size)
        channels = shape[-1] if self.channels_last else shape[1]
        self.token = nn.Parameter(torch.empty(1, channels))
        trunc_normal_(self.token, std=0.02)
        stem.register_forward_hook(self._replace)

    @contextmanager
    def masking(self, mask: Tensor) -> Iterator[None]:
        """Mask the net's forward passes within the block."""
        self.mask = mask
        try:
            yield
        finally:
            self.mask = None

    def _replace(self, stem: nn.Module, inputs: Any, embeddings: Tensor) -> Tensor | None:
        if self.mask is None:
            return None
        if embeddings.ndim == 3:
            # Tokens (B, N, C) of the whole grid of patches.
            height, width = inputs[0].shape[2:]
            rows = round((embeddings.shape[1] * height / width) ** 0.5)
            covered = resize_mask(self.mask, (rows, embeddings.shape[1] // rows)).flatten(1)[..., None]
        elif self.channels_last:
            covered = resize_mask(self.mask, embeddings.shape[1:3])[..., None]
        else:
            covered = resize_mask(self.mask, embeddings.shape[2:])[:, None]
        token = self.token[0].to(embeddings.dtype)
        token = token if self.channels_last else token[:, None, None]
        return torch.where(covered, token, embeddings)


def resize_mask(mask: Tensor, size: Any) -> Tensor:
    """Return a mask (B, rows, columns) as bool (B, *size): each place is repeated.

    Raises:
        ValueError: `size` is no multiple of the mask's grid.
    """
    rows, columns = mask.shape[1:]
    height, width = size
    if height % rows or width % columns:
        raise ValueError(
            f"a mask of {rows} x {columns} patches does not divide the net's {height} x {width} embeddings: another "
            "method.views.image.mask.patch or data.image_size does"
        )
    return mask.repeat_interleave(height // rows, 1).repeat_interleave(width // columns, 2)


class LastMap(nn.Module):
    """Net that returns its last map (B, C, H, W) after its final norm, by timm's interface."""

    def __init__(self, net: Any):
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        return last_map(self.net, image)


def trace_shapes(
    net: nn.Module, stem: nn.Module, image_size: tuple[int, int], in_chans: int
) -> tuple[torch.Size, torch.Size]:
    """Return the shapes of the stem's output and of the last map for one image; nothing is computed.

    Raises:
        ValueError: The net does not call its stem as one module.
    """
    shapes: list[torch.Size] = []
    hook = stem.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    model = LastMap(net)
    tensors = (*model.named_parameters(), *model.named_buffers())
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    was_training = net.training
    try:
        with torch.no_grad():
            image = torch.empty(1, in_chans, *image_size, device="meta")
            final = functional_call(model.eval(), meta, (image,), tie_weights=False)
    finally:
        hook.remove()
        net.train(was_training)
    if not shapes:
        raise ValueError(f"the patch embeddings of {type(net).__name__} cannot be masked: no module returns them")
    return shapes[0], final.shape


def is_channels_last(stem: nn.Module, shape: torch.Size, image_size: tuple[int, int]) -> bool:
    """Tell whether a stem's maps have `shape` (B, H, W, C), and not (B, C, H, W), by the sides of the image."""
    first, last = (a * image_size[1] == b * image_size[0] for a, b in (shape[2:4], shape[1:3]))
    return last if first != last else str(getattr(stem, "output_fmt", "NCHW")).endswith("NHWC")


def last_map(net: Any, image: Tensor) -> Tensor:
    """Return the last map (B, C, H, W) of a net after its final norm, by timm's interface."""
    return net.forward_intermediates(image, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)[0]


def mask_pixels(mask: Tensor, image: Tensor) -> Tensor:
    """Return a mask (B, rows, columns) as float (B, 1, H, W), 1 at the masked pixels of the image."""
    return F.interpolate(mask[:, None].to(image.dtype), image.shape[2:], mode="nearest")


def split_by_mask(mask: Tensor, masked: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the visible and of the masked patches, int64 (B, N - m) and (B, m), row by row.

    Args:
        mask: bool (B, rows, columns), True at m places of each image.
        masked: m; reading it from the mask would wait for a GPU.
    """
    order = mask.flatten(1).to(torch.uint8).argsort(dim=1, stable=True)
    visible = order.shape[1] - masked
    return order[:, :visible], order[:, visible:]


def patchify(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the patches of images (B, C, H, W) in a grid of rows and columns, (B, rows * columns, C, h, w)."""
    rows, columns = grid
    return image.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Return the rows `index`, int64 (B, n), of x, (B, N, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
