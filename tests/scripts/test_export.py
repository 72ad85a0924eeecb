"""Export as a user does, from weights and from a run, and use the files without this project."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import models.hub
import retinue.results.hub
from models import load_weights
from models.hub import fetch
from retinue.runs.result_file import read_result
from tests.retinue.runs.cli import SWIN, CommandLine

NET = ("model=timm", "model.name=test_vit", "data.image_size=32", "data.num_workers=0", "trainer=cpu")
# Runs a file with numpy and onnxruntime alone, from its own metadata.
ALONE = """
import json, sys
sys.modules |= dict.fromkeys(("torch", "timm", "models", "retinue"))
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
metadata = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
preparation = metadata["preprocessing"]
mean, std = (np.array(preparation[key], np.float32)[:, None, None] for key in ("mean", "std"))
pixels = np.load(sys.argv[2])
[logits] = session.run(None, {"image": (pixels.astype(np.float32) / 255 - mean) / std})
print(json.dumps({"logits": logits.tolist(), "names": metadata["classes"]["names"], "preprocessing": preparation}))
"""


@pytest.fixture
def cli(capfd, monkeypatch, tmp_path) -> CommandLine:
    return CommandLine(capfd, monkeypatch, tmp_path)


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.manual_seed(0)
    net = timm.create_model("test_vit", num_classes=10, img_size=32)
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@pytest.fixture
def hub(monkeypatch):
    """Return the calls of a hub that keeps folders by the repository's name."""
    folders: dict[str, Path] = {}

    class Api:
        def create_repo(self, name: str, exist_ok: bool) -> str:
            if name.startswith("others/"):
                raise huggingface_hub.errors.LocalEntryNotFoundError("you may not write there\nRequest id 1")
            return f"hub/{name}"

        def upload_folder(self, folder_path: Path, repo_id: str, allow_patterns: list[str]) -> None:
            folders[repo_id] = Path(folder_path)

    def download(name: str, allow_patterns: list[str]) -> str:
        if name not in folders:
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"there is no {name}\nRequest id 2")
        return str(folders[name])

    monkeypatch.setattr(retinue.results.hub, "HfApi", Api)
    monkeypatch.setattr(models.hub, "snapshot_download", download)
    fetch.cache_clear()
    yield folders
    fetch.cache_clear()


def run_alone(file: Path, pixels: np.ndarray) -> dict[str, Any]:
    np.save(file.with_suffix(".npy"), pixels)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, file, file.with_suffix(".npy")], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_an_onnx_file_runs_without_torch(cli, weights):
    outcome = cli("scripts/export", *NET, f"weights={weights}", "out=nets/vit.onnx")
    assert outcome.code == 0 and "any number of images of one size" in outcome.out, outcome.err
    net = timm.create_model("test_vit", num_classes=10, img_size=32).eval()
    load_weights(net, weights)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8)
    answer = run_alone(cli.folder / "nets/vit.onnx", pixels)
    assert answer["names"] == [str(digit) for digit in range(10)]
    mean, std = (torch.tensor(answer["preprocessing"][key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        expected = net((torch.from_numpy(pixels) / 255 - mean) / std)
    torch.testing.assert_close(torch.tensor(answer["logits"]), expected, rtol=1e-4, atol=1e-5)
    assert cli.files() == ["nets/vit.npy", "nets/vit.onnx", "weights.safetensors"]


def test_a_net_goes_to_a_hub_and_comes_back(cli, weights, hub):
    outcome = cli("scripts/export", *NET, f"weights={weights}", "format=hub", "out=vit", "push_to_hub=me/vit")
    assert outcome.code == 0 and "hub/me/vit" in outcome.out, outcome.err
    assert {path.name for path in hub["me/vit"].iterdir()} == {
        "README.md", "classes.json", "config.json", "model.safetensors",
    }  # fmt: skip
    assert "weights=hf-hub:me/vit" in (cli.folder / "vit/README.md").read_text()
    net: Any = timm.create_model(f"local-dir:{cli.folder / 'vit'}", pretrained=True).eval()
    own = timm.create_model("test_vit", num_classes=10, img_size=32).eval()
    assert not load_weights(own, "hf-hub:me/vit").missing
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(images), own(images))
    assert net.pretrained_cfg["input_size"] == (3, 32, 32)
    # The metadata of the file name the same preprocessing.
    outcome = cli("scripts/export", *NET, "weights=hf-hub:me/vit", "format=safetensors", "out=back.safetensors")
    assert outcome.code == 0, outcome.err
    with safe_open(cli.folder / "back.safetensors", "pt") as file:
        source = json.loads(file.metadata()["source"])
        assert json.loads(file.metadata()["preprocessing"])["mean"] == list(net.pretrained_cfg["mean"])
    assert source["weights"] == "hf-hub:me/vit" and len(source["weights_sha256"]) == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("out=net.pth",), "out takes files that end in .onnx, not net.pth"),
        (("out=a.pt2", "format=torch", "int8=true"), "int8=true is for format=onnx, not format=torch"),
        (("out=a", "format=hub", "dynamic_size=true"), "dynamic_size=true is for format=onnx or torch"),
        (("out=a.onnx", "push_to_hub=me/net"), "push_to_hub=me/net needs format=hub"),
        (("out=a.onnx", "fromat=torch"), "'fromat'"),
        (("out=a.onnx",), "there are no weights"),
        (("out=a.onnx", "weights=hf-hub:me/none"), "hf-hub:me/none cannot be read from the hub: there is no me/none"),
        (("out=a.onnx", "task=detection", "weights=w.pth"), "export.py is for classification, multi_label"),
    ],
)
def test_a_wrong_argument_is_one_line(cli, hub, arguments, message):
    net = () if "task=detection" in arguments else NET
    assert message in cli("scripts/export", *net, *arguments).error
    assert not cli.files()


