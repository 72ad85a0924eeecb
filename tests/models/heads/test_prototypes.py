"""Prototypes are means over regions of training images, and are added to the features that resemble them."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models import complexity
from models.heads.prototypes import Objects, PrototypeRefinement, regions_of
from models.weights import load_weights
from tests.models.heads import pyramid
from tests.models.openmmlab import build
from tests.models.openmmlab.test_build import detection_batch, losses, without_gradient

# Two images of 90 x 130 and 80 x 100 pixels, padded to 96 x 160.
OBJECTS = Objects(
    boxes=[torch.tensor([[8.0, 8, 70, 60], [40, 30, 95, 78]]), torch.zeros(0, 4)],
    labels=[torch.tensor([1, 0]), torch.zeros(0, dtype=torch.long)],
    ignored=[torch.tensor([[80.0, 60, 120, 90]]), torch.zeros(0, 4)],
    sizes=torch.tensor([[90, 130], [80, 100]]),
    padded_size=(96, 160),
)


def test_regions_are_those_of_the_positions_centres():
    regions = regions_of(OBJECTS, (12, 20), num_classes=3)
    assert regions.shape == (2, 4, 12, 20)
    for image, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(12), torch.arange(20)).tolist():
        y, x = 8 * i + 4, 8 * j + 4
        covers = [x1 <= x < x2 and y1 <= y < y2 for x1, y1, x2, y2 in OBJECTS.boxes[image].tolist()]
        ignored = any(x1 <= x < x2 and y1 <= y < y2 for x1, y1, x2, y2 in OBJECTS.ignored[image].tolist())
        height, width = OBJECTS.sizes[image].tolist()
        labels = {label for label, covered in zip(OBJECTS.labels[image].tolist(), covers, strict=True) if covered}
        expected = [label in labels for label in range(3)]
        expected.append(not any(covers) and not ignored and y < height and x < width)
        assert regions[image, :, i, j].tolist() == expected


def test_prototypes_are_averages_of_the_regions_means():
    torch.manual_seed(0)
    neck, steps = PrototypeRefinement(4, 2, num_classes=3).train(), [pyramid([4, 4], 12, 20) for _ in range(2)]
    for maps in steps:
        neck.objects = OBJECTS
        neck(maps)
    assert neck.objects is None and neck.seen.tolist() == [[True, True, False, True]] * 2
    for level in range(2):
        size = steps[0][level].shape[2:]
        regions = regions_of(OBJECTS, size, 3)
        for region in (0, 1, 3):
            first, second = (maps[level].permute(0, 2, 3, 1)[regions[:, region]].mean(0) for maps in steps)
            assert torch.allclose(neck.prototypes[level, region], 0.9 * first + 0.1 * second, atol=1e-6)
    assert not neck.prototypes[:, 2].any()
    # Evaluation learns nothing.
    before = neck.prototypes.clone()
    neck.eval().objects = OBJECTS
    neck(steps[0])
    assert torch.equal(neck.prototypes, before)


def test_features_receive_the_prototypes_that_they_resemble():
    torch.manual_seed(0)
    neck, x = PrototypeRefinement(4, 1, num_classes=2, threshold=0.6).eval(), torch.randn(1, 4, 9, 7)
    neck.prototypes[:], neck.seen[:] = torch.randn(1, 3, 4), True
    (out,) = neck([x])
    kinds = set()
    for i in range(9):
        for j in range(7):
            feature = x[0, :, i, j]
            similarity = F.cosine_similarity(feature[None], neck.prototypes[0], dim=1)
            expected = feature
            if similarity[:2].max() >= 0.6:
                expected = feature + (similarity[:2] / 0.1).softmax(0) @ neck.prototypes[0, :2]
                kinds.add("foreground")
            elif similarity[2] >= 0.6:
                expected = feature + neck.prototypes[0, 2]
                kinds.add("background")
            else:
                kinds.add("unchanged")
            assert torch.allclose(out[0, :, i, j], expected, atol=1e-5)
    assert len(kinds) == 3


def test_without_prototypes_nothing_changes_and_saved_prototypes_load():
    maps = pyramid([4] * 3, 12, 20)
    neck = PrototypeRefinement(4, 3, num_classes=2).eval()
    assert all(torch.equal(a, b) for a, b in zip(neck(maps), maps, strict=True))
    neck.prototypes.normal_()
    other = PrototypeRefinement(4, 3, num_classes=2)
    other.load_state_dict(copy.deepcopy(neck.state_dict()))
    assert torch.equal(other.prototypes, neck.prototypes)


def test_a_detector_without_prototypes_loads():
    plain, refined = build("retinanet"), build("retinanet", head__neck="prototypes")
    for parameter in refined.parameters():
        torch.nn.init.zeros_(parameter)
    assert load_weights(refined, plain.state_dict()).missing == ["neck.1.prototypes", "neck.1.seen"]
    weight = "neck.{}lateral_convs.0.conv.weight"
    assert torch.equal(refined.state_dict()[weight.format("0.")], plain.state_dict()[weight.format("")])


@pytest.mark.parametrize(
    ("head", "net"),
    [
        ("retinanet", "biformer"),
        pytest.param("mask_rcnn", "resnet18", marks=pytest.mark.slow),
        pytest.param("cascade_mask_rcnn", "vitdet", marks=pytest.mark.slow),
    ],
)
def test_a_detector_learns_prototypes_while_it_trains(head, net):
    model = build(head, net, head__neck="prototypes")
    assert without_gradient(model, losses(model)) == []
    neck: Any = model.neck[1]
    # The second object has the last class; other classes have not been seen.
    assert neck.seen.any(0).nonzero().flatten().tolist() == [1, neck.seen.shape[1] - 2, neck.seen.shape[1] - 1]
    image, sizes, *_ = detection_batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert len(model.eval().predict(image, sizes, sizes)) == 2
    assert complexity(model, (64, 96))[0] == sum(p.numel() for p in model.parameters())
