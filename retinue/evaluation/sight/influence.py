"""How much single entries, heads, tokens, channels and paths of a net matter."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.weighting import Values, WeightedSums
from retinue.evaluation.sight.attention import capture, count_heads, find_attention, output_layers, value_layers
from retinue.evaluation.sight.blocks import find_blocks, split_tokens
from retinue.evaluation.sight.rows import all_rows, distances

# Added to 1 - A, which is 0 where all attention goes to one token.
EPS = 1e-6


def influence(net: Any, image: Tensor, module: str) -> tuple[Tensor, tuple[int, int]]:
    """Return the first-order influence of each entry of an attention matrix on the loss, (heads, H * W, H * W).

    E_ij = |A_ij (g_ij - sum_k A_ik g_ik) / (1 - A_ij)| with g = dLoss/dA is the change of the loss if A_ij becomes 0
    and the rest of its row is normalised again (MoA, arXiv:2406.14909). The label is the class that the net predicts.

    Args:
        net: Classifier from images (1, C, h, w) to logits (1, K).
        image: Normalised image.
        module: Name of the attention module.

    Returns:
        The influence between the tokens of the map, and the map's size (H, W).

    Raises:
        ValueError: The module has no attention rows, or it cuts the map before it computes values.
    """
    call = capture(net, image).get(module)
    if call is None:
        raise ValueError(f"{module} reads no map")
    rows = all_rows(call)
    attention = torch.cat([rows.extra, rows.map.flatten(2)], dim=2)
    found: list[Tensor] = []
    values, outputs = value_layers(call.attention), output_layers(call.attention)
    marked = any(isinstance(part, (Values, WeightedSums)) for part in call.attention.modules())
    if marked or len(values) != 1 or len(outputs) != 1:
        raise ValueError(f"{module} has not one layer for values and one that reads their sums, which influence needs")
    [(value_layer, width)], [output_layer] = values, outputs

    def keep_values(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        found.append(output[..., output.shape[-1] - width :].detach())

    def keep_inputs(layer: nn.Module, inputs: Any) -> tuple[Tensor]:
        found.append(inputs[0].detach().requires_grad_())
        return (found[-1],)

    handles = [
        value_layer.register_forward_hook(keep_values),
        output_layer.register_forward_pre_hook(keep_inputs),
    ]
    try:
        with torch.enable_grad():
            logits = net(image)
    finally:
        for handle in handles:
            handle.remove()
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), found[1])
    tokens, heads = attention.shape[2], len(attention)
    width = gradient.shape[-1]
    # Windows would be in another order than the map.
    if len(found) != 2 or any(len(t) != 1 or t.numel() != tokens * width for t in (found[0], gradient)):
        raise ValueError(f"{module} cuts or pads the map before it computes values, so influence cannot be computed")
    values, gradient = (t.reshape(tokens, heads, width // heads).transpose(0, 1).double() for t in (found[0], gradient))
    g, attention = gradient @ values.transpose(1, 2), attention.double()
    mean = (attention * g).sum(-1, keepdim=True)
    change = (attention * (g - mean) / (1 - attention + EPS)).abs()
    return change[:, call.extra :, call.extra :], call.size


def by_distance(matrix: Tensor, size: tuple[int, int]) -> Tensor:
    """Sum a matrix between the tokens of a map (heads, H * W, H * W) over each distance, (heads, longer side).

    The distance is the larger one of both axes, in tokens, so that distance r is the border of a square of side 2r + 1.
    """
    apart = distances(size, math.inf).round().long().to(matrix.device)
    sums = matrix.new_zeros(len(matrix), max(size))
    return sums.index_add_(1, apart.flatten(), matrix.flatten(1))


def span(profile: np.ndarray, share: float = 0.95) -> np.ndarray:
    """Return the smallest distance within which each head has a share of its sum, (heads,)."""
    cumulative = profile.cumsum(-1) / np.maximum(profile.sum(-1, keepdims=True), 1e-300)
    return (cumulative < share - 1e-12).sum(-1).clip(max=profile.shape[-1] - 1)


@torch.no_grad()
def head_importance(net: Any, images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Return the change of loss and accuracy if a head's output is 0, for each head of each attention module.

    Args:
        net: Classifier from images (B, C, h, w) to logits (B, K).
        images: Normalised images.
        labels: Their classes, int64 (B,).

    Raises:
        ValueError: The net has no attention module.
    """
    names = [name for name in find_attention(net) if len(output_layers(net.get_submodule(name))) == 1]
    if not names:
        raise ValueError(f"{type(net).__name__} has no attention modules whose heads could be pruned")
    base = _loss(net, images, labels)
    rows = []
    for name in names:
        module: Any = net.get_submodule(name)
        [layer] = output_layers(module)
        heads = count_heads(module)
        for head in range(heads):
            handle = layer.register_forward_pre_hook(_without(head, heads))
            try:
                loss, accuracy = _loss(net, images, labels)
            finally:
                handle.remove()
            row = {"module": name, "head": head, "loss_change": loss - base[0], "accuracy_change": accuracy - base[1]}
            rows.append(row)
    return rows


