"""The layers of nets in which attention primitives are measured: shapes, and lower bounds of bytes and FLOPs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from retinue.benchmarks.formulations import Call
from retinue.benchmarks.options import Pair
from retinue.utils.arithmetic import ceil_div, round_up


@dataclass(frozen=True)
class Layer:
    """Equal layers of a net.

    Attributes:
        net: name of the net.
        tokens: tokens of the map, before the op pads it.
        size: (H, W) of the map that the primitive receives, after the op has padded it.
        dim: channels of the map.
        heads: attention heads.
        count: number of such layers in the net.
        primitive: name of the primitive, set by each subclass.
    """

    net: str
    tokens: int
    size: Pair
    dim: int
    heads: int
    count: int

    primitive: ClassVar[str]

    @property
    def keys(self) -> int:
        """Number of keys that each query attends to."""
        raise NotImplementedError

    @property
    def variant(self) -> str:
        """Description of what does not change with the size of the image; layers of one variant are summed."""
        return ""

    @property
    def series(self) -> str:
        """Name that the layer has for every size of the image."""
        name = f"{self.primitive}, {self.net}, {self.heads} heads of {self.dim // self.heads}"
        return comma_separated(name, self.variant)

    def attend(self, formulation: Callable, qkv: Tensor, bias: Tensor | None, index: Tensor | None) -> Tensor:
        """Return what a formulation of the primitive computes for some or all of the heads.

        Args:
            formulation: a function with the arguments of the primitive.
            qkv: (B, H, W, 3, heads, D).
            bias: bias of the scores of these heads, if the layer has one.
            index: (B, P, topk), the windows that each window attends to, for routed attention.

        Returns:
            (B, H, W, heads * D).
        """
        raise NotImplementedError

    def bias(self) -> Tensor | None:
        """Return a random bias of the scores, or None if the layer has none."""
        return None

    def index(self, batch: int) -> Tensor | None:
        """Return random routes of routed attention, (B, P, topk); None for other primitives."""
        return None

    def call(self, batch: int, device: str | torch.device) -> Call:
        """Return the properties of the layer's call that decide which formulations can run."""
        return Call(batch, self.size, torch.device(device).type)

    def describe(self, batch: int) -> str:
        """Return the shape of the layer's map, and its heads, in words."""
        return f"{batch} x {self.size[0]} x {self.size[1]} x {self.dim}, {self.heads} heads"

    def floor(self, batch: int, itemsize: int, train: bool) -> tuple[float, float]:
        """Return the bytes and FLOPs that a fused form needs at least.

        Forward reads queries, keys and values and writes the output: four times the map. Backward reads these and the
        output's gradient and writes three gradients: eight times. Forward has two matrix products, and backward five,
        because it computes the scores again.

        Args:
            batch: images of the batch.
            itemsize: bytes of a value.
            train: count backward, too.
        """
        values = batch * self.size[0] * self.size[1] * self.dim
        return values * itemsize * (12 if train else 4), 2 * values * self.keys * (7 if train else 2)


@dataclass(frozen=True)
class RoutedLayer(Layer):
    """A layer with routed attention.

    Attributes:
        grid: windows along H and W.
        topk: windows that each window attends to.
        fixed: the grid is the same for every size of the image.
    """

    grid: Pair
    topk: int
    fixed: bool

    primitive = "routed_attention"

    @property
    def window_tokens(self) -> int:
        """Tokens of a window."""
        return self.size[0] * self.size[1] // (self.grid[0] * self.grid[1])

    @property
    def keys(self) -> int:
        return self.topk * self.window_tokens

    @property
    def variant(self) -> str:
        return f"{self.grid[0]} x {self.grid[1]} windows" if self.fixed else "windows follow the size"

    def attend(self, formulation: Callable, qkv: Tensor, bias: Tensor | None, index: Tensor | None) -> Tensor:
        return formulation(qkv.flatten(3), index, self.grid, qkv.shape[-2], self.dim**-0.5)

    def index(self, batch: int) -> Tensor:
        windows = self.grid[0] * self.grid[1]
        return torch.rand(batch, windows, windows).topk(self.topk).indices

    def call(self, batch: int, device: str | torch.device) -> Call:
        return Call(batch, self.size, torch.device(device).type, self.window_tokens)

    def describe(self, batch: int) -> str:
        return f"{super().describe(batch)}, {self.topk} of {self.grid[0]} x {self.grid[1]} windows"


