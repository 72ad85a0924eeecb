"""The stand-in for mmcv's compiled extension, called through mmcv's operators, agrees with plain definitions."""

import importlib.util
import math
import sys
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.ops as vision
from torch import Tensor

from models.openmmlab import mmcv_ext

mmcv_ext.install()

from mmcv.ops import RoIAlign, batched_nms, deform_conv2d, modulated_deform_conv2d, nms, sigmoid_focal_loss, soft_nms  # noqa: E402
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention, MultiScaleDeformableAttnFunction  # noqa: E402


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random_input(*shape: int) -> Any:
    """Return a random tensor in float64 that requires a gradient."""
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def random_boxes(count: int) -> tuple[Tensor, Tensor]:
    """Return random boxes (count, 4) xyxy and their scores (count,)."""
    corner = 50 * torch.rand(count, 2)
    return torch.cat([corner, corner + 5 + 30 * torch.rand(count, 2)], 1), torch.rand(count)


def box_iou(a: Tensor, b: Tensor, offset: int) -> float:
    """Compute the IoU of two boxes; `offset` is 1 if a box includes its last pixel."""
    w = min(a[2], b[2]) - max(a[0], b[0]) + offset
    h = min(a[3], b[3]) - max(a[1], b[1]) + offset
    intersection = max(float(w), 0) * max(float(h), 0)
    areas = [float((c[2] - c[0] + offset) * (c[3] - c[1] + offset)) for c in (a, b)]
    return intersection / (sum(areas) - intersection)


def suppress(boxes: Tensor, scores: Tensor, offset: int, factor: Any, min_score: float) -> list[tuple[int, float]]:
    """Apply (soft) NMS by its definition: keep the best box, lower the scores of the other boxes, and repeat.

    Args:
        boxes: (N, 4) xyxy.
        scores: (N,).
        offset: 1 if a box includes its last pixel.
        factor: Function from the IoU with the best box to the factor of a score.
        min_score: Boxes with a lower score are dropped.

    Returns:
        Index and score of each kept box.
    """
    remaining, kept = {i: float(score) for i, score in enumerate(scores)}, []
    while remaining:
        best = max(remaining, key=lambda i: remaining[i])
        kept.append((best, remaining.pop(best)))
        remaining = {i: score * factor(box_iou(boxes[best], boxes[i], offset)) for i, score in remaining.items()}
        remaining = {i: score for i, score in remaining.items() if score >= min_score and score > 0}
    return kept


@pytest.mark.parametrize("offset", [0, 1])
def test_nms_equals_its_definition(offset):
    boxes, scores = random_boxes(60)
    dets, kept = map(torch.as_tensor, nms(boxes, scores, 0.5, offset))
    expected = suppress(boxes, scores, offset, lambda iou: iou <= 0.5, 0)
    assert kept.tolist() == [i for i, _ in expected] and 5 < len(kept) < 60
    assert torch.equal(dets, torch.cat([boxes, scores[:, None]], 1)[kept])


def test_batched_nms_treats_classes_separately():
    boxes, scores = random_boxes(60)
    classes = torch.randint(0, 3, (60,))
    _, kept = batched_nms(boxes, scores, classes, {"type": "nms", "iou_threshold": 0.5})
    assert set(kept.tolist()) == {
        int(members[i])
        for members in ((classes == c).nonzero()[:, 0] for c in range(3))
        for i, _ in suppress(boxes[members], scores[members], 0, lambda iou: iou <= 0.5, 0)
    }


@pytest.mark.parametrize(
    ("method", "factor"),
    [
        ("naive", lambda iou: iou < 0.3),
        ("linear", lambda iou: 1.0 if iou < 0.3 else 1 - iou),
        ("gaussian", lambda iou: math.exp(-(iou**2) / 0.5)),
    ],
)
@pytest.mark.parametrize("offset", [0, 1])
def test_soft_nms_equals_its_definition(method, factor, offset):
    boxes, scores = random_boxes(40)
    dets, kept = map(torch.as_tensor, soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset))
    expected = suppress(boxes, scores, offset, factor, 0.05)
    assert kept.tolist() == [i for i, _ in expected]
    assert torch.allclose(dets, torch.tensor([[*boxes[i], score] for i, score in expected]), atol=1e-6)


def test_roi_align_of_a_linear_map_gives_the_value_in_the_middle_of_each_bin():
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(50.0), indexing="ij")
    maps = torch.stack([2 * x + 3 * y, x - y])[None].repeat(2, 1, 1, 1)
    maps[1] += 7
    rois = torch.tensor([[0, 8.0, 12.0, 72.0, 60.0], [1, 20.0, 10.0, 60.0, 50.0]])
    out = RoIAlign((3, 4), spatial_scale=0.5, sampling_ratio=2, aligned=True)(maps, rois)
    for roi, bins in zip(rois, out, strict=True):
        left, top, right, bottom = roi[1:] * 0.5 - 0.5
        middle = [
            [top + (i + 0.5) * (bottom - top) / 3, left + (j + 0.5) * (right - left) / 4]
            for i, j in product(range(3), range(4))
        ]
        v, u = torch.tensor(middle).T
        expected = torch.stack([2 * u + 3 * v, u - v]) + 7 * roi[0]
        assert torch.allclose(bins.flatten(1), expected, atol=1e-4)


