"""probe.py from the command line: results, the cache of features, other data, and errors of one line."""

import json
import os
import signal
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from retinue.probing.cache import cached, images_digest, weights_digest
from retinue.probing.features import KINDS, Features, read
from retinue.results.collection import find_runs, group_runs
from retinue.runs.preprocessing import resolve_preprocessing
from retinue.runs.result_file import write_result
from retinue.runs.training import build_data
from tests.retinue.runs.cli import SWIN, result, start, stop_when
from tests.retinue.runs.test_config import composed
from tests.retinue.runs.untrained import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return the folder of a run on the digits that has random weights."""
    return make_run(tmp_path_factory.mktemp("runs") / "run", "data.image_size=16")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Return a folder of 24 training and 12 validation images of noise, in two classes."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(36):
        path = folder / f"{'val' if i % 3 == 0 else 'train'}/{'ab'[i // 18]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> str:
    """Return the override for a cache of the digits' features that tests share."""
    return f"cache={tmp_path_factory.mktemp('features')}"


@pytest.fixture
def probe(cli, run):
    """Run probe.py on the run, and return the result."""

    def call(*arguments: str) -> dict:
        outcome = cli("probe", f"run={run}", "trainer=cpu", "hydra.run.dir=out", *arguments)
        assert outcome.code == 0, outcome.err
        return result(Path("out")) | {"err": outcome.err}

    return call


def test_a_probe_writes_what_was_read_and_how_it_was_chosen(probe, cli, run, digits):
    linear = (digits, "probe=linear", "probe.learning_rates=[0.1,1]", "probe.weight_decays=[0]", "probe.epochs=5")
    found = probe(*linear)
    assert (found["task"], found["probe"], found["feature"]) == ("probing", "linear", "head")
    assert found["feature_shape"] == [256] and found["train_images"] == 1255
    assert found["chosen"]["learning_rate"] in (0.1, 1.0) and len(found["trials"]) == 2
    assert found["chosen_by"] == "126 of the 1255 training images, the same share of each class"
    metrics = found["metrics"]
    assert next(iter(metrics)) == "test/top1" and metrics["test/n"] == 357
    assert metrics["test/top1_ci95"][0] < metrics["test/top1"] < metrics["test/top1_ci95"][1]
    # The features of a random net say much more than chance.
    assert metrics["test/top1"] > 0.4
    assert Path("out/predictions.csv").read_text().count("\n") == 358
    # The folder follows from the config, and a finished probing is not repeated.
    written = os.stat("out/result.json").st_mtime_ns
    again = probe(*linear)
    assert again["metrics"] == metrics and os.stat("out/result.json").st_mtime_ns == written
    outcome = cli("probe", f"run={run}", "trainer=cpu", digits, "probe=few_shot", "probe.shots=[1,5]")
    assert outcome.code == 0, outcome.err
    (folder,) = (run / "probing").iterdir()
    few = result(folder)
    assert few["from_cache"] == ["train", "test"]
    assert list(few["metrics"])[:3] == ["test/top1_5shot", "test/top1_5shot_ci95", "test/top1_1shot"]
    assert np.mean(few["draws"]["top1_5shot"]) == pytest.approx(few["metrics"]["test/top1_5shot"])


