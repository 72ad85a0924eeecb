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

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools, with numpy 2
ONE = pytest.approx(1, abs=1e-12)  # pycocotools adds 2e-16 to what it divides by
CATEGORIES = [7, 2, 40]  # of labels 0, 1, 2
NAMES = ["seven", "two", "forty"]
IMAGES = [300, 10, 200, 11, 12, 13]  # ids of positions 0 to 5


def ellipse(box, size) -> np.ndarray:
    """(H, W) bool: the ellipse that fills a box (x, y, width, height) of whole numbers."""
    x, y, w, h = box
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    return ((columns - x - w / 2) / (w / 2)) ** 2 + ((rows - y - h / 2) / (h / 2)) ** 2 <= 1


def make_truth(seed: int = 0) -> dict[str, Any]:
    """Annotations of six images of different sizes, the last one empty, the fourth with a crowd; numbers from 0."""
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
    """Tensors that a detector of the true objects (not of crowds) would give, `shift` pixels too far right and down."""
    size = (truth["images"][position]["height"], truth["images"][position]["width"])
    objects = [a for a in truth["annotations"] if a["image_id"] == IMAGES[position] and not a["iscrowd"]]
    boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = np.zeros((len(objects), *size), bool)
    for mask, each in zip(masks, objects, strict=True):
        mask[:] = np.roll(decode_mask(each["segmentation"], size), (shift, shift), (0, 1))
    scores = torch.linspace(0.9, 0.5, len(objects)) if objects else torch.zeros(0)
    labels = torch.tensor([CATEGORIES.index(a["category_id"]) for a in objects], dtype=torch.int64)
    return {"boxes": boxes + shift, "scores": scores, "labels": labels, "masks": torch.from_numpy(masks), "size": size}


def perfect(truth: dict[str, Any]) -> list[ImageDetections]:
    return [ImageDetections.from_tensors(i, **predictions(truth, i)) for i in range(len(IMAGES))]


