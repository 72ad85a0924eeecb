"""Weights for other classes: the chosen rows of their classifier score the classes of the data."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import yaml

from datamodules.imagenet import readable_names, synsets
from models.classifier_rows import ClassifierRows
from models.weights import load_weights
from retinue.runs.classifier_map import read_classifier_map
from retinue.runs.schema import check_values
from tests.imagenet_folder import WNIDS, make_imagenet_folder
from tests.retinue.runs.test_config import composed


def data(wnids=WNIDS) -> Any:
    return SimpleNamespace(wnids=list(wnids), class_names=readable_names(wnids))


def read(source, datamodule) -> ClassifierRows:
    rows = read_classifier_map(str(source), datamodule)
    assert rows is not None
    return rows


@pytest.mark.parametrize("name", ["imagenet12k", "imagenet22k", "imagenet21k_goog", "imagenet22k_ms"])
def test_lists_of_timm_match_by_wordnet_ids(name, caplog):
    wnids, known = synsets(), synsets(name)
    rows = read(name, data(wnids))
    assert rows.count == len(known) and len(rows.rows) == 1000
    assert [known[row] for row in rows.rows if row >= 0] == [wnid for wnid in wnids if wnid in known]
    # ImageNet-22k has no teddy bears.
    missing = [wnid for wnid, row in zip(wnids, rows.rows, strict=True) if row < 0]
    assert missing == [wnid for wnid in wnids if wnid not in known]
    assert ("n04399382" in missing) == (name != "imagenet22k_ms") == ("start anew" in caplog.text)


def test_classes_of_a_run_match_by_name(tmp_path):
    names = ["cat", "dog", "eel"]
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"names": names, "ids": [0, 1, 2], "subset": None}))
    assert read(path, SimpleNamespace(class_names=["eel", "cow", "cat"])).rows == [2, -1, 0]
    assert read_classifier_map(None, data()) is None


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("swin_nano", {"depths": (1, 1), "heads": (1, 1)}),
        ("test_resnet", {}),
        ("swin_tiny_patch4_window7_224", {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (1, 1, 1, 1)}),
    ],
)
def test_the_net_scores_as_the_chosen_rows_do(name, args):
    torch.manual_seed(0)
    trained = timm.create_model(name, num_classes=9, **args).eval()
    net = timm.create_model(name, num_classes=4, **args).eval()
    image, own = torch.randn(2, 3, 32, 32), net.get_classifier()  # pyright: ignore[reportCallIssue]
    before = {key: value.clone() for key, value in own.state_dict().items()}
    loaded = load_weights(net, trained.state_dict(), classifier_rows=ClassifierRows([8, 3, -1, 3], 9, "map"))
    assert not loaded.missing and not loaded.dropped
    with torch.no_grad():
        expected, scores = trained(image), net(image)
    torch.testing.assert_close(scores[:, [0, 1, 3]], expected[:, [8, 3, 3]])
    for key, value in own.state_dict().items():
        assert torch.equal(value[2], before[key][2])


def test_misfits_are_one_line(tmp_path):
    def error(call, *args, **kwargs) -> str:
        with pytest.raises(ValueError, match="classifier_map") as caught:
            call(*args, **kwargs)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    file = tmp_path / "map.txt"
    file.write_text("0\n1\n")
    assert "has 2 numbers, and the data have 8 classes" in error(read, file, data())
    file.write_text("0\n1\n2\n3\n4\n5\n6\n-2\n")
    assert "line 8" in error(read, file, data())
    assert "neither a file nor a list" in error(read, "imagenet22", data())
    assert "none of the data's classes, which are cat" in error(
        read, "imagenet22k", SimpleNamespace(class_names=["cat", "dog"])
    )
    args: dict[str, Any] = {"depths": (1, 1), "heads": (1, 1)}
    net = timm.create_model("swin_nano", num_classes=2, **args)
    state = timm.create_model("swin_nano", num_classes=5, **args).state_dict()
    for rows, count, words in (
        ([0, 5], None, "class 1 the row 5, and the classifier in the weights has the rows 0 to 4"),
        ([0, 1], 21841, "for a classifier of 21841 classes, and the one in the weights has 5"),
    ):
        assert words in error(load_weights, net, state, classifier_rows=ClassifierRows(rows, count, "m"))
    state = timm.create_model("swin_nano", num_classes=0, **args).state_dict()
    assert "no classifier" in error(load_weights, net, state, classifier_rows=ClassifierRows([0, 1], None, "m"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["weights=a.pth", "drop_classifier=true"], "drop_classifier=true leaves out the classifier"),
        ([], "which is missing"),
        (["weights=a.pth", "task=segmentation"], "not for task=segmentation"),
        (["weights=a.pth", "task=pretraining"], "not for task=pretraining"),
    ],
)
def test_contradictions_are_refused(overrides, words):
    with pytest.raises(ValueError, match=words):
        check_values(composed("classifier_map=imagenet22k", *overrides))


def test_a_run_starts_from_the_rows_of_its_file(cli):
    root = make_imagenet_folder(cli.folder / "imagenet", classes=3, broken=False)
    torch.save(timm.create_model("swin_nano", num_classes=9).state_dict(), "nine.pth")
    command = ("data=imagenet", f"data.root={root}", "recipe=small_data", "recipe.batch_size=8", "weights=nine.pth")
    for name in ("map.txt", "copy.txt"):
        (cli.folder / name).write_text("8\n0\n4\n")
    done = cli.train(*command, "recipe.epochs=1", "classifier_map=map.txt")
    assert done.code == 0, done.err
    # The same file under another name is the same run.
    again = cli.train(*command, "recipe.epochs=1", "classifier_map=copy.txt")
    assert again.code == 0, again.err
    configs = list(cli.folder.rglob("config.yaml"))
    assert len(configs) == 1
    assert set(yaml.safe_load(configs[0].read_text())["weights_sha256"]) == {"weights", "classifier_map"}
    (cli.folder / "map.txt").write_text("8\n0\n9\n")
    assert "class 2 the row 9" in cli.train(*command, "recipe.epochs=1", "classifier_map=map.txt").error
