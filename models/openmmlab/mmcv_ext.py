"""Stand-in for mmcv's compiled extension, from torchvision and plain PyTorch, on any device.

mmcv-lite comes without `mmcv._ext`, whose functions the Python side of `mmcv.ops` calls. `install` puts this module in
its place; where a compiled mmcv is installed, that one stays. Signatures are mmcv's: results are written into the
arguments that are given for them. Half precision is computed in float32. Here are the functions that the heads of
`conf/head/` call, soft-NMS and deformable convolution, which their variants use; any other raises when it is called.

mmcv: https://github.com/open-mmlab/mmcv (2.1.0).
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401  # registers the operators
from torch import Tensor

NAME = "mmcv._ext"
kernels: Any = torch.ops.torchvision


def install() -> bool:
    """Put this module at `mmcv._ext` before `mmcv.ops` is imported; False where a compiled one is there."""
    if NAME not in sys.modules and importlib.util.find_spec(NAME) is None:
        sys.modules[NAME] = sys.modules[__name__]
    return sys.modules.get(NAME) is sys.modules[__name__]


def __getattr__(name: str) -> Callable:
    """mmcv looks up every function at import."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> None:
        raise ValueError(f"mmcv's operator {name} needs a compiled mmcv: only mmcv-lite is installed")

    return missing


def _single(*tensors: Tensor) -> list[Tensor]:
    return [t.float() if t.dtype in (torch.half, torch.bfloat16) else t for t in tensors]


# --- non-maximum suppression ---


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Indices kept of boxes (N, 4) xyxy, best score first; `offset` 1 counts the last pixel into a width."""
    boxes, scores = _single(boxes, scores)
    if offset:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], 1)
    return kernels.nms(boxes, scores.to(boxes.dtype), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (arXiv:1704.04503): kept boxes and lowered scores into `dets` (N, 5), their indices returned.

    Args:
        method: 0 drops what overlaps, 1 lowers its score by the overlap, 2 by a Gaussian of it.
    """
    boxes, scores = _single(boxes, scores)
    scores, area = scores.clone(), (boxes[:, 2:] - boxes[:, :2] + offset).prod(1)
    alive, keep = torch.ones_like(scores, dtype=torch.bool), []
    while alive.any():
        i = int(scores.where(alive, -torch.inf).argmax())
        dets[len(keep), :4], dets[len(keep), 4] = boxes[i], scores[i]
        keep.append(i)
        alive[i] = False
        low, high = torch.maximum(boxes[i, :2], boxes[:, :2]), torch.minimum(boxes[i, 2:], boxes[:, 2:])
        shared = (high - low + offset).clamp(min=0).prod(1)
        iou = shared / (area[i] + area - shared)
        if method == 2:
            factor = torch.exp(-iou.square() / sigma)
        else:
            factor = torch.where(iou < iou_threshold, 1.0, 1 - iou if method == 1 else 0.0)
        scores = torch.where(alive, scores * factor, scores)
        alive &= scores >= min_score
    return torch.tensor(keep, dtype=torch.long)