def _without(head: int, heads: int) -> Callable[..., Any]:
    def hook(layer: nn.Module, inputs: tuple) -> tuple:
        x = inputs[0].clone()
        width = x.shape[-1] // heads
        x[..., head * width : (head + 1) * width] = 0
        return (x, *inputs[1:])

    return hook


def _loss(net: Any, images: Tensor, labels: Tensor) -> tuple[float, float]:
    logits = net(images)
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).double().mean())


@torch.no_grad()
def massive_channels(net: Any, images: Tensor) -> list[dict[str, Any]]:
    """Return the largest activation of each block's output relative to the median, and its channel and token.

    Massive activations are some hundred times the median or more, in few channels and at few tokens (Sun et al.,
    arXiv:2402.17762); registers take them over (Darcet et al., ICLR 2024, arXiv:2309.16588).
    """
    outputs: dict[str, Any] = {}
    size = (images.shape[2], images.shape[3])
    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: outputs.update({name: output}))
        for name, module in find_blocks(net).items()
    ]
    try:
        net(images)
    finally:
        for handle in handles:
            handle.remove()
    rows = []
    for name, output in outputs.items():
        x, extra = split_tokens(net, output, size)
        W, E = x.shape[2], extra.shape[1]
        values = torch.cat([extra, x.flatten(1, 2)], dim=1).abs()
        token, channel = divmod(int(values.mean(0).argmax()), values.shape[2])
        place = f"extra {token}" if token < E else "{},{}".format(*divmod(token - E, W))
        top, median = float(values.max()), float(values.median())
        norms = values.square().sum(-1).sqrt()
        outliers = float((norms[:, E:] > 3 * norms[:, E:].median()).double().mean())
        rows.append(
            {"block": name, "max": top, "median": median, "ratio": top / max(median, 1e-12), "channel": channel,
             "token": place, "outlier_tokens": outliers}
        )  # fmt: skip
    return rows


def path_contributions(net: Any, images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Return what each path to the classifier does: the change of loss and accuracy without the path.

    A ViT-shaped net with norms before its mixers and MLPs hands the sum of 2D + 1 paths to its final norm: the embedded
    tokens, and what the mixer and the MLP of each of the D blocks add (Chang et al., ICCV 2023, arXiv:2308.06548). A
    path is taken from that sum only, and still feeds the later blocks.

    Args:
        net: Classifier from images (B, C, h, w) to logits (B, K), with `blocks` and `norm`.
        images: Normalised images.
        labels: Their classes, int64 (B,).

    Raises:
        ValueError: The net is not of that kind: its paths do not add up to the input of its final norm.
    """
    name, wanted = type(net).__name__, "needs a ViT-shaped net with `blocks` of norm1 and norm2, and a final `norm`"
    blocks, norm = list(getattr(net, "blocks", [])), getattr(net, "norm", None)
    if not (blocks and norm and all(hasattr(block, "norm1") and hasattr(block, "norm2") for block in blocks)):
        raise ValueError(f"kind=paths {wanted}, not {name}")
    states: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple) -> None:
        states.append(inputs[0])

    layers = [module for block in blocks for module in (block.norm1, block.norm2)] + [norm]
    handles = [module.register_forward_pre_hook(keep) for module in layers]
    with torch.no_grad():
        try:
            base = _loss(net, images, labels)
        finally:
            for handle in handles:
                handle.remove()
        if len(states) != 2 * len(blocks) + 1 or any(state.shape != states[0].shape for state in states):
            raise ValueError(f"kind=paths {wanted}, not {name}: the tokens between its blocks differ in shape")
        paths = {"embedding": states[0]}
        for i, (before, after) in enumerate(pairwise(states)):
            paths[f"{i // 2}.{('mixer', 'mlp')[i % 2]}"] = after - before
        scale = float(states[-1].norm())
        rows = []
        for path, value in paths.items():
            handle = norm.register_forward_pre_hook(lambda module, inputs, value=value: (inputs[0] - value,))
            try:
                loss, accuracy = _loss(net, images, labels)
            finally:
                handle.remove()
            rows.append(
                {"path": path, "norm": float(value.norm()) / scale, "loss_change": loss - base[0],
                 "accuracy_change": accuracy - base[1]}
            )  # fmt: skip
    return rows
