"""Panoptic Mask2Former of mmdetection on our backbones."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.openmmlab.build import build_panoptic
from models.openmmlab.panoptic import PanopticSegmentor
from tests.models.openmmlab import CLASSES, make_config

THINGS = 4


def build(model: str = "biformer") -> Any:
    torch.manual_seed(0)
    data = SimpleNamespace(num_classes=CLASSES, num_things=THINGS, in_chans=3)
    return build_panoptic(make_config("mask2former_panoptic", model), data)


def batch(segments: int = 3) -> tuple[Any, ...]:
    """Return the arguments of `loss` for two padded images; the first has `segments` segments, the second has none."""
    torch.manual_seed(1)
    sizes = torch.tensor([[90, 130], [80, 100]])
    masks = torch.zeros(segments, 90, 130, dtype=torch.uint8)
    for i in range(segments):
        masks[i, 30 * i : 30 * (i + 1)] = 1
    boxes = torch.tensor([[0.0, 30.0 * i, 130.0, 30.0 * (i + 1)] for i in range(segments)]).view(-1, 4)
    labels = torch.tensor([0, THINGS - 1, CLASSES - 1])[:segments]
    empty = torch.zeros(0, 80, 100, dtype=torch.uint8)
    truth = ([boxes, boxes[:0]], [labels, labels[:0]], [masks, empty])
    return torch.randn(2, 3, 96, 160), sizes, *truth, [boxes[:0]] * 2


@pytest.mark.parametrize("net", ["biformer", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_every_parameter_is_trained_and_segments_fit_the_original_image(net):
    model = build(net)
    assert isinstance(model, PanopticSegmentor)
    head: Any = model.panoptic_head
    assert (head.num_things_classes, head.num_stuff_classes) == (THINGS, CLASSES - THINGS)
    losses = model.loss(*batch())
    assert set(losses) == {"loss_cls", "loss_mask", "loss_dice"}
    torch.stack([*losses.values()]).sum().backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert any("panoptic_head.query_embed" in name for name in model.no_weight_decay())
    model.eval()
    image, sizes, *_ = batch()
    with torch.no_grad():
        found = model.segments(image, sizes, torch.tensor([[181, 263], [80, 100]]))
    for (ids, labels), size in zip(found, [(181, 263), (80, 100)], strict=True):
        assert ids.shape == size and set(ids.unique().tolist()) - {0} == set(labels)
        assert all(0 <= label < CLASSES for label in labels.values())


def test_images_without_segments_train_every_parameter():
    model = build()
    torch.stack([*model.loss(*batch(0)).values()]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_codes_of_the_package_become_segments(monkeypatch):
    model = build()
    # The package can be imported once the first head is built.
    from mmdet.evaluation.functional import INSTANCE_OFFSET

    codes = torch.tensor([[CLASSES, 2, 2 + INSTANCE_OFFSET], [CLASSES - 1, CLASSES - 1, CLASSES]])
    package = type(model).__mro__[4]
    sample = SimpleNamespace(pred_panoptic_seg=SimpleNamespace(sem_seg=codes[None]))
    monkeypatch.setattr(package, "predict", lambda *_, **__: [sample])
    ((ids, labels),) = model.segments(torch.zeros(1, 3, 32, 32), torch.tensor([[2, 3]]), torch.tensor([[2, 3]]))
    assert (ids == 0).tolist() == (codes == CLASSES).tolist()
    assert [labels[i] for i in ids[codes != CLASSES].tolist()] == [2, 2, CLASSES - 1, CLASSES - 1]
    assert ids[0, 1] != ids[0, 2] and ids[1, 0] == ids[1, 1] and len(labels) == 3