# --- RoIAlign ---


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average RoIAlign (arXiv:1703.06870) of maps (B, C, H, W) in rois (N, 5), their image's index first."""
    if pool_mode != 1:
        raise ValueError("RoIAlign with pool_mode='max' needs a compiled mmcv")
    x, rois = _single(input, rois)
    size = (aligned_height, aligned_width)
    output.copy_(kernels.roi_align(x, rois.to(x.dtype), spatial_scale, *size, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    grad, rois = _single(grad_output, rois)
    sizes = (aligned_height, aligned_width, *grad_input.shape)
    back = kernels._roi_align_backward(grad, rois.to(grad.dtype), spatial_scale, *sizes, sampling_ratio, aligned)
    grad_input.copy_(back)


# --- focal loss ---


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss (arXiv:1708.02002) of each logit (N, K) for labels (N,), K being the background."""
    (x,) = _single(input)
    hot, p = _one_hot(x, target), x.sigmoid()
    positive = -alpha * (1 - p) ** gamma * F.logsigmoid(x)
    negative = -(1 - alpha) * p**gamma * F.logsigmoid(-x)
    output.copy_(torch.where(hot, positive, negative) * _weights(weight))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    (x,) = _single(input)
    hot, p = _one_hot(x, target), x.sigmoid()
    positive = alpha * (1 - p) ** gamma * (gamma * p * F.logsigmoid(x) - (1 - p))
    negative = (1 - alpha) * p**gamma * (p - gamma * (1 - p) * F.logsigmoid(-x))
    grad_input.copy_(torch.where(hot, positive, negative) * _weights(weight))


def _one_hot(x: Tensor, target: Tensor) -> Tensor:
    return target[:, None] == torch.arange(x.shape[1], device=x.device)


def _weights(weight: Tensor) -> Tensor | float:
    """Of the classes (K,); an empty tensor stands for none."""
    return weight if weight.numel() else 1.0


# --- deformable convolution, v1 (arXiv:1703.06211) and v2 with a mask (arXiv:1811.11168) ---


def _arguments(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: Sequence[int],
    groups: Sequence[int],
) -> tuple:
    """Those of torchvision's operator. `geometry`: stride, padding and dilation, each of height, then of width."""
    m = x.new_zeros(len(x), 1) if mask is None else mask
    b = x.new_zeros(len(weight)) if bias is None else bias
    return (*_single(x, weight, offset, m, b), *geometry, *groups, mask is not None)


def deform_conv_forward(
    input, weight, offset, output, columns, ones,
    kW, kH, dW, dH, padW, padH, dilationW, dilationH, group, deformable_group, im2col_step,
):  # fmt: skip
    geometry, groups = (dH, dW, padH, padW, dilationH, dilationW), (group, deformable_group)
    output.copy_(kernels.deform_conv2d(*_arguments(input, weight, offset, None, None, geometry, groups)))


def deform_conv_backward_input(
    input, offset, gradOutput, gradInput, gradOffset, weight, columns,
    kW, kH, dW, dH, padW, padH, dilationW, dilationH, group, deformable_group, im2col_step,
):  # fmt: skip
    geometry, groups = (dH, dW, padH, padW, dilationH, dilationW), (group, deformable_group)
    arguments = _arguments(input, weight, offset, None, None, geometry, groups)
    grads = kernels._deform_conv2d_backward(*_single(gradOutput.contiguous()), *arguments)
    gradInput.copy_(grads[0])
    gradOffset.copy_(grads[2])


def deform_conv_backward_parameters(
    input, offset, gradOutput, gradWeight, columns, ones,
    kW, kH, dW, dH, padW, padH, dilationW, dilationH, group, deformable_group, scale, im2col_step,
):  # fmt: skip
    geometry, groups = (dH, dW, padH, padW, dilationH, dilationW), (group, deformable_group)
    arguments = _arguments(input, gradWeight, offset, None, None, geometry, groups)
    grads = kernels._deform_conv2d_backward(*_single(gradOutput.contiguous()), *arguments)
    gradWeight.add_(grads[1], alpha=scale)


def modulated_deform_conv_forward(
    input, weight, bias, ones, offset, mask, output, columns, kernel_h, kernel_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group, with_bias,
):  # fmt: skip
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
    own_bias = bias if with_bias else None
    result = kernels.deform_conv2d(
        *_arguments(input, weight, offset, mask, own_bias, geometry, (group, deformable_group))
    )
    output.copy_(result.view_as(output))


def modulated_deform_conv_backward(
    input, weight, bias, ones, offset, mask, columns,
    grad_input, grad_weight, grad_bias, grad_offset, grad_mask, grad_output, kernel_h, kernel_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group, with_bias,
):  # fmt: skip
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
    own_bias = bias if with_bias else None
    arguments = _arguments(input, weight, offset, mask, own_bias, geometry, (group, deformable_group))
    grads = kernels._deform_conv2d_backward(*_single(grad_output.contiguous()), *arguments)
    given = (grad_input, grad_weight, grad_offset, grad_mask, grad_bias)
    for into, grad in zip(given[: 5 if with_bias else 4], grads, strict=False):
        into.copy_(grad)


# --- multi-scale deformable attention (arXiv:2010.04159) ---


def sample_and_mix(value: Tensor, spatial_shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Each query's weighted mean of values sampled bilinearly at its locations; zeros are around a map.

    Args:
        value: (B, N, heads, D), the tokens of all levels one after the other.
        spatial_shapes: (levels, 2), height and width of each.
        locations: (B, Q, heads, levels, points, 2), x and y from 0 to 1.
        weights: (B, Q, heads, levels, points).

    Returns:
        (B, Q, heads * D).
    """
    B, _, heads, D = value.shape
    Q = locations.shape[1]
    sizes: list[list[int]] = spatial_shapes.tolist()
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B * heads, Q, levels, points, 2)
    maps = value.permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in sizes], 2)  # each (B * heads, D, h * w)
    sampled = [
        F.grid_sample(each.unflatten(2, (h, w)), grid[:, :, level], align_corners=False)
        for level, (each, (h, w)) in enumerate(zip(maps, sizes, strict=True))
    ]
    weights = weights.transpose(1, 2).reshape(B * heads, 1, Q, -1)
    mixed = (torch.cat(sampled, -1) * weights).sum(-1)  # (B * heads, D, Q)
    return mixed.view(B, heads * D, Q).transpose(1, 2).contiguous()


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int = 64,
) -> Tensor:
    v, locations, weights = _single(value, sampling_loc, attn_weight)
    return sample_and_mix(v, spatial_shapes, locations, weights).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int = 64,
) -> None:
    v, locations, weights, grad = _single(value, sampling_loc, attn_weight, grad_output)
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (v, locations, weights)]
        mixed = sample_and_mix(inputs[0], spatial_shapes, *inputs[1:])
    grads = torch.autograd.grad(mixed, inputs, grad)
    for into, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        into.copy_(grad)