def noisy(truth: dict[str, Any], seed: int = 0) -> list[ImageDetections]:
    """True objects shifted, some missing, some of another class, and some at random."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(len(IMAGES)):
        parts = [predictions(truth, i, shift) for shift in (0, 1, 3, 8)]
        size = parts[0].pop("size")
        each = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        n = len(each["scores"])
        each["scores"] = torch.from_numpy(rng.uniform(0.05, 1, n).astype(np.float32))
        wrong = torch.from_numpy(rng.random(n) < 0.2)
        each["labels"] = torch.where(wrong, (each["labels"] + 1) % 3, each["labels"])
        kept = torch.from_numpy(rng.random(n) < 0.7)
        found.append(ImageDetections.from_tensors(i, **{key: value[kept] for key, value in each.items()}, size=size))
    return found


def judged(kind: str, found: list[ImageDetections], truth: dict[str, Any], seen=IMAGES):
    return evaluate(kind, coco_results(found, IMAGES, CATEGORIES), truth, seen, CATEGORIES)


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_the_truth_itself_scores_one(kind):
    truth = make_truth()
    accuracy = judged(kind, perfect(truth), truth)
    assert set(accuracy.figures) == set(FIGURES)
    for name in set(FIGURES) - {"ar1"}:  # one detection an image and class cannot find two objects
        assert accuracy.figures[name] == ONE, name
    assert (np.abs(accuracy.precision - 1) < 1e-12).all()
    shifted = [ImageDetections.from_tensors(i, **predictions(truth, i, 2)) for i in range(len(IMAGES))]
    assert 0.2 < (judged(kind, shifted, truth).figures["ap"] or 0) < 0.9


def direct(results: list[dict], truth: dict[str, Any], kind: str) -> list[float]:
    """The twelve of pycocotools as its demonstration calls it, on annotations numbered from 1."""
    truth = truth | {"annotations": [each | {"id": each["id"] + 1} for each in truth["annotations"]]}
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
    found = noisy(truth)
    write_results(tmp_path / "detections.json", coco_results(found, IMAGES, CATEGORIES))
    results = json.loads((tmp_path / "detections.json").read_text())
    box, mask = judged("box", found, truth), judged("mask", found, truth)
    assert 0.1 < (box.figures["ap"] or 0) < 0.9
    assert list(box.figures.values()) == direct([dict(each) for each in results], truth, "bbox")
    for each in results:
        del each["bbox"]  # as for COCO's server: else pycocotools judges the size of a mask by its box
    assert list(mask.figures.values()) == direct(results, truth, "segm")


def test_faster_coco_eval_agrees():
    truth = make_truth()
    results = coco_results(noisy(truth), IMAGES, CATEGORIES)
    iou_type: Any
    for kind, iou_type in (("box", "bbox"), ("mask", "segm")):
        ours = list(evaluate(kind, results, truth, IMAGES, CATEGORIES).figures.values())
        stripped = [{k: v for k, v in each.items() if kind == "box" or k != "bbox"} for each in results]
        coco = FasterCOCO(truth | {"annotations": [each | {"id": each["id"] + 1} for each in truth["annotations"]]})
        faster = COCOeval_faster(coco, coco.loadRes(stripped), iou_type, print_function=lambda *_: None)
        faster.run()
        assert ours == pytest.approx(list(faster.stats)[:12], abs=1e-12)


def test_a_range_without_objects_is_null_and_nothing_found_is_nought():
    truth = make_truth()
    truth["annotations"] = [each for each in truth["annotations"] if each["area"] < 32**2 and not each["iscrowd"]]
    accuracy = judged("box", perfect(truth), truth)
    assert (accuracy.figures["ap"], accuracy.figures["ap_small"]) == (1, 1)
    assert accuracy.figures["ap_medium"] is accuracy.figures["ar_large"] is None
    nothing = judged("mask", [], truth)
    assert (nothing.figures["ap"], nothing.figures["ar100"], nothing.figures["ap_large"]) == (0, 0, None)


def test_only_the_images_that_were_seen_count():
    truth = make_truth()
    found = perfect(truth)[:2]
    assert judged("box", found, truth, IMAGES[:2]).figures["ap"] == 1
    assert 0 < (judged("box", found, truth).figures["ap"] or 0) < 0.9


def test_a_crowd_excuses_what_is_found_in_it():
    truth = make_truth()
    crowd = next(each for each in truth["annotations"] if each["iscrowd"])
    results = coco_results(perfect(truth), IMAGES, CATEGORIES)
    x, y, w, h = crowd["bbox"]
    part = {"image_id": crowd["image_id"], "category_id": crowd["category_id"], "score": 0.99}
    results += [part | {"bbox": [x + w / 4, y + h / 4, w / 2, h / 2]}]
    assert evaluate("box", results, truth, IMAGES, CATEGORIES).figures["ap"] == 1
    crowd["iscrowd"] = 0
    assert (evaluate("box", results, truth, IMAGES, CATEGORIES).figures["ap"] or 0) < 1


def test_classes_are_told_in_the_order_of_labels():
    truth = make_truth()
    found = perfect(truth)
    for each in found:
        each.labels[each.labels == 2] = 1  # every "forty" is taken for a "two"
    boxes = judged("box", found, truth)
    table = per_class({"box": boxes}, truth, IMAGES, CATEGORIES, NAMES)
    count = [sum(a["category_id"] == c and not a["iscrowd"] for a in truth["annotations"]) for c in CATEGORIES]
    assert [row["n"] for row in table.values()] == count
    assert (table["seven"]["box_ap"], table["forty"]["box_ap"]) == (1, 0)
    assert 0 < table["two"]["box_ap"] < 1
    assert np.mean([row["box_ap"] for row in table.values()]) == pytest.approx(boxes.figures["ap"])

    truth["annotations"] = [each for each in truth["annotations"] if each["category_id"] != 2]
    boxes = judged("box", perfect(truth), truth)
    table = per_class({"box": boxes}, truth, IMAGES, CATEGORIES, ["a", "b", "a"])
    assert list(table) == ["a (0)", "b", "a (2)"]
    assert table["b"] == {"n": 0, "box_ap": None}
    assert table["a (2)"]["box_ap"] == 1


def test_the_likeliest_come_first_with_their_masks():
    rng = np.random.default_rng(0)
    size, n = (17, 23), 130
    masks = torch.from_numpy(rng.random((n, *size)) < 0.5)
    scores = torch.from_numpy(rng.random(n).astype(np.float32)).bfloat16()
    boxes = torch.arange(n * 4.0).reshape(n, 4)
    found = ImageDetections.from_tensors(5, boxes, scores, torch.arange(n), masks, size)
    assert sorted(found.labels.tolist()) == list(range(n)) and len(found.boxes) == n
    assert np.array_equal(found.scores, scores.float().sort(descending=True).values.numpy())
    assert found.masks is not None
    for label, box, counts in zip(found.labels, found.boxes, found.masks, strict=True):
        assert (box == boxes[label].numpy()).all()
        assert (decode_mask({"size": size, "counts": counts}, size) == masks[label].numpy()).all()


def test_images_of_several_ranks_count_once():
    truth = make_truth()
    found = perfect(truth)
    padding = ImageDetections.from_tensors(-1, **predictions(truth, 0))
    again = ImageDetections.from_tensors(1, **predictions(truth, 1, 9))
    merged = merge([found[4], found[1], padding, found[0], again, found[3], found[2], found[5]])
    assert [each.index for each in merged] == list(range(6))
    assert merged[1] is found[1]
    results = coco_results(merged, IMAGES, CATEGORIES)
    assert evaluate("box", results, truth, IMAGES, CATEGORIES).figures["ap"] == 1


def test_masks_of_all_of_cocos_forms():
    size = (20, 30)
    mask = np.zeros(size, bool)
    mask[3:9, 5:20] = True
    polygon = [[5, 3, 20, 3, 20, 9, 5, 9]]
    flat = mask.T.ravel()
    runs = np.diff(np.flatnonzero(np.r_[True, flat[1:] != flat[:-1], True])).tolist()
    compressed: Any = rle.encode(np.asfortranarray(mask, np.uint8))
    for form in (polygon, {"size": list(size), "counts": runs}, compressed):
        assert (decode_mask(form, size) == mask).all()


def test_it_is_quiet_and_leaves_the_truth_as_it_was(capfd):
    truth = make_truth()
    before = json.dumps(truth)
    judged("mask", noisy(truth), truth)
    assert json.dumps(truth) == before
    assert capfd.readouterr() == ("", "")


def pixels(path) -> np.ndarray:
    """(H, W, 3)"""
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_curves_and_bars_follow_what_was_found(tmp_path):
    truth = make_truth()
    pictures = {}
    for name, found in {"one": noisy(truth), "same": noisy(truth), "better": perfect(truth)}.items():
        accuracies = {kind: judged(kind, found, truth) for kind in ("box", "mask")}
        plot_precision_recall(tmp_path / f"{name}.png", accuracies)
        plot_class_ap(tmp_path / f"{name}_bars.png", accuracies, NAMES)
        pictures[name] = pixels(tmp_path / f"{name}.png")
        blue = (np.abs(pixels(tmp_path / f"{name}_bars.png") - [0, 0x72, 0xB2]).sum(-1) < 10).sum()
        pictures[f"{name} bars"] = blue
    assert np.array_equal(pictures["one"], pictures["same"])
    assert not np.array_equal(pictures["one"], pictures["better"])
    assert pictures["better bars"] > 2 * pictures["one bars"] > 1000  # AP 1 against some 0.3

    truth["annotations"] = [each for each in truth["annotations"] if each["category_id"] == 2]
    accuracies = {"box": judged("box", perfect(truth), truth)}
    plot_precision_recall(tmp_path / "few.png", accuracies)
    plot_class_ap(tmp_path / "few_bars.png", accuracies, NAMES)
    assert pixels(tmp_path / "few_bars.png").shape[0] < pixels(tmp_path / "one_bars.png").shape[0]


def test_what_was_found_is_drawn_on_the_left_where_it_is(tmp_path):
    """One true object in the upper half, one sure detection in the lower half, and one below the threshold."""
    grey = np.full((100, 200, 1), 128, np.uint8)
    masks = torch.zeros(2, 100, 200, dtype=torch.bool)
    masks[0, 60:90, 20:60] = masks[1, 10:90, 110:190] = True
    boxes = torch.tensor([[20.0, 60, 60, 90], [110, 10, 190, 90]])
    found = ImageDetections.from_tensors(0, boxes, torch.tensor([0.8, 0.2]), torch.tensor([0, 1]), masks, (100, 200))
    truth = [{"bbox": [140, 10, 50, 30], "category_id": 40, "segmentation": [[140, 10, 190, 10, 190, 40, 140, 40]]}]
    plot_detections(tmp_path / "p.png", grey, found, truth, CATEGORIES, NAMES)
    image = pixels(tmp_path / "p.png")
    coloured = np.ptp(image, axis=-1) > 40
    left, right = np.hsplit(coloured, 2)
    for side, (x1, x2), (y1, y2) in ((left, (20, 60), (60, 90)), (right, (140, 190), (10, 40))):
        rows, columns = np.nonzero(side)
        photo = np.nonzero((np.abs(np.hsplit(image, 2)[side is right] - 128) < 3).all(-1))  # the panel's grey picture
        top, bottom, start, end = photo[0].min(), photo[0].max(), photo[1].min(), photo[1].max()
        assert (columns.mean() - start) / (end - start) * 200 == pytest.approx((x1 + x2) / 2, abs=4)
        assert (np.median(rows) - top) / (bottom - top) * 100 == pytest.approx((y1 + y2) / 2, abs=4)
