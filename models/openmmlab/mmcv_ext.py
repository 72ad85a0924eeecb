"""Stand-in for mmcv's compiled extension, made of torchvision's kernels and plain PyTorch, on any device.

mmcv-lite comes without `mmcv._ext`, whose functions the Python side of `mmcv.ops` calls. `install` registers this
module under that name, unless a compiled mmcv is installed. The functions have mmcv's signatures: most write their
results into tensors among their arguments. Inputs in half precision are converted to float32. Deformable attention
replaces mmcv's autograd function instead of the two functions that it calls.

The module has the functions that the heads of `conf/head/` call, and soft-NMS and deformable convolution, which
variants of these heads call. Any other function of the extension raises a ValueError when it is called, not at import.

mmcv: https://github.com/open-mmlab/mmcv (2.1.0).
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401
from torch import Tensor

from ops.deformable import deformable_attention
from retinue.utils.openmmlab_packages import require_openmmlab

# Name of the module that this one stands in for.
NAME = "mmcv._ext"
# The import of torchvision registers these operators.
torchvision_ops: Any = torch.ops.torchvision


def install() -> bool:
    """Register this module as `mmcv._ext`, unless a compiled extension is installed.

    Call this before anything imports `mmcv.ops`.

    Returns:
        True if this module is `mmcv._ext` now, False if the compiled extension stays.

    Raises:
        ValueError: A package of OpenMMLab is not installed.
    """
    require_openmmlab("a head of mmdetection or mmsegmentation")
    if NAME not in sys.modules and not is_compiled():
        sys.modules[NAME] = sys.modules[__name__]
        module: Any = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
        module.MultiScaleDeformableAttnFunction = DeformableAttention
    return sys.modules.get(NAME) is sys.modules[__name__]


def is_compiled() -> bool:
    """Tell whether a compiled extension of mmcv is installed."""
    if NAME in sys.modules:
        return sys.modules[NAME] is not sys.modules[__name__]
    return importlib.util.find_spec(NAME) is not None


def __getattr__(name: str) -> Callable:
    """Return a function that raises when it is called: mmcv looks up every function of the extension at import."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> None:
        raise ValueError(f"mmcv's operator {name} needs a compiled mmcv: only mmcv-lite is installed")

    return missing


def _to_float32(*tensors: Tensor) -> list[Tensor]:
    """Convert tensors in half precision to float32; leave float32 and float64 unchanged."""
    return [t.float() if t.dtype in (torch.half, torch.bfloat16) else t for t in tensors]


