"""Predictions of images without labels, from the command line, by nets with random weights."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.scenes import write_scenes
from retinue.evaluation.detection import evaluate
from retinue.runs.arguments import quote_paths
from retinue.runs.training import build_data
from tests.retinue.runs.cli import SWIN, result
from tests.retinue.runs.test_config import composed
from tests.retinue.runs.untrained import make_run

TASKS = ("classification", "detection", "segmentation")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, {"train": 1, "val": 1, "test": 5})
    return folder


@pytest.fixture(scope="module")
def runs(scenes, tmp_path_factory) -> Path:
    """Return a folder with a run of each task, which has random weights."""
    folder = tmp_path_factory.mktemp("runs")
    dense = (f"data.root={scenes}", "data.image_size=[96,120]", "data.num_workers=0")
    for task in TASKS:
        special = ("data.image_size=16",) if task == "classification" else dense
        make_run(folder / task, f"task={task}", *special)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Return a folder of images of all kinds, two of which cannot be read."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (250, 310, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    (folder / "Büro").mkdir()
    image.save(folder / "Büro/Küche 1 (neu).jpg")
    image.convert("L").resize((31, 45)).save(folder / "grey.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    # Two images whose names differ in their suffix only.
    image.crop((0, 0, 64, 33)).save(folder / "same.png")
    image.crop((9, 0, 64, 33)).save(folder / "same.jpg")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 256).save(folder / "16 bit.png")
    whole = (folder / "cmyk.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("no image")
    return folder


READABLE = ["Büro/Küche 1 (neu).jpg", "cmyk.jpg", "grey.png", "same.jpg", "same.png"]
STEMS = ["Büro/Küche 1 (neu)", "cmyk", "grey", "same.jpg", "same.png"]


@pytest.mark.parametrize("task", TASKS)
def test_broken_images_are_named_and_skipped(cli, runs, photos, task):
    """The data of the run are not needed, since it has kept its classes."""
    away = () if task == "classification" else ("data.root=nowhere",)
    outcome = cli(
        "predict", f"run={runs / task}", f"images={photos}", "save=out (1)", "pictures=true", "batch_size=2",
        "trainer=cpu", *away,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "2 of 7 images are broken and have no prediction: 16 bit.png, truncated.jpg" in outcome.err
    assert "16 bit.png (it has more than 8 bits per channel" in outcome.err
    assert "5 images" in outcome.out and "grey.png" in outcome.out and "out (1)" in outcome.out
    out = Path("out (1)")
    pictures = sorted(path.relative_to(out / "images").as_posix() for path in out.glob("images/**/*.png"))
    assert pictures == [f"{stem}.png" for stem in STEMS]
    if task == "classification":
        rows = json.loads((out / "probabilities.json").read_text())
        with open(out / "probabilities.csv", newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
        assert [row["image"] for row in rows] == [row["image"] for row in table] == READABLE
        for row, cells in zip(rows, table, strict=True):
            probabilities = [entry["probability"] for entry in row["classes"]]
            assert probabilities == sorted(probabilities, reverse=True) and 0.1 <= sum(probabilities) <= 1
            assert [entry["name"] for entry in row["classes"]] == [cells[f"class{i}"] for i in range(1, 6)]
            assert probabilities == [float(cells[f"probability{i}"]) for i in range(1, 6)]
    elif task == "detection":
        ids = json.loads((out / "detection_ids.json").read_text())
        assert [image["file_name"] for image in ids["images"]] == READABLE
        assert [(image["height"], image["width"]) for image in ids["images"]][:3] == [(250, 310), (250, 310), (45, 31)]
        assert ids["categories"] == [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
        found = {entry["image_id"] for entry in json.loads((out / "detections.json").read_text())}
        assert found <= {image["id"] for image in ids["images"]} and found
    else:
        for name, stem in zip(READABLE, STEMS, strict=True):
            with Image.open(out / f"maps/{stem}.png") as image, Image.open(photos / name) as photo:
                assert (image.mode, image.size) == ("P", photo.size)
                assert set(np.unique(np.array(image))) <= set(range(11))
        assert len(json.loads((out / "map_classes.json").read_text())) == 11


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_predictions_are_those_of_an_evaluation(cli, runs, scenes, task):
    shutil.copytree(runs / task, task)
    evaluated = cli("eval", f"run={task}", "save_predictions=true", "trainer=cpu", "hydra.run.dir=evaluated")
    assert evaluated.code == 0, evaluated.err
    predicted = cli("predict", f"run={task}", f"images={scenes}/images/test/*.jpg", "trainer=cpu")
    assert predicted.code == 0, predicted.err
    [out] = Path(task, "predictions").iterdir()
    if task == "segmentation":
        names = {path.name for path in Path("evaluated/maps").iterdir()}
        assert names == {path.name for path in (out / "maps").iterdir()} and len(names) == 5
        for name in [*(f"maps/{name}" for name in names), "map_classes.json"]:
            assert (out / name).read_bytes() == Path("evaluated", name).read_bytes()
        return
    # The scenes' ids are 1, 2, ..., as those of predictions, so both files are the same.
    for name in ("detections.json", "detection_ids.json"):
        assert json.loads((out / name).read_text()) == json.loads(Path("evaluated", name).read_text())
    truth = json.loads((scenes / "annotations/instances_test.json").read_text())
    results, metrics = json.loads((out / "detections.json").read_text()), result(Path("evaluated"))["metrics"]
    for kind in ("box", "mask"):
        ids = [image["id"] for image in truth["images"]], [category["id"] for category in truth["categories"]]
        figures = evaluate(kind, results, truth, *ids).figures
        assert {f"test/{kind}_{name}": value for name, value in figures.items()}.items() <= metrics.items()
    assert metrics["test/box_ar100"] > 0
    written = {path.name for path in Path("evaluated").iterdir()}
    assert {"confusion.png", "confusion.csv", "pr_curves.csv", "pr_sizes.png", "pr_classes.png"} <= written


def test_probabilities_are_those_of_an_evaluation(cli, runs):
    shutil.copytree(runs / "classification", "run")
    evaluated = cli("eval", "run=run", "save_predictions=true", "trainer=cpu", "hydra.run.dir=evaluated")
    assert evaluated.code == 0, evaluated.err
    digits = build_data(composed(*SWIN, "data.image_size=16")).images("test")
    Path("digits").mkdir()
    for index in range(6):
        Image.fromarray(digits.image(index)).save(f"digits/{index}.png")
    predicted = cli("predict", "run=run", "images=digits", "trainer=cpu", "save=out")
    assert predicted.code == 0, predicted.err
    ours, theirs = (json.loads(Path(name, "probabilities.json").read_text()) for name in ("out", "evaluated"))
    assert len(theirs) == 357
    for mine, other in zip(ours, theirs, strict=False):
        assert [entry["label"] for entry in mine["classes"]] == [entry["label"] for entry in other["classes"]]
        probabilities = [[entry["probability"] for entry in row["classes"]] for row in (mine, other)]
        assert probabilities[0] == pytest.approx(probabilities[1], rel=1e-4)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "images=DIR is needed"),
        ("phots", "images=phots: there is no such file or folder. Did you mean 'photos'?"),
        ("photos/*.webp", "images=photos/*.webp: there are no images (looked for .jpg"),
        (
            "photos/truncated.jpg",
            "photos/truncated.jpg: none of the 1 images can be read, such as truncated.jpg",
        ),
    ],
)
def test_an_error_is_one_line_and_leaves_no_files(cli, runs, photos, images, message):
    shutil.copytree(photos, "photos")
    before = cli.files()
    chosen = () if images is None else (f"images={images}",)
    outcome = cli("predict", f"run={runs / 'classification'}", *chosen, "trainer=cpu", "save=out")
    assert message in outcome.error
    assert cli.files() == before


def test_paths_may_hold_any_character():
    given = ["images=Büro/a (1)/*.jpg", "images='done.png'", "save=it's", "run=x", "images=null"]
    quoted = ["images='Büro/a (1)/*.jpg'", "images='done.png'", r"save='it\'s'", "run=x", "images=null"]
    assert quote_paths(given, ("images", "save")) == quoted