def test_roi_align_has_the_right_gradients():
    maps, rois = random_input(2, 3, 9, 11), torch.tensor([[0, 2, 3, 30, 20], [1, 0, 0, 40, 33]], dtype=torch.float64)
    layer = RoIAlign((2, 3), spatial_scale=0.25, sampling_ratio=0, aligned=True)
    assert torch.autograd.gradcheck(lambda x: layer(x, rois), maps)
    half = layer(maps.detach().bfloat16(), rois.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.allclose(half.double(), layer(maps, rois), atol=0.05)


@pytest.mark.parametrize("weighted", [False, True])
def test_focal_loss_equals_torchvisions(weighted):
    logits, target = random_input(20, 5), torch.randint(0, 6, (20,))  # 5: background
    weight = torch.rand(5, dtype=torch.float64) if weighted else None
    one_hot = F.one_hot(target, 6)[:, :5].double()
    expected = vision.sigmoid_focal_loss(logits, one_hot, alpha=0.25, gamma=2.0)
    expected = (expected * (1 if weight is None else weight)).sum()
    loss = sigmoid_focal_loss(logits, target, 2.0, 0.25, weight, "sum")
    assert torch.allclose(loss, expected)
    gradient, expected_gradient = (torch.autograd.grad(value, logits)[0] for value in (loss, expected))
    assert torch.allclose(gradient, expected_gradient)


# Stride, padding, dilation, number of groups, number of groups of offsets.
GEOMETRIES = [
    ((1, 1), (1, 1), (1, 1), 1, 1),
    ((2, 1), (0, 1), (1, 2), 2, 2),
]


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups", "offset_groups"), GEOMETRIES)
@pytest.mark.parametrize("masked", [False, True])
def test_deformable_convolution_equals_torchvisions(stride, padding, dilation, groups, offset_groups, masked):
    x, weight, bias = random_input(2, 4, 9, 10), random_input(6, 4 // groups, 3, 3), random_input(6)
    H, W = ((n + 2 * p - d * 2 - 1) // s + 1 for n, p, d, s in zip((9, 10), padding, dilation, stride, strict=True))
    offset, mask = random_input(2, offset_groups * 18, H, W), random_input(2, offset_groups * 9, H, W)
    geometry = (stride, padding, dilation)

    def convolve(offset: Tensor, mask: Tensor) -> Tensor:
        if masked:
            return modulated_deform_conv2d(x, offset, mask, weight, bias, *geometry, groups, offset_groups)
        return deform_conv2d(x, offset, weight, *geometry, groups, offset_groups, False, 2)

    plain = F.conv2d(x, weight, bias if masked else None, *geometry, groups)
    assert torch.allclose(convolve(torch.zeros_like(offset), torch.ones_like(mask)), plain)
    expected = vision.deform_conv2d(x, offset, weight, bias if masked else None, *geometry, mask if masked else None)
    out, output_gradient = convolve(offset, mask), torch.randn_like(plain)
    assert torch.allclose(out, expected)
    inputs = [x, offset, weight, *([mask, bias] if masked else [])]
    gradients, expected_gradients = (torch.autograd.grad(y, inputs, output_gradient) for y in (out, expected))
    assert all(torch.allclose(*pair) for pair in zip(gradients, expected_gradients, strict=True))


def test_the_functions_that_mmcvs_module_calls_on_cpu_and_cuda_agree():
    """On the CPU, mmcv's module calls a plain function; on CUDA, it calls the function that we replace."""
    module = MultiScaleDeformableAttention(8, num_heads=2, num_levels=2, num_points=3, batch_first=True).eval()
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.1)
    query, value, points = torch.randn(2, 4, 8), torch.randn(2, 26, 8), torch.rand(2, 4, 2, 2)
    sizes, starts = torch.tensor([(4, 5), (2, 3)]), torch.tensor([0, 20])
    calls = []

    def extension_function(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        calls.append(value)
        return MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)

    kwargs: Any = {"reference_points": points, "spatial_shapes": sizes, "level_start_index": starts}
    expected = module(query, value=value, **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmcv.ops.multi_scale_deform_attn.multi_scale_deformable_attn_pytorch", extension_function)
        assert torch.allclose(module(query, value=value, **kwargs), expected, atol=1e-6) and calls


def test_a_missing_operator_raises_when_it_is_called():
    from mmcv.ops import box_iou_rotated

    if mmcv_ext.install():
        with pytest.raises(ValueError, match=r"operator box_iou_rotated needs a compiled mmcv: only mmcv-lite is"):
            box_iou_rotated(torch.rand(1, 5), torch.rand(1, 5))


def test_an_installed_compiled_extension_is_not_replaced(monkeypatch):
    monkeypatch.delitem(sys.modules, mmcv_ext.NAME)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert not mmcv_ext.install() and mmcv_ext.NAME not in sys.modules
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert mmcv_ext.install() and sys.modules[mmcv_ext.NAME] is mmcv_ext
