"""panel=robustness and data.corrupt from the command line: rows, skipped sets, ImageNet's test sets, and errors."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.imagenet import readable_names, synsets
from datamodules.imagenet_variants import ImageNetV2, ObjectNet
from retinue.results.collection import find_runs, group_runs
from retinue.results.report import make_data
from tests.retinue.runs.untrained import make_run

SMALL_PANEL = (
    "panel=robustness", "panel.corruptions=[fog,occlusion]", "panel.severities=[1,5]", "panel.sizes=[0.5]",
    "panel.epsilons=[8]", "panel.pgd_steps=2", "trainer.accelerator=cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return the folder of a run on the digits at 16 px."""
    return make_run(tmp_path_factory.mktemp("runs") / "run", "data.image_size=16")


def write_images(folder: Path, count: int = 2, side: int = 40) -> None:
    rng = np.random.default_rng(len(str(folder)))
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def evaluations(run: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(run.glob("evaluation/*/result.json"))]


def test_a_panel_has_a_row_for_every_change_and_one_result(cli, run):
    assert cli("eval", f"run={run}", "trainer.accelerator=cpu").code == 0
    assert cli("eval", f"run={run}", *SMALL_PANEL).code == 0
    plain, panel = sorted(evaluations(run), key=lambda result: "rows" in result)
    rows = [(row["group"], row["name"], row["level"]) for row in panel["rows"]]
    assert rows == [
        ("corruption", "fog", 1), ("corruption", "fog", 5), ("occlusion", "occlusion", 1),
        ("occlusion", "occlusion", 5), ("size", "size", 8), ("fgsm", "fgsm", 8), ("pgd", "pgd", 8),
    ]  # fmt: skip
    metrics = panel["metrics"]
    # The clean figures are those of a plain evaluation.
    assert plain["metrics"] == {key: metrics[key] for key in plain["metrics"]}
    for row in panel["rows"]:
        assert row["n"] == 357 and row["clean_top1"] == metrics["test/top1"]
        assert row["gap"] == pytest.approx(metrics["test/top1"] - row["top1"])
        assert row["top1_ci95"][0] <= row["top1"] <= row["top1_ci95"][1]
    fog = [row["top1"] for row in panel["rows"] if row["name"] == "fog"]
    assert metrics["test/robust_corruption"] == pytest.approx(np.mean(fog))
    # Digits have none of ImageNet's sets, so none is missing.
    assert panel["skipped"] == {} and panel["panel"] == "robustness"

    # A panel's row is the evaluation of the same corruption.
    corrupted = "data.corrupt={name: fog, severity: 5}"
    assert cli("eval", f"run={run}", corrupted, "trainer.accelerator=cpu").code == 0
    tops = [result["metrics"]["test/top1"] for result in evaluations(run) if "rows" not in result]
    assert fog[1] in tops and len(evaluations(run)) == 3

    # In tables and in the report, a panel is a row of its own.
    runs = [found for found in find_runs(run) if found.kind == "evaluation"]
    assert len(group_runs(runs)) >= 2
    columns = {column["name"]: column for column in make_data(runs, run)["columns"]}
    assert columns["test/robust_corruption"]["unit"] == "%"


def test_wrong_panels_are_refused_in_one_line(cli, run):
    cases = {
        "data.corrupt={name: fogg, severity: 3}": "data.corrupt.name must be one of gaussian_noise",
        "data.corrupt={name: fog, severity: 9}": "data.corrupt.severity",
        "panel=robust": "",
    }
    for override, message in cases.items():
        assert message in cli("eval", f"run={run}", override).error
    missing = cli("eval", f"run={run}", *SMALL_PANEL, "panel.sets.a=somewhere").error
    assert "panel.sets.a needs data=imagenet with its 1,000 classes, not data=digits" in missing
    assert "panel.severities" in cli("eval", f"run={run}", *SMALL_PANEL, "panel.severities=[6]").error


def test_imagenet_v2_has_folders_of_labels(tmp_path):
    for label in (0, 3, 10, 999):
        write_images(tmp_path / str(label))
    data = ImageNetV2(root=str(tmp_path), synsets="imagenet1k", image_size=32, num_workers=0)
    assert data.images("test").labels.tolist() == [0, 0, 3, 3, 10, 10, 999, 999]
    assert data.class_subset is None
    write_images(tmp_path / "1000")
    with pytest.raises(ValueError, match="a folder 1000"):
        ImageNetV2(root=str(tmp_path), synsets="imagenet1k", image_size=32).images("test")


