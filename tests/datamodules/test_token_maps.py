"""Label maps follow the crop, the mirroring and the shape ops of their image, and are read from files safely."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.ops import RoIAlign

from datamodules.auto_augment import Op
from datamodules.token_maps import SAMPLES, LabelMaps, token_scores, view_matrix
from datamodules.transforms import Augment, TrainTransform


def test_a_crop_is_roi_align_over_the_listed_classes():
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(2, 3, 18, 18, generator=generator), torch.rand(2, 7, 18, 18, generator=generator)
    labels = labels.topk(3, dim=1).indices
    boxes = [(0.1, 0.2, 0.5, 0.7), (0.3, 0.05, 0.6, 0.4)]
    view = torch.from_numpy(np.stack([view_matrix(box, (False, False), [], (32, 32)) for box in boxes]))
    found = token_scores(scores, labels, view, (5, 4), 7)
    dense = torch.zeros(2, 7, 18, 18)
    for b, k, y, x in np.ndindex(2, 3, 18, 18):
        dense[b, labels[b, k, y, x], y, x] = scores[b, k, y, x]
    rois = [(i, left, top, left + width, top + height) for i, (top, left, height, width) in enumerate(boxes)]
    rois = torch.tensor(rois) * torch.tensor([1.0, 18, 18, 18, 18])
    expected = RoIAlign((5, 4), spatial_scale=1.0, sampling_ratio=SAMPLES, aligned=True)(dense, rois)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "augment",
    [
        {"scale": [0.3, 0.8]},
        {"pad_crop": 0},
        {"scale": [0.3, 0.8], "auto_augment": "rand-m9-n3-mstd0.5-inc1"},
    ],
)
def test_the_view_is_where_each_pixel_came_from(augment):
    """An image whose colours are its own coordinates shows where a transform has moved each pixel."""
    transform = TrainTransform(
        Augment.from_config({"hflip": 0.5, "vflip": 0.5, "interpolation": "bilinear"} | augment), (32, 40)
    )
    if transform.sampler is not None:
        shapes = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
        rand = transform.sampler.transforms[0]
        rand.ops = np.array([op for op in rand.ops if op.name in shapes])
        transform.sampler.fill = (0, 0, 255)
    rows, columns = np.mgrid[0:80, 0:100]
    picture = np.stack([(columns + 0.5) / 100 * 255, (rows + 0.5) / 80 * 255, 0 * rows], -1).round().astype(np.uint8)
    for seed in range(8):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        out = transform({"image": picture, "map_scores": None})
        inside = out["image"][..., 2] == 0
        ys, xs = np.mgrid[0:32, 0:40]
        points = np.stack([(xs + 0.5) / 40, (ys + 0.5) / 32, np.ones_like(xs, float)], -1)
        source = points @ out["map_view"].T
        moved = np.abs(source - out["image"][..., :2] / 255)[1:-1, 1:-1][inside[1:-1, 1:-1]]
        assert inside.mean() > 0.2 and np.median(moved) < 0.01 and moved.max() < 0.05


def test_scores_outside_the_image_are_zeros():
    view = torch.from_numpy(view_matrix((0, 0, 1, 1), (False, False), [Op("TranslateXRel", 0.5, True)], (8, 8)))[None]
    found = token_scores(torch.ones(1, 1, 4, 4), torch.full((1, 1, 4, 4), 2), view, (2, 4), 3)
    assert torch.equal(found[0, 2], torch.tensor([[1.0, 1, 0, 0]] * 2)) and not found[0, :2].any()


IMAGES = SimpleNamespace(name=lambda index: "cat/7.jpg", blank={})


def test_maps_are_read_as_the_authors_write_them(tmp_path):
    (tmp_path / "cat").mkdir()
    scores, labels = torch.rand(5, 18, 18), torch.randint(0, 1000, (5, 18, 18))
    torch.save(torch.stack([scores.half(), labels.half()]), tmp_path / "cat/7.pt")
    read = LabelMaps(IMAGES, str(tmp_path), 1000).read(0)
    assert np.array_equal(read["map_scores"], scores.half().float()) and np.array_equal(read["map_labels"], labels)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no label map .*cat/7.pt"),
        (torch.zeros(5, 18, 18), r"must hold one tensor \(2, k, h, w\) of scores and labels, not \(5, 18, 18\)"),
        (torch.full((2, 5, 4, 4), 1000.0), "must hold labels from 0 to 999, the classes of the data"),
        ({"a": torch.zeros(1)}, r"must hold one tensor .* not dict"),
        (Evil(), "was refused, because weights files must hold tensors only"),
    ],
)
def test_other_files_are_refused(tmp_path, capsys, content, message):
    (tmp_path / "cat").mkdir()
    if content is not None:
        torch.save(content, tmp_path / "cat/7.pt")
    with pytest.raises(ValueError, match=message):
        LabelMaps(IMAGES, str(tmp_path), 1000).read(0)
    assert "executed" not in capsys.readouterr().out


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"task.token_labels.source=.*no is no folder of label maps"):
        LabelMaps(IMAGES, str(tmp_path / "no"), 10)
