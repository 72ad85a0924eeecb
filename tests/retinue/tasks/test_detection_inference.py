"""Test-time augmentation of a detector: where views put boxes, and merging as in mmdetection."""

from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

from models.openmmlab import mmcv_ext
from models.openmmlab.detector import Detections
from retinue.tasks.detection_inference import DetectionInference, make_view, mirror

# mmdetection's class imports what mmcv compiles.
mmcv_ext.install()

SIZES = torch.tensor([[250, 310], [101, 77]])
ORIGINAL_SIZES = torch.tensor([[500, 620], [202, 154]])


def detections(count: int, seed: int, size=(90, 120), masks: bool = False) -> Detections:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 60
    boxes = torch.cat([corners, corners + 5 + 25 * torch.rand(count, 2, generator=generator)], 1)
    labels = torch.randint(3, (count,), generator=generator)
    found = torch.rand(count, *size, generator=generator) > 0.5 if masks else None
    return Detections(boxes, torch.rand(count, generator=generator), labels, found)


@pytest.mark.parametrize("max_per_image", [7, 100])
def test_views_are_merged_as_in_mmdetection(max_per_image):
    from mmdet.models.test_time_augs import DetTTAModel
    from mmdet.structures import DetDataSample

    width = 120
    views = [detections(30, seed, masks=True) for seed in range(4)]
    samples = []
    for i, view in enumerate(views):
        meta = {"ori_shape": (90, width), "flip": i % 2 == 1, "flip_direction": "horizontal"}
        instances = InstanceData(bboxes=view.boxes, scores=view.scores, labels=view.labels)
        samples.append(DetDataSample(metainfo=meta, pred_instances=instances))
    model = DetTTAModel.__new__(DetTTAModel)
    torch.nn.Module.__init__(model)
    model.tta_cfg = ConfigDict(nms={"type": "nms", "iou_threshold": 0.5}, max_per_img=max_per_image)
    expected: Any = model._merge_single_sample(samples).pred_instances

    inference = DetectionInference(scales=(1.0, 1.2), flip=True, max_per_image=max_per_image)
    order = iter(views)
    [merged] = inference(
        lambda *_: [next(order)], torch.zeros(1, 3, 96, 128), torch.tensor([[90, 120]]), torch.tensor([[90, width]])
    )
    assert 5 < len(merged.boxes) <= max_per_image
    for ours, theirs in ((merged.boxes, expected.bboxes), (merged.scores, expected.scores)):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert torch.equal(merged.labels, expected.labels)
    # A mask stays with its box.
    assert merged.masks is not None
    upright = [mirror(view, width) if i % 2 else view for i, view in enumerate(views)]
    masks = torch.cat([view.masks for view in upright if view.masks is not None])
    scores = torch.cat([view.scores for view in upright]).tolist()
    for score, mask in zip(merged.scores.tolist(), merged.masks, strict=True):
        assert torch.equal(mask, masks[scores.index(score)])


def find_light(image, sizes, original_sizes) -> list[Detections]:
    """Return the box and the mask of the light pixels of each image."""
    found = []
    for pixels, size, (height, width) in zip(image, sizes.tolist(), original_sizes.tolist(), strict=True):
        assert not pixels[:, size[0] :].any() and not pixels[:, :, size[1] :].any()
        rows, columns = torch.nonzero(pixels[0, : size[0], : size[1]] > 0.5, as_tuple=True)
        y, x = height / size[0], width / size[1]
        corners = [columns.min() * x, rows.min() * y, (columns.max() + 1) * x, (rows.max() + 1) * y]
        mask = torch.zeros(1, height, width, dtype=torch.bool)
        x1, y1, x2, y2 = (round(float(corner)) for corner in corners)
        mask[:, y1:y2, x1:x2] = True
        found.append(Detections(torch.tensor([corners]), torch.tensor([0.9]), torch.tensor([2]), mask))
    return found


@pytest.mark.parametrize("scales", [(1.0,), (0.5,), (1.37, 0.8)])
def test_each_view_finds_an_object_at_its_place(scales):
    image = torch.zeros(2, 3, 256, 320)
    image[0, :, 40:120, 30:100] = 1
    image[1, :, 20:60, 10:70] = 1
    expected = torch.tensor([[60.0, 80, 200, 240], [20, 40, 140, 120]])
    views = []

    def predict(*arguments):
        views.append(arguments[0].shape)
        return find_light(*arguments)

    merged = DetectionInference(scales=scales, flip=True)(predict, image, SIZES, ORIGINAL_SIZES)
    assert len(views) == 2 * len(scales)
    assert all(side % 32 == 0 for shape in views for side in shape[2:])
    for found, box in zip(merged, expected, strict=True):
        assert len(found.boxes) == 1 and found.masks is not None
        np.testing.assert_allclose(found.boxes[0], box, atol=4)
        x1, y1, x2, y2 = (int(side) for side in box)
        assert found.masks[0, y1 + 4 : y2 - 4, x1 + 4 : x2 - 4].all()
        assert found.masks.sum() <= (x2 - x1 + 8) * (y2 - y1 + 8)


def test_one_view_leaves_the_detections_as_they_are():
    found = [detections(20, 0)]
    image = torch.zeros(1, 3, 32, 32)
    assert DetectionInference()(lambda *_: found, image, SIZES[:1], ORIGINAL_SIZES[:1]) is found
    view, sizes = make_view(torch.rand(1, 3, 64, 64), torch.tensor([[64, 50]]), 1.0, False)
    assert view.shape == (1, 3, 64, 64) and sizes.tolist() == [[64, 50]] and not view[..., 50:].any()
    twice = mirror(mirror(found[0], 120), 120)
    np.testing.assert_allclose(twice.boxes, found[0].boxes, atol=1e-5)


def test_a_scale_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"task\.test\.scales must be factors above 0"):
        DetectionInference(scales=(0.0,))