# --- non-maximum suppression ---


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Return the indices of the boxes that non-maximum suppression keeps, highest score first.

    Args:
        boxes: (N, 4) xyxy.
        scores: (N,).
        iou_threshold: A box is dropped if its IoU with a better box is above it.
        offset: 1 if a box includes its last pixel, so that its width is x2 - x1 + 1; otherwise 0.
    """
    boxes, scores = _to_float32(boxes, scores)
    if offset:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], 1)
    return torchvision_ops.nms(boxes, scores.to(boxes.dtype), iou_threshold)


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
    """Apply soft-NMS (arXiv:1704.04503), which lowers the scores of boxes that overlap a better box.

    Args:
        boxes: (N, 4) xyxy.
        scores: (N,).
        dets: Output (N, 5): the kept boxes and their lowered scores are written into its first rows.
        iou_threshold: Boxes with a smaller IoU do not overlap; for methods 0 and 1.
        sigma: Variance of the Gaussian of method 2.
        min_score: Boxes whose score falls below it are dropped.
        method: The factor of an overlapping box's score: 0 for zero, 1 for 1 - IoU, 2 for a Gaussian of the IoU.
        offset: 1 if a box includes its last pixel, otherwise 0.

    Returns:
        Indices of the kept boxes, in the order in which they were chosen.
    """
    boxes, scores = _to_float32(boxes, scores)
    scores, area = scores.clone(), (boxes[:, 2:] - boxes[:, :2] + offset).prod(1)
    remaining, kept = torch.ones_like(scores, dtype=torch.bool), []
    while remaining.any():
        best = int(scores.where(remaining, -torch.inf).argmax())
        dets[len(kept), :4], dets[len(kept), 4] = boxes[best], scores[best]
        kept.append(best)
        remaining[best] = False
        low = torch.maximum(boxes[best, :2], boxes[:, :2])
        high = torch.minimum(boxes[best, 2:], boxes[:, 2:])
        intersection = (high - low + offset).clamp(min=0).prod(1)
        iou = intersection / (area[best] + area - intersection)
        if method == 2:
            factor = torch.exp(-iou.square() / sigma)
        else:
            factor = torch.where(iou < iou_threshold, 1.0, 1 - iou if method == 1 else 0.0)
        scores = torch.where(remaining, scores * factor, scores)
        remaining &= scores >= min_score
    return torch.tensor(kept, dtype=torch.long)


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
    """Apply RoIAlign with averaging (arXiv:1703.06870) and write the features (N, C, h, w) into `output`.

    `input` holds maps (B, C, H, W), and `rois` (N, 5) the image's index and the box (xyxy, in pixels of the image).
    `argmax_y` and `argmax_x` are for max-pooling and not used.

    Raises:
        ValueError: `pool_mode` is 0, max-pooling.
    """
    if pool_mode != 1:
        raise ValueError("RoIAlign with pool_mode='max' needs a compiled mmcv")
    x, rois = _to_float32(input, rois)
    size = (aligned_height, aligned_width)
    output.copy_(torchvision_ops.roi_align(x, rois.to(x.dtype), spatial_scale, *size, sampling_ratio, aligned))


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
    """Compute the gradient of `roi_align_forward` and write it into `grad_input` (B, C, H, W)."""
    grad, rois = _to_float32(grad_output, rois)
    sizes = (aligned_height, aligned_width, *grad_input.shape)
    rois = rois.to(grad.dtype)
    grad = torchvision_ops._roi_align_backward(grad, rois, spatial_scale, *sizes, sampling_ratio, aligned)
    grad_input.copy_(grad)


# --- focal loss ---


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Compute the focal loss (arXiv:1708.02002) of each logit and write it into `output` (N, K).

    `input` holds logits (N, K), and `target` labels (N,), where K is the background. `weight` (K,) holds the weights of
    the classes, and is empty for equal weights.
    """
    (x,) = _to_float32(input)
    is_target, p = _is_target(x, target), x.sigmoid()
    positive = -alpha * (1 - p) ** gamma * F.logsigmoid(x)
    negative = -(1 - alpha) * p**gamma * F.logsigmoid(-x)
    output.copy_(torch.where(is_target, positive, negative) * _class_weights(weight))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Compute the gradient of `sigmoid_focal_loss_forward` and write it into `grad_input` (N, K)."""
    (x,) = _to_float32(input)
    is_target, p = _is_target(x, target), x.sigmoid()
    positive = alpha * (1 - p) ** gamma * (gamma * p * F.logsigmoid(x) - (1 - p))
    negative = (1 - alpha) * p**gamma * (p - gamma * (1 - p) * F.logsigmoid(-x))
    grad_input.copy_(torch.where(is_target, positive, negative) * _class_weights(weight))


def _is_target(x: Tensor, target: Tensor) -> Tensor:
    """Return for each logit (N, K) whether its class is the label in `target` (N,)."""
    return target[:, None] == torch.arange(x.shape[1], device=x.device)


def _class_weights(weight: Tensor) -> Tensor | float:
    """Return the weights of the classes (K,), or 1 if the tensor is empty, which mmcv passes for equal weights."""
    return weight if weight.numel() else 1.0


# --- deformable convolution, v1 (arXiv:1703.06211) and v2 with a mask (arXiv:1811.11168) ---


def _deform_conv_arguments(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: Sequence[int],
    groups: Sequence[int],
) -> tuple:
    """Return the arguments of torchvision's operator.

    Args:
        x: (B, C, H, W).
        weight: (out channels, C / groups, kernel height, kernel width).
        offset: Offset of each sample, vertical then horizontal, for each kernel position and offset group.
        mask: Factor of each sample; None for deformable convolution v1, where an empty mask takes its place.
        bias: (out channels,); None for no bias.
        geometry: Stride, padding and dilation, each of the height, then of the width.
        groups: Number of groups of the convolution, and number of groups of channels that share offsets.
    """
    use_mask = mask is not None
    if mask is None:
        mask = x.new_zeros(len(x), 1)
    if bias is None:
        bias = x.new_zeros(len(weight))
    return (*_to_float32(x, weight, offset, mask, bias), *geometry, *groups, use_mask)


def deform_conv_forward(
    input, weight, offset, output, columns, ones,
    kW, kH, dW, dH, padW, padH, dilationW, dilationH, group, deformable_group, im2col_step,
):  # fmt: skip
    """Apply deformable convolution v1 and write the result into `output`."""
    geometry, groups = (dH, dW, padH, padW, dilationH, dilationW), (group, deformable_group)
    arguments = _deform_conv_arguments(input, weight, offset, None, None, geometry, groups)
    output.copy_(torchvision_ops.deform_conv2d(*arguments))


def deform_conv_backward_input(
    input, offset, gradOutput, gradInput, gradOffset, weight, columns,
    kW, kH, dW, dH, padW, padH, dilationW, dilationH, group, deformable_group, im2col_step,
):  # fmt: skip
    """Compute the gradients of deformable convolution v1 and write them into `gradInput` and `gradOffset`."""
    geometry, groups = (dH, dW, padH, padW, dilationH, dilationW), (group, deformable_group)
    arguments = _deform_conv_arguments(input, weight, offset, None, None, geometry, groups)
    grads = torchvision_ops._deform_conv2d_backward(*_to_float32(gradOutput.contiguous()), *arguments)
    gradInput.copy_(grads[0])
    gradOffset.copy_(grads[2])


def deform_conv_backward_parameters(
    input, offset, gradOutput, gradWeight, columns, ones,
    kW, kH, dW, dH, padW, padH, dilationW, dilationH, group, deformable_group, scale, im2col_step,
):  # fmt: skip
    """Compute the gradient of deformable convolution v1 by its weight, and add it, times `scale`, to `gradWeight`."""
    geometry, groups = (dH, dW, padH, padW, dilationH, dilationW), (group, deformable_group)
    # The gradient by the weight does not depend on the weight's values, only on its shape.
    arguments = _deform_conv_arguments(input, gradWeight, offset, None, None, geometry, groups)
    grads = torchvision_ops._deform_conv2d_backward(*_to_float32(gradOutput.contiguous()), *arguments)
    gradWeight.add_(grads[1], alpha=scale)


def modulated_deform_conv_forward(
    input, weight, bias, ones, offset, mask, output, columns, kernel_h, kernel_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group, with_bias,
):  # fmt: skip
    """Apply deformable convolution v2, with a mask, and write the result into `output`."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
    bias = bias if with_bias else None
    result = torchvision_ops.deform_conv2d(
        *_deform_conv_arguments(input, weight, offset, mask, bias, geometry, (group, deformable_group))
    )
    output.copy_(result.view_as(output))