def test_features_are_read_anew_when_what_they_follow_from_differs(probe, run, photos, tmp_path):
    """The run's classifier of ten digits is left out for two classes, and the images keep the run's preparation."""
    knn = (
        "cache=features",
        "probe=knn",
        "probe.k=[5]",
        "data=image_folder",
        f"data.root={photos}",
        "data.num_workers=0",
    )
    first = probe(*knn)
    assert first["from_cache"] == [] and first["trials"] == []
    assert probe(*knn, "seed=1")["from_cache"] == ["train", "test"]
    assert probe(*knn, "++data.std=[0.5,0.5,0.5]")["from_cache"] == []
    assert probe(*knn, "feature=mean")["from_cache"] == []
    state = torch.load(run / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    state = {name: value * (1.0001 if value.is_floating_point() else 1) for name, value in state.items()}
    torch.save({"state_dict": state}, tmp_path / "other.ckpt")
    assert probe(*knn, "weights=other.ckpt")["from_cache"] == []
    (photo,) = photos.glob("train/a/1.png")
    os.utime(photo)
    assert probe(*knn, "seed=4")["from_cache"] == ["test"]
    # A broken file is replaced, and says so in one line.
    for file in Path("features").iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    mended = probe(*knn, "seed=2")
    assert mended["from_cache"] == [] and mended["metrics"] == first["metrics"]
    assert mended["err"].count("cannot be read") == 2


def test_retrieval_and_other_data(probe, photos, digits):
    found = probe(digits, "probe=retrieval", "probe.gallery=test", "probe.ranks=[1,5]")
    assert found["gallery_images"] == 356 and found["bits"] == 256
    assert list(found["metrics"]) == [
        f"test/{name}" for name in (
            "map", "map_ci95", "n", "recall1", "recall1_ci95", "recall5", "recall5_ci95", "hamming_map",
            "hamming_map_ci95",
        )
    ]  # fmt: skip
    found = probe(
        digits, "probe=ood", f"probe.far=[{{name: image_folder, root: {photos}, num_workers: 0}}]", "probe.k=10"
    )
    metrics = found["metrics"]
    assert next(iter(metrics)) == "test/far/image_folder/msp_auroc" and metrics["test/far/image_folder/n"] == 12
    for score in ("msp", "energy", "vim", "knn"):
        for figure in ("auroc", "fpr95"):
            low, high = metrics[f"test/far/image_folder/{score}_{figure}_ci95"]
            assert 0 <= low <= metrics[f"test/far/image_folder/{score}_{figure}"] <= high <= 1
    # Noise is far from the digits.
    assert metrics["test/far/image_folder/knn_auroc"] > 0.9
    assert found["from_cache"] == ["train", "test"]


@pytest.mark.slow
def test_an_attentive_probe_reads_the_map(probe):
    found = probe("cache=null", "probe=attentive", "probe.learning_rates=[0.01]", "probe.epochs=15")
    assert found["feature"] == "map" and found["feature_shape"] == [1, 256]
    assert found["metrics"]["test/top1"] > 0.4


@pytest.mark.slow
def test_a_killed_probing_is_done_again_whatever_it_left_of_its_features(probe, run, tmp_path):
    arguments = ("probe=few_shot", "probe.shots=[1,5]")
    killed = start(
        "probe", f"run={run}", "trainer=cpu", "cache=features", "hydra.run.dir=out", *arguments, folder=tmp_path
    )
    stop_when(killed, tmp_path / "features", signal.SIGKILL)
    assert not Path("out/result.json").exists()
    again = probe("cache=features", *arguments)
    Path("out/result.json").unlink()
    whole = probe("cache=null", *arguments)
    assert whole["from_cache"] == [] and again["metrics"] == whole["metrics"]


@pytest.mark.slow
def test_probes_of_a_trained_net_are_as_good_as_the_net(cli):
    """The features of a net that has learnt the digits give its own accuracy, less one point at most."""
    outcome = cli(
        "train",
        *SWIN,
        "data.image_size=16",
        "recipe.epochs=6",
        "recipe.batch_size=32",
        "trainer=cpu",
        "logger=none",
        "hydra.run.dir=run",
    )
    assert outcome.code == 0, outcome.err
    own = result(Path("run"))["metrics"]["test/top1"]
    for name in ("linear", "logistic", "knn", "attentive"):
        outcome = cli("probe", "run=run", "trainer=cpu", "cache=features", f"probe={name}", f"hydra.run.dir={name}")
        assert outcome.code == 0, outcome.err
        assert result(Path(name))["metrics"]["test/top1"] >= own - 0.01, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["probe=linear", "probe.epochs=0"], "probe.epochs must be a whole number, 1 or more, not 0"),
        (["probe=null"], "probe must be one of attentive, few_shot, knn, linear, logistic, ood, retrieval, not null"),
        (["probe=knn", "feature=map"], "probe=knn reads feature=head or class_token or mean, not feature=map"),
        (["probe=attentive", "feature=mean"], "probe=attentive reads feature=map or tokens, not feature=mean"),
        (["probe=attentive", "probe.pool=eq"], "probe.pool must be one of ep, abmilp, simpool, siglip, aim, jepa"),
        (["feature=class_token"], "Swin has no class token; feature=mean or head"),
        (["probe=ood"], "probe=ood needs other data, such as probe.near=[fashion_mnist]"),
        (["probe=ood", "probe.near=[digits]", "feature=mean"], "no linear function of feature=mean; probe.classifier="),
        (["probe=ood", "probe.near=[scenes]"], "probe=ood takes data of task=classification, not data=scenes"),
        (["probe=ood", "probe.far=[digit]"], "there are no data 'digit'. Did you mean 'digits'?"),
        (["probe=ood", "probe.far=[{name: image_folder, rot: x}]"], "data=image_folder has no key 'rot'. Did you mean"),
        (["trainer.devices=2"], "probe.py computes on one device, not on 2"),
        (["holdout=1"], "holdout must be a number from 0 to below 1, not 1"),
        (["probe=knn", "probe.k=[50,7]", "data=image_folder"], "k=50 neighbours are more than the 22 images"),
    ],
)
def test_errors_are_one_line(cli, run, photos, arguments, message):
    if "data=image_folder" in arguments:
        arguments = [*arguments, f"data.root={photos}", "data.num_workers=0"]
    outcome = cli("probe", f"run={run}", "trainer=cpu", "cache=features", "hydra.run.dir=out", *arguments)
    assert message in outcome.error
    assert not Path("out").exists()


