"""The command line is completed before Hydra reads it: the choices for few images, and paths with brackets."""

import json

import pytest
import yaml

from retinue.runs import arguments
from retinue.runs.arguments import choose_for_few_images, quote_brackets
from tests.datamodules import test_detection as coco
from tests.datamodules.test_voc import write_year
from tests.datamodules.test_yolo import write_images


def composed(cli, *overrides):
    outcome = cli("train", *overrides, "--cfg", "job")
    assert outcome.code == 0, outcome.err
    return yaml.safe_load(outcome.out), outcome.err


@pytest.fixture
def voc(tmp_path):
    for year, names in (("VOC2007", ["1", "2"]), ("VOC2012", ["3"])):
        objects = {name: [("dog", 0, (1, 1, 9, 9))] for name in names}
        write_year(tmp_path / year, {"train": names, "val": names}, objects)
    sets = ("data.train=[VOC2007/train,VOC2012/train]", "data.val=[VOC2007/val]")
    return ("data=voc", f"data.root={tmp_path}", *sets)


def test_few_images_take_the_small_recipe_head_and_model_and_say_so(cli, voc):
    """A data set of three images took coco_1x, whose warm-up alone is 500 steps."""
    config, err = composed(cli, *voc)
    assert config["data"]["kind"] == "small"
    assert (config["recipe"]["epochs"], config["recipe"]["batch_size"]) == (8, 4)
    message = "data=voc has 3 training images, fewer than 2,000: taking data.kind=small recipe=small_detection, with a"
    assert err.count(message) == 1


def test_what_the_command_line_says_is_kept(cli, voc, monkeypatch):
    config, err = composed(cli, *voc, "data.kind=coco")
    assert (config["data"]["kind"], config["recipe"]["epochs"], err) == ("coco", 12, "")
    config, _ = composed(cli, *voc, "recipe=coco_3x", "head.size=full")
    assert (config["data"]["kind"], config["recipe"]["epochs"]) == ("small", 36)
    assert config["head"]["size"] == "full"
    assert choose_for_few_images([*voc, "experiment=swin/x"]) == [*voc, "experiment=swin/x"]
    monkeypatch.setattr(arguments, "FEW_IMAGES", 3)
    assert choose_for_few_images(voc) == list(voc)


def test_few_images_of_a_json_file(cli, tmp_path):
    coco.write(tmp_path, coco.content())
    paths = [f"data.{key}={value}" for key, value in coco.PATHS.items()]
    config, err = composed(cli, "data=coco_json", *paths)
    assert (config["data"]["kind"], config["recipe"]["epochs"]) == ("small", 8)
    assert "data=coco_json has 5 training images" in err
    # Panoptic data have the same list of images, and a small recipe of their own.
    given = ["data=coco_panoptic", f"data.root={tmp_path}", f"data.train_annotations={coco.PATHS['train_annotations']}"]
    assert choose_for_few_images(given)[:3] == ["data=coco_panoptic", "data.kind=small", "recipe=small_panoptic"]


def test_few_images_of_text_files_and_of_a_table(tmp_path):
    write_images(tmp_path, {"a": "0 0.5 0.5 0.2 0.4", "b": None})
    (tmp_path / "data.yaml").write_text("train: images\nnames: [cat]\n")
    (tmp_path / "train.csv").write_text("a.jpg,1,2,3,4,cat\na.jpg,5,6,7,8,cat\nb.jpg,1,2,3,4,cat\n")
    for data in ("data=yolo", "data=box_csv"):
        given = [data, f"data.root={tmp_path}"]
        assert choose_for_few_images(given) == [data, "data.kind=small", "recipe=small_detection", given[1]]
        assert choose_for_few_images([data, "data.root=nowhere"]) == [data, "data.root=nowhere"]


@pytest.mark.parametrize("content", [None, "no json", "[]", json.dumps({"images": 3})])
def test_data_that_cannot_be_counted_are_left_to_the_data_module(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    given = ["data=coco_json", "data.train_annotations=a.json"]
    assert choose_for_few_images(given) == given
    for given in (["data=voc"], ["data=voc", "data.root=nowhere"], ["data=voc", "data.root=a,b"], ["data=coco"]):
        assert choose_for_few_images(given) == given


def test_paths_with_brackets(cli, tmp_path):
    """Hydra refused such a path with a message about its grammar."""
    root = tmp_path / "a [b]" / "c"
    root.mkdir(parents=True)
    outcome = cli("train", "data=image_folder", f"data.root={root}")
    assert outcome.error == f"error: no class folders in {root}: expected one folder of images a class"
    outcome = cli("eval", f"run={root}")
    assert f"run={root} is no run folder: it has no config.yaml" in outcome.error


@pytest.mark.parametrize(
    "argument",
    ["model.mixers=[agent,window]", "data.root='/a/[b]'", 'data.root="/a/[b]"', "a=choice([1],[2])", "seed=0,1", "-m",
     "a={b:[1]}", "data.train=[a/b]", "+x=[[1,2],[3,4]]", "a=1,[2]"],
)  # fmt: skip
def test_other_values_are_left_as_they_are(argument):
    assert quote_brackets([argument]) == [argument]