def modulated_deform_conv_backward(
    input, weight, bias, ones, offset, mask, columns,
    grad_input, grad_weight, grad_bias, grad_offset, grad_mask, grad_output, kernel_h, kernel_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group, with_bias,
):  # fmt: skip
    """Compute the gradients of deformable convolution v2 and write them into the `grad_` tensors."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
    bias = bias if with_bias else None
    arguments = _deform_conv_arguments(input, weight, offset, mask, bias, geometry, (group, deformable_group))
    grads = torchvision_ops._deform_conv2d_backward(*_to_float32(grad_output.contiguous()), *arguments)
    outputs = [grad_input, grad_weight, grad_offset, grad_mask]
    if with_bias:
        outputs.append(grad_bias)
    # torchvision returns the gradient by the bias last, without a bias too.
    for output, grad in zip(outputs, grads, strict=False):
        output.copy_(grad)


# --- multi-scale deformable attention (arXiv:2010.04159) ---


class DeformableAttention:
    """Replacement of mmcv's autograd function, which would sample in the forward pass and again in the backward."""

    @staticmethod
    def apply(
        value: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
        locations: Tensor,
        weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """Apply `ops.deformable.deformable_attention`; `level_start_index` and `im2col_step` are for mmcv's kernel."""
        return deformable_attention(value, spatial_shapes, locations, weights)