def test_a_hub_that_refuses_leaves_the_folder(cli, weights, hub):
    outcome = cli("scripts/export", *NET, f"weights={weights}", "format=hub", "out=vit", "push_to_hub=others/vit")
    assert "push_to_hub=others/vit: you may not write there; the folder vit is complete" in outcome.error
    assert (cli.folder / "vit/model.safetensors").is_file()


def test_a_file_that_fails_its_check_is_not_written(cli, weights, monkeypatch):
    import models.exporting

    monkeypatch.setattr(models.exporting, "load_program", lambda path: lambda images: torch.zeros(len(images), 10))
    outcome = cli("scripts/export", *NET, f"weights={weights}", "format=torch", "out=a.pt2")
    assert "the exported graph differs from the net" in outcome.error
    assert cli.files() == ["weights.safetensors"]


@pytest.mark.slow
def test_a_trained_net_is_exported_with_its_figures(cli, hub):
    cli.train("recipe.epochs=3", "trainer.limit_train_batches=20")
    [run] = (cli.folder / "outputs/classification/digits").glob("*/*")
    result: Any = read_result(run)
    for arguments in (("out=a.onnx",), ("format=torch", "out=a.pt2"), ("format=hub", "out=net", "push_to_hub=me/net")):
        outcome = cli("scripts/export", f"run={run}", *arguments)
        assert outcome.code == 0, outcome.err
    outcome = cli("scripts/export", f"run={run}", "out=int8.onnx", "int8=true", "calibration=64", "test_images=150")
    assert outcome.code == 0 and f"in place of {result['metrics']['test/top1']:.1f}"[:-2] in outcome.out, outcome.err
    assert "on 150 test images" in outcome.out and "times as fast" in outcome.out
    small = onnxruntime.InferenceSession(cli.folder / "int8.onnx").get_modelmeta().custom_metadata_map
    assert small == onnxruntime.InferenceSession(cli.folder / "a.onnx").get_modelmeta().custom_metadata_map
    assert (cli.folder / "int8.onnx").stat().st_size < (cli.folder / "a.onnx").stat().st_size / 2

    card = (cli.folder / "net/README.md").read_text()
    low, high = result["metrics"]["test/top1_ci95"]
    assert f"| test/top1 | {result['metrics']['test/top1']:.4f} | {low:.4f} to {high:.4f} |" in card
    # The config in the repository brings the run's preprocessing and its size of images.
    evaluated = cli("eval", *SWIN, "weights=hf-hub:me/net", "trainer=cpu", "data.num_workers=0")
    assert evaluated.code == 0, evaluated.err
    [again] = (cli.folder / "outputs/evaluation").rglob("result.json")
    assert json.loads(again.read_text())["metrics"]["test/top1"] == result["metrics"]["test/top1"]
