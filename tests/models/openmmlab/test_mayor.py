"""MAYOR's mask head and assigner, alone and in detectors on several backbones."""

from typing import Any

import pytest
import torch

from models.openmmlab.config import library
from tests.models.openmmlab import CLASSES, build
from tests.models.openmmlab.test_build import detection_batch, losses, without_gradient


def make(registry: str, **config: Any) -> Any:
    library("mmdet")
    from mmdet import registry as registries

    return getattr(registries, registry).build(config)


def assigner(top_k: int = 3, **arguments: Any) -> Any:
    thresholds = {"pos_iou_thr": 0.7, "neg_iou_thr": 0.3} | arguments
    return make("TASK_UTILS", type="AdaptiveAssigner", top_k=top_k, **thresholds)


def by_definition(overlaps: torch.Tensor, top_k: int, positive: float = 0.7, negative: float = 0.3) -> list[int]:
    """Return the index of each anchor's ground truth from 1, 0 for the background and -1 for ignored anchors."""
    thresholds = [min(positive, sorted(row, reverse=True)[min(top_k, len(row)) - 1]) for row in overlaps.tolist()]
    assigned = []
    for column in overlaps.T.tolist():
        claimants = [g for g, iou in enumerate(column) if iou > 0 and iou >= thresholds[g]]
        if claimants:
            assigned.append(1 + min(claimants, key=lambda g, column=column: (thresholds[g], -column[g])))
        else:
            assigned.append(0 if 0 <= max(column) < negative else -1)
    return assigned


@pytest.mark.parametrize("top_k", [1, 3, 50])
def test_anchors_are_assigned_as_defined(top_k):
    torch.manual_seed(0)
    for _ in range(20):
        overlaps = (torch.rand(5, 40).square() - 0.2).clamp(min=0)
        overlaps[:, 7] = -1
        result = assigner(top_k).assign_wrt_overlaps(overlaps, torch.tensor([4, 3, 2, 1, 0]))
        expected = by_definition(overlaps, top_k)
        assert result.gt_inds.tolist() == expected
        assert result.labels.tolist() == [5 - index if index > 0 else -1 for index in expected]


def test_a_long_thin_object_has_enough_anchors_beside_a_large_one():
    from mmengine.structures import InstanceData

    centres = torch.cartesian_prod(torch.arange(8.0, 128, 16), torch.arange(8.0, 128, 16))
    anchors = torch.cat([centres - 16, centres + 16], 1)
    truth = InstanceData(bboxes=torch.tensor([[0.0, 60.0, 128.0, 68.0], [40, 40, 72, 72]]), labels=torch.tensor([0, 1]))
    priors = InstanceData(priors=anchors)
    counts = assigner(4).assign(priors, truth).gt_inds.bincount(minlength=3)
    assert counts[1] >= 4 and counts[2] >= 1
    usual = make("TASK_UTILS", type="MaxIoUAssigner", pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3)
    assert not (usual.assign(priors, truth).gt_inds == 1).any()


def test_without_objects_all_anchors_are_background():
    result = assigner().assign_wrt_overlaps(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))
    assert result.gt_inds.tolist() == [0] * 6


@pytest.mark.parametrize(("class_agnostic", "masks"), [(True, 1), (False, 3)])
def test_each_pixel_of_a_mask_depends_on_the_whole_proposal(class_agnostic, masks):
    torch.manual_seed(0)
    head = make("MODELS", type="MLPMaskHead", num_classes=3, in_channels=8, conv_out_channels=8, hidden=32,
                num_convs=1, class_agnostic=class_agnostic)  # fmt: skip
    x = torch.randn(2, 8, 14, 14, requires_grad=True)
    out = head(x)
    assert out.shape == (2, masks, 28, 28)
    out[0, 0, 0, 0].backward()
    assert x.grad is not None and x.grad[0, :, -1, -1].abs().max() > 0 and not x.grad[1].any()
    assert head(x[:0]).shape == (0, masks, 28, 28)


def test_the_paper_size_has_the_layers_of_its_description():
    with torch.device("meta"):
        head = make("MODELS", type="MLPMaskHead", num_classes=1)
    convolutions = 4 * (9 * 256 * 256 + 256) + 256 * 16 + 16
    decoder = 14 * 14 * 16 * 1024 + 1024 + 1024 * 784 + 784
    assert sum(p.numel() for p in head.parameters()) == convolutions + decoder


@pytest.mark.parametrize(
    "net",
    ["biformer", pytest.param("resnet18", marks=pytest.mark.slow), pytest.param("vitdet", marks=pytest.mark.slow)],
)
def test_the_detector_is_trained_and_predicts(net):
    model = build("mayor", net)
    assert type(model.rpn_head.assigner).__name__ == "AdaptiveAssigner"
    assert without_gradient(model, losses(model)) == []
    image, sizes, *_ = detection_batch()
    with torch.no_grad():
        detections = model.eval().predict(image, sizes, sizes)
    for (boxes, _, labels, masks), (h, w) in zip(detections, sizes.tolist(), strict=True):
        assert len(boxes) and masks is not None and masks.shape == (len(boxes), h, w)
        assert ((labels >= 0) & (labels < CLASSES)).all()


def test_the_assigner_serves_one_stage_detectors():
    model = build("retinanet", head__args={"train_cfg": {"assigner": {"type": "AdaptiveAssigner", "top_k": 9}}})
    assert without_gradient(model, losses(model)) == []
