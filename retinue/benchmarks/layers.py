"""The attention primitives as they stand in the layers of nets: shapes, inputs, floors, and how exact they must be."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ops.functional import routed_attention, window_attention
from ops.neighborhood import neighborhood_attention
from retinue.benchmarks.peers import PRIMITIVES, Call, Pair, backend
from retinue.benchmarks.timing import interleave

CHECKED_IMAGES = 2  # of a batch, as many as show a mistake between images
EXACT, MEANT = 2, 4  # of plain PyTorch's error: ours must be as exact, others that round scores less so


@dataclass(frozen=True)
class Layer:
    """Layers of a net that are alike.

    `size` is the map that the primitive takes, padded where the op pads it; `tokens` are those of the map itself.
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
        """That each query sees."""
        raise NotImplementedError

    @property
    def variant(self) -> str:
        """What stays when the image grows."""
        return ""

    @property
    def series(self) -> str:
        """The same for every size of the image."""
        where = f"{self.primitive}, {self.net}, {self.heads} heads of {self.dim // self.heads}"
        return ", ".join(filter(None, (where, self.variant)))

    def attend(self, formulation: Callable, qkv: Tensor, bias: Tensor | None, index: Tensor | None) -> Tensor:
        """A formulation of the primitive on some of the heads: `qkv` is (B, H, W, 3, heads, D)."""
        raise NotImplementedError

    def bias(self) -> Tensor | None:
        return None

    def index(self, batch: int) -> Tensor | None:
        return None

    def call(self, batch: int, device: str | torch.device) -> Call:
        return Call(batch, self.size, torch.device(device).type)

    def describe(self, batch: int) -> str:
        return f"{batch} x {self.size[0]} x {self.size[1]} x {self.dim}, {self.heads} heads"

    def floor(self, batch: int, itemsize: int, train: bool) -> tuple[float, float]:
        """Bytes and FLOPs that the fused form cannot do without.

        Forward reads queries, keys and values and writes the output: four times the map. Backward reads these and the
        output's gradient and writes three gradients: eight times. Of products of matrices forward has two, backward
        five: the scores are computed again.
        """
        values = batch * self.size[0] * self.size[1] * self.dim
        return values * itemsize * (12 if train else 4), 2 * values * self.keys * (7 if train else 2)


@dataclass(frozen=True)
class RoutedLayer(Layer):
    grid: Pair
    topk: int
    fixed: bool  # the grid does not follow the size

    primitive = "routed_attention"

    @property
    def keys(self) -> int:
        return self.topk * self.call(1, "cpu").window_tokens

    @property
    def variant(self) -> str:
        return f"{self.grid[0]} x {self.grid[1]} windows" if self.fixed else "windows follow the size"

    def attend(self, formulation: Callable, qkv: Tensor, bias: Tensor | None, index: Tensor | None) -> Tensor:
        return formulation(qkv.flatten(3), index, self.grid, qkv.shape[-2], self.dim**-0.5)

    def index(self, batch: int) -> Tensor:
        windows = self.grid[0] * self.grid[1]
        return torch.rand(batch, windows, windows).topk(self.topk).indices

    def call(self, batch: int, device: str | torch.device) -> Call:
        tokens = self.size[0] * self.size[1] // (self.grid[0] * self.grid[1])
        return Call(batch, self.size, torch.device(device).type, tokens)

    def describe(self, batch: int) -> str:
        return f"{super().describe(batch)}, {self.topk} of {self.grid[0]} x {self.grid[1]} windows"


@dataclass(frozen=True)
class WindowLayer(Layer):
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
        return f"{super().series}, {'' if any(self.shift) else 'not '}shifted"

    def bias(self) -> Tensor:
        return torch.randn(self.heads, self.keys, self.keys)

    def describe(self, batch: int) -> str:
        shift = f" shifted by {self.shift[0]} x {self.shift[1]}" if any(self.shift) else ""
        return f"{super().describe(batch)}, windows of {self.window[0]} x {self.window[1]}{shift}"


