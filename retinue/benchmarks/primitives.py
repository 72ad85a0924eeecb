"""Running a formulation of an attention primitive in a layer, and checking that it is exact."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ops.backend import using
from ops.functional import routed_attention, window_attention
from ops.linear import linear_attention
from ops.neighborhood import neighborhood_attention
from retinue.benchmarks.formulations import FORMULATIONS
from retinue.benchmarks.layers import Layer
from retinue.benchmarks.numerics import CHECKED_IMAGES, MAX_OWN_ERROR, first_line, relative_errors

# Primitives that are measured in the layers of nets; the selective scan is measured in whole ops.
PRIMITIVES = {
    "routed_attention": routed_attention,
    "window_attention": window_attention,
    "neighborhood_attention": neighborhood_attention,
    "linear_attention": linear_attention,
}


class Inputs(NamedTuple):
    """Inputs of a layer's primitive, and the gradient of its output.

    Attributes:
        qkv: (B, H, W, 3, heads, D).
        bias: bias of the scores, if the layer has one.
        index: (B, P, topk), routes of routed attention.
        dout: (B, H, W, C).
    """

    qkv: Tensor
    bias: Tensor | None
    index: Tensor | None
    dout: Tensor

    @property
    def batch(self) -> int:
        """Number of images."""
        return len(self.qkv)

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors whose gradients are computed."""
        return [self.qkv] if self.bias is None else [self.qkv, self.bias]

    def for_checking(self) -> "Inputs":
        """Return the inputs of the images that are checked."""
        return Inputs(
            self.qkv.detach()[:CHECKED_IMAGES].requires_grad_(),
            self.bias,
            None if self.index is None else self.index[:CHECKED_IMAGES],
            self.dout[:CHECKED_IMAGES],
        )


def make_inputs(layer: Layer, batch: int, dtype: torch.dtype, device: str | torch.device) -> Inputs:
    """Return random inputs of a layer, the same in every call."""
    torch.manual_seed(0)
    qkv = torch.randn(batch, *layer.size, 3, layer.heads, layer.dim // layer.heads, device=device, dtype=dtype)
    dout = torch.randn(batch, *layer.size, layer.dim, device=device, dtype=dtype)
    bias, index = layer.bias(), layer.index(batch)
    bias = None if bias is None else bias.to(device, dtype).requires_grad_()
    return Inputs(qkv.requires_grad_(), bias, None if index is None else index.to(device), dout)


def make_step(layer: Layer, name: str, inputs: Inputs, train: bool) -> Callable[[], list[Tensor]]:
    """Return a function that computes the output of a formulation, with `train` also the gradients of the inputs.

    Args:
        layer: the layer that calls the primitive.
        name: name of the formulation.
        inputs: what the formulation receives.
        train: compute gradients.
    """
    return _step(layer, FORMULATIONS[layer.primitive][name].attend, inputs, train)


def _step(layer: Layer, attend: Callable[..., Tensor], inputs: Inputs, train: bool) -> Callable[[], list[Tensor]]:
    leaves = inputs.leaves

    def step() -> list[Tensor]:
        with torch.set_grad_enabled(train):
            out = layer.attend(attend, inputs.qkv, inputs.bias, inputs.index)
        return [out.detach(), *torch.autograd.grad(out, leaves, inputs.dout)] if train else [out]

    return step


def exact_results(layer: Layer, inputs: Inputs) -> list[Tensor]:
    """Return output and gradients of plain PyTorch in float64, one image and head at a time to save memory."""
    qkv, bias, index, dout = inputs
    out = torch.empty_like(dout, dtype=torch.float64)
    dqkv = torch.empty_like(qkv, dtype=torch.float64)
    dbias = None if bias is None else torch.zeros_like(bias, dtype=torch.float64)
    D = qkv.shape[-1]
    for b in range(len(qkv)):
        routes = None if index is None else index[b : b + 1]
        for h in range(layer.heads):
            of_head, channels = (slice(b, b + 1), ..., slice(h, h + 1)), slice(h * D, (h + 1) * D)
            x = qkv.detach()[*of_head, :].double().requires_grad_()
            head_bias = None if bias is None else bias.detach()[h : h + 1].double().requires_grad_()
            with using("torch"):
                y = layer.attend(PRIMITIVES[layer.primitive], x, head_bias, routes)
            out[b : b + 1, ..., channels] = y.detach()
            y.backward(dout[b : b + 1, ..., channels].double())
            assert x.grad is not None
            dqkv[*of_head, :] = x.grad
            if dbias is not None and head_bias is not None and head_bias.grad is not None:
                dbias[h : h + 1] += head_bias.grad
    return [out, dqkv] if dbias is None else [out, dqkv, dbias]


def check(layer: Layer, names: Sequence[str], inputs: Inputs) -> dict[str, float]:
    """Return the largest error, of output and gradients, of each formulation relative to that of plain PyTorch.

    A peer is left out if it lacks memory, or if it is external and fails.

    Args:
        layer: the layer that calls the primitive.
        names: names of the formulations; the first one is ours.
        inputs: inputs of the layer, of which `CHECKED_IMAGES` are used.

    Raises:
        ValueError: the error of the first formulation is larger than `MAX_OWN_ERROR`.
    """
    checked = inputs.for_checking()
    exact = exact_results(layer, checked)
    with using("torch"):
        plain = _step(layer, PRIMITIVES[layer.primitive], checked, train=True)()
    errors = {}
    for name in names:
        try:
            computed = make_step(layer, name, checked, train=True)()
        except Exception as error:
            may_fail = FORMULATIONS[layer.primitive][name].external or isinstance(error, torch.OutOfMemoryError)
            if name == names[0] or not may_fail:
                raise
            print(f"{name} is left out of {layer.describe(checked.batch)}: {first_line(error)}")
            continue
        tensor_errors = relative_errors(computed, plain, exact)
        errors[name] = max(tensor_errors)
        if name == names[0] and not errors[name] <= MAX_OWN_ERROR:
            titles = ("output", "gradient of q, k and v", "gradient of the bias")
            raise ValueError(
                f"{name} errs {errors[name]:.3g} times as much as plain PyTorch in the "
                f"{titles[tensor_errors.index(errors[name])]}, more than {MAX_OWN_ERROR}: "
                f"{layer.describe(checked.batch)}, {str(checked.qkv.dtype).removeprefix('torch.')}"
            )
    return errors