def make_objectnet(root: Path) -> Path:
    """Write a folder as ObjectNet's archive has it: two objects that are ImageNet's, and one that is none."""
    for folder in ("chair", "backpack", "air_freshener"):
        write_images(root / "images" / folder)
    mappings = {
        "folder_to_objectnet_label.json": {"chair": "Chair", "backpack": "Backpack", "air_freshener": "Air freshener"},
        "objectnet_to_imagenet_1k.json": {
            "Chair": "barber chair; folding chair; rocking chair, rocker",
            "Backpack": "backpack, back pack, knapsack, packsack, rucksack, haversack",
        },
    }
    (root / "mappings").mkdir()
    for name, content in mappings.items():
        (root / "mappings" / name).write_text(json.dumps(content))
    return root


def test_objectnet_accepts_every_class_of_an_object_and_cuts_the_border(tmp_path):
    data = ObjectNet(root=str(make_objectnet(tmp_path)), synsets="imagenet1k", image_size=32, num_workers=0)
    names = readable_names(synsets())
    images = data.images("test")
    assert len(images) == 4
    assert [names[label] for label in images.labels] == ["backpack"] * 2 + ["barber chair"] * 2
    assert [names[label] for label in data.accepted(2)] == ["barber chair", "folding chair", "rocking chair"]
    assert images.image(0).shape == (36, 36, 3)
    (tmp_path / "mappings" / "objectnet_to_imagenet_1k.json").write_text('{"Chair": "golden chair"}')
    with pytest.raises(ValueError, match=r".golden chair. is no class of ImageNet-1k"):
        ObjectNet(root=str(tmp_path), synsets="imagenet1k", image_size=32).images("test")


@pytest.mark.slow
def test_the_sets_of_imagenet_and_its_corruptions(cli, tmp_path):
    """A net with random weights: what counts is which images and classes a row has."""
    wnids, subset = synsets(), synsets("imagenet_a")
    root, sets = tmp_path / "imagenet", tmp_path / "sets"
    for wnid in {*wnids[:3], *subset[:2]}:
        write_images(root / "train" / wnid, 1)
    for number, wnid in enumerate(sorted({*wnids[:3], *subset[:2]}), start=1):
        folder = root / "val" / wnid
        write_images(folder, 1)
        (folder / "0.png").rename(folder / f"ILSVRC2012_val_{number:08d}.png")
    for wnid in subset[:2]:
        write_images(sets / "a" / wnid)
    write_images(sets / "v2" / "0")
    make_objectnet(sets / "objectnet")
    for wnid in wnids[:2]:
        write_images(sets / "c" / "blur" / "defocus_blur" / "1" / wnid, 1, 224)
        write_images(sets / "c" / "fog" / "1" / wnid, 1, 224)
    imagenet = ("data=imagenet", f"data.root={root}", "data.synsets=imagenet1k", "data.image_size=32")
    run = make_run(tmp_path / "run", *imagenet, "data.num_workers=0")
    outcome = cli(
        "eval", f"run={run}", "panel=robustness", "panel.corruptions=[]", "panel.sizes=[]", "panel.epsilons=[]",
        "panel.severities=[1]", "trainer.accelerator=cpu",
        *(f"panel.sets.{name}={sets / name}" for name in ("a", "v2", "objectnet", "c", "r")),
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    result = evaluations(run)[0]
    rows = {(row["group"], row["name"]): row["n"] for row in result["rows"]}
    # The first image of ImageNet's validation split has no label in ReaL.
    assert rows == {
        ("real", "real"): 4, ("v2", "v2"): 2, ("a", "a"): 4, ("objectnet", "objectnet"): 4,
        ("imagenet_c", "defocus_blur"): 2, ("imagenet_c", "fog"): 2,
    }  # fmt: skip
    skipped = result["skipped"]
    assert skipped["r"] == f"{sets / 'r'} is missing"
    assert skipped["sketch"] == "panel.sets.sketch=FOLDER is not given"
    assert skipped["c/snow/1"].endswith("has no snow/1") and len(skipped) == 15
    assert "test/mce" not in result["metrics"]
    assert "the panel has no sketch" in outcome.err