def test_weights_are_needed(cli):
    assert "there are no weights" in cli("probe", "model=swin", "trainer=cpu").error


class Tokens(torch.nn.Module):
    """Net whose final tokens are constants: `extra` ones before a map of 2 x 2, or the map alone."""

    feature_info = ({"reduction": 4},)

    def __init__(self, output: torch.Tensor, **attributes):
        super().__init__()
        self.output = output
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward_features(self, x):
        return self.output.expand(len(x), *self.output.shape)

    def forward_head(self, x, pre_logits):
        assert pre_logits
        return x.flatten(1)


@pytest.mark.parametrize(("height", "extra"), [(8, 0), (8, 2), (7, 1)])
def test_tokens_are_divided_into_extra_ones_and_the_map(height, extra):
    images, tokens = torch.zeros(3, 3, height, 8), torch.randn(extra + 4, 5)
    net = Tokens(tokens)
    features = {kind: read(net, images, kind)[0] for kind in KINDS if kind != "class_token"}
    assert torch.equal(features["map"], tokens[extra:]) and torch.equal(features["tokens"], tokens)
    torch.testing.assert_close(features["mean"], tokens[extra:].mean(0))
    assert torch.equal(features["head"], tokens.flatten())
    if extra:
        assert torch.equal(read(net, images, "class_token")[0], tokens[0])


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_map_of_either_layout_becomes_tokens(channels_last):
    tokens = torch.randn(4, 5)
    place = tokens.unflatten(0, (2, 2))
    net = Tokens(place, output_fmt="NHWC") if channels_last else Tokens(place.permute(2, 0, 1))
    assert torch.equal(read(net, torch.zeros(1, 3, 8, 8), "map")[0], tokens)


def test_probings_with_different_probes_features_or_settings_are_not_averaged(tmp_path):
    choices = [
        ("knn", "head", {"k": [5]}),
        ("knn", "mean", {"k": [5]}),
        ("knn", "head", {"k": [9]}),
        ("few_shot", "head", {}),
    ]
    for seed in (0, 1):
        for number, (name, feature, settings) in enumerate(choices):
            content = {"probe": name, "feature": feature, "settings": settings, "seed": seed, "model": "swin_nano"}
            content |= {"task": "probing", "data": "digits", "weights": "a.pth", "image_size": 32}
            write_result(tmp_path / f"{number}{seed}", content | {"metrics": {"test/top1": 0.5}})
    groups = group_runs(find_runs(tmp_path))
    assert sorted(len(group.runs) for group in groups) == [2, 2, 2, 2]


def test_digests_tell_weights_and_images_apart(tmp_path):
    net: Any = torch.nn.Sequential(OrderedDict(body=torch.nn.Linear(2, 2), head=torch.nn.Linear(2, 3)))
    net.classifiers = "head"
    before = weights_digest(net)
    with torch.no_grad():
        net.head.bias[0] += 1e-6
    assert weights_digest(net) == before
    with torch.no_grad():
        net.body.bias[0] += 1e-6
    assert weights_digest(net) != before
    cfg = composed(*SWIN)
    resolve_preprocessing(cfg)
    data = build_data(cfg)
    digest = images_digest(data.images("test"))
    assert digest != images_digest(data.images("val"))
    data.images("test").images[3, 5, 5] += 1
    assert images_digest(data.images("test")) != digest


def test_a_cache_of_another_content_is_made_anew(tmp_path, caplog):
    features = Features(torch.randn(4, 3), torch.arange(4), torch.arange(4))
    facts = {"net": "a"}
    assert cached(tmp_path, facts, lambda: features)[1] is False
    (file,) = tmp_path.iterdir()
    assert json.loads(_metadata(file)["facts"]) == {"net": "a", "version": 1}
    found, was_there = cached(tmp_path, facts, lambda: pytest.fail("computed although it is in the cache"))
    assert was_there and torch.equal(found.values, features.values)
    assert cached(tmp_path, {"net": "b"}, lambda: features)[1] is False
    for content in (b"", b"no tensors at all", file.read_bytes()[:40]):
        file.write_bytes(content)
        assert cached(tmp_path, facts, lambda: features)[1] is False
        assert "its features are computed anew" in caplog.messages[-1] and "\n" not in caplog.messages[-1]
        assert cached(tmp_path, facts, lambda: pytest.fail("computed again"))[1] is True


def _metadata(file: Path) -> dict[str, str]:
    header = file.read_bytes()
    return json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