@dataclass(frozen=True)
class NeighborhoodLayer(Layer):
    kernel: Pair
    biased: bool

    primitive = "neighborhood_attention"

    @property
    def keys(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def variant(self) -> str:
        return "with bias" if self.biased else "no bias"

    def attend(self, formulation: Callable, qkv: Tensor, bias: Tensor | None, index: Tensor | None) -> Tensor:
        plain = ((1, 1), (1, 1), (False, False))  # dilation, stride, causal sides
        return formulation(qkv.flatten(3), bias, qkv.shape[-2], self.kernel, *plain)

    def bias(self) -> Tensor | None:
        return torch.randn(self.heads, *(2 * k - 1 for k in self.kernel)) if self.biased else None

    def call(self, batch: int, device: str | torch.device) -> Call:
        return Call(batch, self.size, torch.device(device).type, biased=self.biased)

    def describe(self, batch: int) -> str:
        kernel = f"{self.kernel[0]} x {self.kernel[1]} neighbours"
        return f"{super().describe(batch)}, {kernel}, {self.variant}"


PLAIN = {
    "routed_attention": routed_attention,
    "window_attention": window_attention,
    "neighborhood_attention": neighborhood_attention,
}
ROUTED = ("biformer_small", (64, 128, 256), (2, 4, 8), (4, 4, 18))  # net, channels, heads and layers of its stages
WINDOW = ("swin_tiny", (96, 192, 384, 768), (3, 6, 12, 24), (2, 2, 6, 2))
NEIGHBORHOOD = ("nat_mini", (64, 128, 256, 512), (2, 4, 8, 16), (3, 4, 6, 5))


def layers(primitive: str, resolution: Pair, unbiased: bool = False) -> list[Layer]:
    """A net's layers of a primitive on an image of `resolution`.

    Routed attention stands there twice for images that are not of 224 pixels: on 7 x 7 windows, and on so many that
    their number grows with the tokens to the power of 2/3, on which the paper's cost, of the power of 4/3, depends.
    """
    return list(_layers(primitive, resolution, unbiased))


def _layers(primitive: str, resolution: Pair, unbiased: bool) -> Iterator[Layer]:
    nets = {"routed_attention": ROUTED, "window_attention": WINDOW, "neighborhood_attention": NEIGHBORHOOD}
    net, *stages = nets[primitive]
    for stage, (dim, heads, count) in enumerate(zip(*stages, strict=True)):
        H, W = (-(-n // (4 * 2**stage)) for n in resolution)
        if primitive == "routed_attention":
            follows = max(4, round(7 * (resolution[0] * resolution[1] / 224**2) ** (1 / 3)))
            for fixed, side in ((True, 7), *[(False, follows)] * (follows != 7)):
                size = _padded((H, W), (side, side))
                yield RoutedLayer(net, H * W, size, dim, heads, count, (side, side), 4**stage, fixed)
        elif primitive == "window_attention":
            window = (min(7, H), min(7, W))
            shift = (3 * (H > 7), 3 * (W > 7))
            for moved in sorted({(0, 0), shift}):
                layers_so = count if not any(shift) else count // 2
                yield WindowLayer(net, H * W, _padded((H, W), window), dim, heads, layers_so, window, moved)
        else:
            size = (max(H, 7), max(W, 7))
            for biased in (True, *[False] * unbiased):
                yield NeighborhoodLayer(net, H * W, size, dim, heads, count, (7, 7), biased)


def _padded(size: Pair, multiple: Pair) -> Pair:
    return (-(-size[0] // multiple[0]) * multiple[0], -(-size[1] // multiple[1]) * multiple[1])


class Inputs(NamedTuple):
    qkv: Tensor  # (B, H, W, 3, heads, D)
    bias: Tensor | None
    index: Tensor | None
    dout: Tensor  # (B, H, W, C)

    def __len__(self) -> int:
        return len(self.qkv)


def make_inputs(layer: Layer, batch: int, dtype: torch.dtype, device: str | torch.device) -> Inputs:
    torch.manual_seed(0)
    qkv = torch.randn(batch, *layer.size, 3, layer.heads, layer.dim // layer.heads, device=device, dtype=dtype)
    dout = torch.randn(batch, *layer.size, layer.dim, device=device, dtype=dtype)
    bias, index = layer.bias(), layer.index(batch)
    bias = None if bias is None else bias.to(device, dtype).requires_grad_()
    return Inputs(qkv.requires_grad_(), bias, None if index is None else index.to(device), dout)


def make_step(layer: Layer, name: str, inputs: Inputs, train: bool) -> Callable[[], list[Tensor]]:
    """A function that returns the output of a formulation, or with `train` also the gradients of its inputs."""
    attend = PRIMITIVES[layer.primitive][name].attend
    qkv, bias, index, dout = inputs
    given = [qkv] if bias is None else [qkv, bias]

    def step() -> list[Tensor]:
        with torch.set_grad_enabled(train):
            out = layer.attend(attend, qkv, bias, index)
        return [out.detach(), *torch.autograd.grad(out, given, dout)] if train else [out]

    return step


def truth(layer: Layer, inputs: Inputs) -> list[Tensor]:
    """Output and gradients of plain PyTorch in float64, image by image and head by head, so that memory suffices."""
    qkv, bias, index, dout = inputs
    out = torch.empty_like(dout, dtype=torch.float64)
    dqkv = torch.empty_like(qkv, dtype=torch.float64)
    dbias = None if bias is None else torch.zeros_like(bias, dtype=torch.float64)
    D = qkv.shape[-1]
    for b in range(len(qkv)):
        for h in range(layer.heads):
            own, channels = (slice(b, b + 1), ..., slice(h, h + 1)), slice(h * D, (h + 1) * D)
            x = qkv.detach()[*own, :].double().requires_grad_()
            of_head = None if bias is None else bias.detach()[h : h + 1].double().requires_grad_()
            with backend("torch"):
                y = layer.attend(PLAIN[layer.primitive], x, of_head, None if index is None else index[b : b + 1])
            out[b : b + 1, ..., channels] = y.detach()
            y.backward(dout[b : b + 1, ..., channels].double())
            assert x.grad is not None
            dqkv[*own, :] = x.grad
            if dbias is not None and of_head is not None and of_head.grad is not None:
                dbias[h : h + 1] += of_head.grad
    return [out, dqkv] if dbias is None else [out, dqkv, dbias]


def errors(
    ours: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], least: float = 0.0
) -> tuple[float, int]:
    """How many times plain PyTorch's error in the same type ours is, at most of all tensors, and of which one.

    Errors are root mean squares; to plain PyTorch's, which may be 0, half a rounding of the greatest value is added,
    or of `least` where that is more.
    """
    times = []
    for a, b, c in zip(ours, plain, exact, strict=True):
        error, allowed = (float((t.double() - c).square().mean().sqrt()) for t in (a, b))
        allowed += torch.finfo(b.dtype).eps / 2 * max(float(c.abs().max()), least)
        times.append(error / allowed if error == error else float("inf"))
    worst = max(range(len(times)), key=times.__getitem__)
    return times[worst], worst


def check(layer: Layer, names: Sequence[str], inputs: Inputs) -> dict[str, float]:
    """How many times plain PyTorch's error that of each formulation is, in its output and in every gradient.

    Of peers, those that fail where they may are left out.

    Raises:
        ValueError: that of the first, which is ours, is more than twice as large.
    """
    few = Inputs(
        inputs.qkv.detach()[:CHECKED_IMAGES].requires_grad_(),
        inputs.bias,
        None if inputs.index is None else inputs.index[:CHECKED_IMAGES],
        inputs.dout[:CHECKED_IMAGES],
    )
    exact = truth(layer, few)
    with backend("torch"):
        out = layer.attend(PLAIN[layer.primitive], few.qkv, few.bias, few.index)
    given = [few.qkv] if few.bias is None else [few.qkv, few.bias]
    plain = [out.detach(), *torch.autograd.grad(out, given, few.dout)]
    found = {}
    for name in names:
        try:
            ours = make_step(layer, name, few, train=True)()
        except Exception as error:
            may_fail = PRIMITIVES[layer.primitive][name].foreign or isinstance(error, torch.OutOfMemoryError)
            if name == names[0] or not may_fail:
                raise
            print(f"{name} is left out of {layer.describe(len(few))}: {first_line(error)}")
            continue
        found[name], worst = errors(ours, plain, exact)
        if name == names[0] and not found[name] <= EXACT:
            what = ("output", "gradient of q, k and v", "gradient of the bias")[worst]
            raise ValueError(
                f"{name} errs {found[name]:.3g} times as much as plain PyTorch in the {what}, more than {EXACT}: "
                f"{layer.describe(len(few))}, {str(few.qkv.dtype).removeprefix('torch.')}"
            )
    return found


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def device_rates(device: torch.device, dtype: torch.dtype, rounds: int = 10) -> tuple[float, float]:
    """Bytes/s that copying moves, read and written, and FLOP/s of a product of matrices: what floors are told by."""
    cuda = device.type == "cuda"
    source = torch.empty(2**30 if cuda else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = 8192 if cuda else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    calls: Mapping[str, Callable[[], object]] = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    timings = interleave(calls, rounds, on_gpu=cuda)
    return 2 * source.numel() / timings["copy"].median, 2 * n**3 / timings["product"].median