@dataclass(frozen=True)
class WindowLayer(Layer):
    """A layer with window attention.

    Attributes:
        window: tokens of a window along H and W.
        shift: tokens by which the windows are shifted along H and W.
    """

    window: Pair
    shift: Pair

    primitive = "window_attention"

    @property
    def keys(self) -> int:
        return self.window[0] * self.window[1]

    def attend(self, formulation: Callable, qkv: Tensor, bias: Tensor | None, index: Tensor | None) -> Tensor:
        return formulation(qkv.flatten(4), bias, qkv.shape[-2], self.window, self.shift)

    @property
    def series(self) -> str:
        return f"{super().series}, {'shifted' if any(self.shift) else 'not shifted'}"

    def bias(self) -> Tensor:
        return torch.randn(self.heads, self.keys, self.keys)

    def describe(self, batch: int) -> str:
        shift = f" shifted by {self.shift[0]} x {self.shift[1]}" if any(self.shift) else ""
        return f"{super().describe(batch)}, windows of {self.window[0]} x {self.window[1]}{shift}"


@dataclass(frozen=True)
class NeighborhoodLayer(Layer):
    """A layer with neighbourhood attention.

    Attributes:
        kernel_size: tokens of a neighbourhood along H and W.
        biased: the scores have a bias by relative position.
        dilation: distance between adjacent tokens of a neighbourhood along H and W.
    """

    kernel_size: Pair
    biased: bool
    dilation: Pair = (1, 1)

    primitive = "neighborhood_attention"

    @property
    def keys(self) -> int:
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def variant(self) -> str:
        dilated = "dilated" if max(self.dilation) > 1 else ""
        return comma_separated("with bias" if self.biased else "no bias", dilated)

    def attend(self, formulation: Callable, qkv: Tensor, bias: Tensor | None, index: Tensor | None) -> Tensor:
        stride, causal = (1, 1), (False, False)
        return formulation(qkv.flatten(3), bias, qkv.shape[-2], self.kernel_size, self.dilation, stride, causal)

    def bias(self) -> Tensor | None:
        return torch.randn(self.heads, *(2 * k - 1 for k in self.kernel_size)) if self.biased else None

    def call(self, batch: int, device: str | torch.device) -> Call:
        return Call(batch, self.size, torch.device(device).type, biased=self.biased)

    def describe(self, batch: int) -> str:
        neighbors = f"{self.kernel_size[0]} x {self.kernel_size[1]} neighbours"
        if max(self.dilation) > 1:
            neighbors += f" {self.dilation[0]} x {self.dilation[1]} apart"
        return f"{super().describe(batch)}, {neighbors}, {self.variant}"


@dataclass(frozen=True)
class LinearLayer(Layer):
    """A layer with linear attention.

    Attributes:
        features: feature map.
        normalization: normalization of the weights.
    """

    features: str
    normalization: str

    primitive = "linear_attention"

    @property
    def variant(self) -> str:
        return f"features {self.features}, normalization {self.normalization}"

    def attend(self, formulation: Callable, qkv: Tensor, bias: Tensor | None, index: Tensor | None) -> Tensor:
        head_dim = qkv.shape[-1]
        tokens, form = qkv.flatten(3).flatten(1, 2), (self.features, self.normalization)
        return formulation(tokens, qkv.shape[-2], *form, head_dim**-0.5, 1e-6).unflatten(1, self.size)

    def describe(self, batch: int) -> str:
        return f"{super().describe(batch)}, {self.variant}"

    def floor(self, batch: int, itemsize: int, train: bool) -> tuple[float, float]:
        """Return the bytes and FLOPs that a fused form needs at least.

        Forward reads queries, keys and values and writes the output. Backward reads these three and the output's
        gradient and writes three gradients. Forward multiplies the map by matrices of a head's channels twice, and
        backward four times.
        """
        values = batch * self.size[0] * self.size[1] * self.dim
        return values * itemsize * (11 if train else 4), 2 * values * self.dim // self.heads * (6 if train else 2)


