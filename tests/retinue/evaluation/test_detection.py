"""COCO's figures agree with pycocotools and faster-coco-eval; per-class table, results file and plots."""

import contextlib
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO as FasterCOCO
from faster_coco_eval import COCOeval_faster
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retinue.evaluation.detection import (
    FIGURES,
    ImageDetections,
    coco_results,
    decode_mask,
    evaluate,
    merge,
    per_class,
    write_results,
)
from retinue.evaluation.detection_plots import plot_class_ap, plot_detections, plot_precision_recall

# pycocotools warns with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")
# pycocotools adds 2e-16 to its divisors, so its figures are not exactly 1.
ONE = pytest.approx(1, abs=1e-12)
# Ids and names of the classes, by label.
CATEGORIES = [7, 2, 40]
NAMES = ["seven", "two", "forty"]
# Ids of the images, by position.
IMAGES = [300, 10, 200, 11, 12, 13]


def ellipse(box, size) -> np.ndarray:
    """Return the ellipse that fills a box (x, y, width, height) of whole numbers: bool (H, W)."""
    x, y, w, h = box
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    return ((columns - x - w / 2) / (w / 2)) ** 2 + ((rows - y - h / 2) / (h / 2)) ** 2 <= 1


def make_truth(seed: int = 0) -> dict[str, Any]:
    """Return annotations of six images of different sizes: the fourth has a crowd, the last is empty; ids from 0."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for position, image_id in enumerate(IMAGES):
        size = (150 + 7 * position, 230 - 11 * position)
        images.append({"id": image_id, "height": size[0], "width": size[1], "file_name": f"val/{image_id}.jpg"})
        for i in range(0 if image_id == IMAGES[-1] else 5):
            w, h = (int(side) for side in np.exp(rng.uniform(np.log(9), np.log(120), 2)))
            x, y = int(rng.integers(0, size[1] - w)), int(rng.integers(0, size[0] - h))
            encoded: Any = rle.encode(np.asfortranarray(ellipse((x, y, w, h), size), np.uint8))
            annotations.append({
                "id": len(annotations), "image_id": image_id, "category_id": CATEGORIES[int(rng.integers(3))],
                "bbox": [float(side) for side in rle.toBbox(encoded)], "area": float(rle.area(encoded)),
                "segmentation": {"size": list(size), "counts": encoded["counts"].decode()},
                "iscrowd": int(position == 3 and i == 0),
            })  # fmt: skip
    categories = [{"id": number, "name": name} for number, name in zip(CATEGORIES, NAMES, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def predictions(truth: dict[str, Any], position: int, shift: int = 0) -> dict[str, Any]:
    """Return the tensors of a detector that finds all objects except crowds, `shift` pixels too far right and down."""
    size = (truth["images"][position]["height"], truth["images"][position]["width"])
    objects = [a for a in truth["annotations"] if a["image_id"] == IMAGES[position] and not a["iscrowd"]]
    boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = np.zeros((len(objects), *size), bool)
    for mask, annotation in zip(masks, objects, strict=True):
        mask[:] = np.roll(decode_mask(annotation["segmentation"], size), (shift, shift), (0, 1))
    scores = torch.linspace(0.9, 0.5, len(objects)) if objects else torch.zeros(0)
    labels = torch.tensor([CATEGORIES.index(a["category_id"]) for a in objects], dtype=torch.int64)
    return {"boxes": boxes + shift, "scores": scores, "labels": labels, "masks": torch.from_numpy(masks), "size": size}


def perfect(truth: dict[str, Any]) -> list[ImageDetections]:
    return [ImageDetections.from_tensors(i, **predictions(truth, i)) for i in range(len(IMAGES))]


def noisy(truth: dict[str, Any], seed: int = 0) -> list[ImageDetections]:
    """Return detections of shifted objects: random ones are missing and random ones have another class."""
    rng = np.random.default_rng(seed)
    detections = []
    for i in range(len(IMAGES)):
        parts = [predictions(truth, i, shift) for shift in (0, 1, 3, 8)]
        size = parts[0].pop("size")
        tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        n = len(tensors["scores"])
        tensors["scores"] = torch.from_numpy(rng.uniform(0.05, 1, n).astype(np.float32))
        wrong = torch.from_numpy(rng.random(n) < 0.2)
        tensors["labels"] = torch.where(wrong, (tensors["labels"] + 1) % 3, tensors["labels"])
        keep = torch.from_numpy(rng.random(n) < 0.7)
        kept = {key: value[keep] for key, value in tensors.items()}
        detections.append(ImageDetections.from_tensors(i, **kept, size=size))
    return detections


def evaluate_images(kind: str, detections: list[ImageDetections], truth: dict[str, Any], image_ids=IMAGES):
    return evaluate(kind, coco_results(detections, IMAGES, CATEGORIES), truth, image_ids, CATEGORIES)


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_the_ground_truth_itself_scores_one(kind):
    truth = make_truth()
    accuracy = evaluate_images(kind, perfect(truth), truth)
    assert set(accuracy.figures) == set(FIGURES)
    # ar1 allows one detection per image and class, which cannot find two objects.
    for name in set(FIGURES) - {"ar1"}:
        assert accuracy.figures[name] == ONE, name
    assert (np.abs(accuracy.precision - 1) < 1e-12).all()
    shifted = [ImageDetections.from_tensors(i, **predictions(truth, i, 2)) for i in range(len(IMAGES))]
    assert 0.2 < (evaluate_images(kind, shifted, truth).figures["ap"] or 0) < 0.9


def pycocotools_figures(results: list[dict], truth: dict[str, Any], kind: str) -> list[float]:
    """Return the twelve figures of pycocotools, called as in its demonstration, on annotations with ids from 1."""
    truth = truth | {"annotations": [row | {"id": row["id"] + 1} for row in truth["annotations"]]}
    with contextlib.redirect_stdout(io.StringIO()):
        coco: Any = COCO()
        coco.dataset = json.loads(json.dumps(truth))
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(results), kind)  # pyright: ignore[reportArgumentType]
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return list(evaluator.stats)


def test_the_file_of_results_gives_the_same_figures_to_pycocotools(tmp_path):
    truth = make_truth()
    detections = noisy(truth)
    write_results(tmp_path / "detections.json", coco_results(detections, IMAGES, CATEGORIES))
    results = json.loads((tmp_path / "detections.json").read_text())
    box, mask = evaluate_images("box", detections, truth), evaluate_images("mask", detections, truth)
    assert 0.1 < (box.figures["ap"] or 0) < 0.9
    assert list(box.figures.values()) == pycocotools_figures([dict(result) for result in results], truth, "bbox")
    # COCO's server gets no boxes with masks; with boxes, pycocotools would take the size of a mask from its box.
    for result in results:
        del result["bbox"]
    assert list(mask.figures.values()) == pycocotools_figures(results, truth, "segm")


def test_faster_coco_eval_agrees():
    truth = make_truth()
    results = coco_results(noisy(truth), IMAGES, CATEGORIES)
    iou_type: Any
    for kind, iou_type in (("box", "bbox"), ("mask", "segm")):
        ours = list(evaluate(kind, results, truth, IMAGES, CATEGORIES).figures.values())
        stripped = [{k: v for k, v in result.items() if kind == "box" or k != "bbox"} for result in results]
        coco = FasterCOCO(truth | {"annotations": [row | {"id": row["id"] + 1} for row in truth["annotations"]]})
        faster = COCOeval_faster(coco, coco.loadRes(stripped), iou_type, print_function=lambda *_: None)
        faster.run()
        assert ours == pytest.approx(list(faster.stats)[:12], abs=1e-12)


def test_an_area_range_without_objects_is_null_and_no_detections_give_zero():
    truth = make_truth()
    truth["annotations"] = [row for row in truth["annotations"] if row["area"] < 32**2 and not row["iscrowd"]]
    accuracy = evaluate_images("box", perfect(truth), truth)
    assert (accuracy.figures["ap"], accuracy.figures["ap_small"]) == (1, 1)
    assert accuracy.figures["ap_medium"] is accuracy.figures["ar_large"] is None
    nothing = evaluate_images("mask", [], truth)
    assert (nothing.figures["ap"], nothing.figures["ar100"], nothing.figures["ap_large"]) == (0, 0, None)


def test_only_the_evaluated_images_count():
    truth = make_truth()
    detections = perfect(truth)[:2]
    assert evaluate_images("box", detections, truth, IMAGES[:2]).figures["ap"] == 1
    assert 0 < (evaluate_images("box", detections, truth).figures["ap"] or 0) < 0.9


def test_detections_on_a_crowd_are_not_wrong():
    truth = make_truth()
    crowd = next(row for row in truth["annotations"] if row["iscrowd"])
    results = coco_results(perfect(truth), IMAGES, CATEGORIES)
    x, y, w, h = crowd["bbox"]
    part = {"image_id": crowd["image_id"], "category_id": crowd["category_id"], "score": 0.99}
    results += [part | {"bbox": [x + w / 4, y + h / 4, w / 2, h / 2]}]
    assert evaluate("box", results, truth, IMAGES, CATEGORIES).figures["ap"] == 1
    crowd["iscrowd"] = 0
    assert (evaluate("box", results, truth, IMAGES, CATEGORIES).figures["ap"] or 0) < 1


def test_classes_are_in_the_order_of_the_labels():
    truth = make_truth()
    detections = perfect(truth)
    # Every "forty" is detected as a "two".
    for image in detections:
        image.labels[image.labels == 2] = 1
    boxes = evaluate_images("box", detections, truth)
    table = per_class({"box": boxes}, truth, IMAGES, CATEGORIES, NAMES)
    count = [sum(a["category_id"] == c and not a["iscrowd"] for a in truth["annotations"]) for c in CATEGORIES]
    assert [row["n"] for row in table.values()] == count
    assert (table["seven"]["box_ap"], table["forty"]["box_ap"]) == (1, 0)
    assert 0 < table["two"]["box_ap"] < 1
    assert np.mean([row["box_ap"] for row in table.values()]) == pytest.approx(boxes.figures["ap"])

    truth["annotations"] = [row for row in truth["annotations"] if row["category_id"] != 2]
    boxes = evaluate_images("box", perfect(truth), truth)
    table = per_class({"box": boxes}, truth, IMAGES, CATEGORIES, ["a", "b", "a"])
    assert list(table) == ["a (0)", "b", "a (2)"]
    assert table["b"] == {"n": 0, "box_ap": None}
    assert table["a (2)"]["box_ap"] == 1


def test_detections_are_sorted_by_score_with_their_masks():
    rng = np.random.default_rng(0)
    size, n = (17, 23), 130
    masks = torch.from_numpy(rng.random((n, *size)) < 0.5)
    scores = torch.from_numpy(rng.random(n).astype(np.float32)).bfloat16()
    boxes = torch.arange(n * 4.0).reshape(n, 4)
    detections = ImageDetections.from_tensors(5, boxes, scores, torch.arange(n), masks, size)
    assert sorted(detections.labels.tolist()) == list(range(n)) and len(detections.boxes) == n
    assert np.array_equal(detections.scores, scores.float().sort(descending=True).values.numpy())
    assert detections.masks is not None
    for label, box, counts in zip(detections.labels, detections.boxes, detections.masks, strict=True):
        assert (box == boxes[label].numpy()).all()
        assert (decode_mask({"size": size, "counts": counts}, size) == masks[label].numpy()).all()


def test_images_from_several_ranks_count_once():
    truth = make_truth()
    detections = perfect(truth)
    padding = ImageDetections.from_tensors(-1, **predictions(truth, 0))
    again = ImageDetections.from_tensors(1, **predictions(truth, 1, 9))
    merged = merge(
        [detections[4], detections[1], padding, detections[0], again, detections[3], detections[2], detections[5]]
    )
    assert [image.index for image in merged] == list(range(6))
    assert merged[1] is detections[1]
    results = coco_results(merged, IMAGES, CATEGORIES)
    assert evaluate("box", results, truth, IMAGES, CATEGORIES).figures["ap"] == 1


def test_all_mask_formats_of_coco():
    size = (20, 30)
    mask = np.zeros(size, bool)
    mask[3:9, 5:20] = True
    polygon = [[5, 3, 20, 3, 20, 9, 5, 9]]
    flat = mask.T.ravel()
    runs = np.diff(np.flatnonzero(np.r_[True, flat[1:] != flat[:-1], True])).tolist()
    compressed: Any = rle.encode(np.asfortranarray(mask, np.uint8))
    for segmentation in (polygon, {"size": list(size), "counts": runs}, compressed):
        assert (decode_mask(segmentation, size) == mask).all()


def test_evaluation_prints_nothing_and_leaves_the_ground_truth_unchanged(capfd):
    truth = make_truth()
    before = json.dumps(truth)
    evaluate_images("mask", noisy(truth), truth)
    assert json.dumps(truth) == before
    assert capfd.readouterr() == ("", "")


def pixels(path) -> np.ndarray:
    """Read an image file: (H, W, 3)."""
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_curves_and_bars_depend_on_the_detections(tmp_path):
    truth = make_truth()
    pictures = {}
    for name, detections in {"noisy": noisy(truth), "same": noisy(truth), "perfect": perfect(truth)}.items():
        accuracies = {kind: evaluate_images(kind, detections, truth) for kind in ("box", "mask")}
        plot_precision_recall(tmp_path / f"{name}.png", accuracies)
        plot_class_ap(tmp_path / f"{name}_bars.png", accuracies, NAMES)
        pictures[name] = pixels(tmp_path / f"{name}.png")
        blue_pixels = (np.abs(pixels(tmp_path / f"{name}_bars.png") - [0, 0x72, 0xB2]).sum(-1) < 10).sum()
        pictures[f"{name} bars"] = blue_pixels
    assert np.array_equal(pictures["noisy"], pictures["same"])
    assert not np.array_equal(pictures["noisy"], pictures["perfect"])
    # The average precision is 1 instead of about 0.3.
    assert pictures["perfect bars"] > 2 * pictures["noisy bars"] > 1000

    truth["annotations"] = [row for row in truth["annotations"] if row["category_id"] == 2]
    accuracies = {"box": evaluate_images("box", perfect(truth), truth)}
    plot_precision_recall(tmp_path / "few.png", accuracies)
    plot_class_ap(tmp_path / "few_bars.png", accuracies, NAMES)
    assert pixels(tmp_path / "few_bars.png").shape[0] < pixels(tmp_path / "noisy_bars.png").shape[0]


def test_detections_are_drawn_on_the_left_at_their_positions(tmp_path):
    """An object is in the upper half; a detection is in the lower half, another detection is below the threshold."""
    grey = np.full((100, 200, 1), 128, np.uint8)
    masks = torch.zeros(2, 100, 200, dtype=torch.bool)
    masks[0, 60:90, 20:60] = masks[1, 10:90, 110:190] = True
    boxes = torch.tensor([[20.0, 60, 60, 90], [110, 10, 190, 90]])
    detections = ImageDetections.from_tensors(
        0, boxes, torch.tensor([0.8, 0.2]), torch.tensor([0, 1]), masks, (100, 200)
    )
    truth = [{"bbox": [140, 10, 50, 30], "category_id": 40, "segmentation": [[140, 10, 190, 10, 190, 40, 140, 40]]}]
    plot_detections(tmp_path / "p.png", grey, detections, truth, CATEGORIES, NAMES)
    image = pixels(tmp_path / "p.png")
    coloured = np.ptp(image, axis=-1) > 40
    left, right = np.hsplit(coloured, 2)
    for side, (x1, x2), (y1, y2) in ((left, (20, 60), (60, 90)), (right, (140, 190), (10, 40))):
        rows, columns = np.nonzero(side)
        # Pixels of the panel's grey image.
        photo = np.nonzero((np.abs(np.hsplit(image, 2)[side is right] - 128) < 3).all(-1))
        top, bottom, start, end = photo[0].min(), photo[0].max(), photo[1].min(), photo[1].max()
        assert (columns.mean() - start) / (end - start) * 200 == pytest.approx((x1 + x2) / 2, abs=4)
        assert (np.median(rows) - top) / (bottom - top) * 100 == pytest.approx((y1 + y2) / 2, abs=4)