def comma_separated(*parts: str) -> str:
    """Join the parts that are not empty by commas."""
    return ", ".join(part for part in parts if part)


# Features and normalizations of linear attention; L2ViT's are the first.
LINEAR_FORMS = (("relu", "sum"), ("elu", "sum"), ("softmax", "none"), ("identity", "subtract"))
# For each primitive: a net, then the channels, heads and number of layers of each stage.
NETS = {
    "routed_attention": ("biformer_small", (64, 128, 256), (2, 4, 8), (4, 4, 18)),
    "window_attention": ("swin_tiny", (96, 192, 384, 768), (3, 6, 12, 24), (2, 2, 6, 2)),
    "neighborhood_attention": ("nat_mini", (64, 128, 256, 512), (2, 4, 8, 16), (3, 4, 6, 5)),
    "linear_attention": ("l2vit_tiny", (96, 192, 384, 768), (3, 6, 12, 24), (1, 1, 3, 1)),
}


def layers(primitive: str, image_size: Pair, all_neighborhoods: bool = False) -> list[Layer]:
    """Return the layers of a net that call a primitive.

    Layers with routed attention appear twice unless the image has 224 x 224 pixels: once with 7 x 7 windows, and once
    with a number of windows that grows with the tokens to the power of 2/3. The paper's cost, which grows with the
    tokens to the power of 4/3, holds for the latter.

    Args:
        primitive: name of the primitive.
        image_size: (height, width) of the image in pixels.
        all_neighborhoods: include layers with neighbourhood attention without a bias, which NATTEN supports, too, and
            layers with neighbourhoods that are dilated as far as the map allows, as in every second block of DiNAT.
    """
    return list(_layers(primitive, image_size, all_neighborhoods))


def _layers(primitive: str, image_size: Pair, all_neighborhoods: bool) -> Iterator[Layer]:
    net, *stages = NETS[primitive]
    for stage, (dim, heads, count) in enumerate(zip(*stages, strict=True)):
        H, W = (ceil_div(side, 4 * 2**stage) for side in image_size)
        if primitive == "routed_attention":
            yield _routed_layer(net, (H, W), dim, heads, count, 7, 4**stage, fixed=True)
            following_side = max(4, round(7 * (image_size[0] * image_size[1] / 224**2) ** (1 / 3)))
            if following_side != 7:
                yield _routed_layer(net, (H, W), dim, heads, count, following_side, 4**stage, fixed=False)
        elif primitive == "window_attention":
            window = (min(7, H), min(7, W))
            size = (round_up(H, window[0]), round_up(W, window[1]))
            shift = (3 if H > 7 else 0, 3 if W > 7 else 0)
            if any(shift):
                yield WindowLayer(net, H * W, size, dim, heads, count // 2, window, (0, 0))
                yield WindowLayer(net, H * W, size, dim, heads, count // 2, window, shift)
            else:
                yield WindowLayer(net, H * W, size, dim, heads, count, window, (0, 0))
        elif primitive == "linear_attention":
            for form in LINEAR_FORMS:
                yield LinearLayer(net, H * W, (H, W), dim, heads, count, *form)
        else:
            size = (max(H, 7), max(W, 7))
            for biased in (True, False) if all_neighborhoods else (True,):
                yield NeighborhoodLayer(net, H * W, size, dim, heads, count, (7, 7), biased)
                dilation = (size[0] // 7, size[1] // 7)
                if all_neighborhoods and max(dilation) > 1:
                    yield NeighborhoodLayer(net, H * W, size, dim, heads, count, (7, 7), biased, dilation)


def _routed_layer(
    net: str, size: Pair, dim: int, heads: int, count: int, grid_side: int, topk: int, fixed: bool
) -> RoutedLayer:
    padded_size = (round_up(size[0], grid_side), round_up(size[1], grid_side))
    return RoutedLayer(net, size[0] * size[1], padded_size, dim, heads, count, (grid_side, grid_side), topk, fixed)
