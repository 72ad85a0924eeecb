"""scripts/see.py: every kind leaves a picture and data, and mistakes are refused in one line."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retinue.evaluation.sight import pictures
from retinue.results.run_pictures import read_pictures
from retinue.results.sight import TABLES, VIEWS, sheet
from retinue.results.sight import see as show
from retinue.results.sight.subject import Choices, Subject, load
from retinue.runs.config import register_resolvers
from scripts import see

NET = (
    "model=deit", "model.size=nano", "+model.args.dim=24", "+model.args.depths=[2]", "data.image_size=16",
    "trainer.accelerator=cpu", "data.num_workers=0",
)  # fmt: skip
DATA = {
    "erf": ["erf.csv", "erf.npz"], "attention": ["attention.npz"], "routes": ["routes.npz"],
    "distance": ["distance.csv", "strength.csv"], "gradcam": ["gradcam.npz"], "cka": ["cka.csv"], "pca": ["pca.npz"],
    "frequency": ["frequency.csv"], "similarity": ["similarity.csv"], "influence": ["influence.csv", "spans.csv"],
    "heads": ["heads.csv"], "sinks": ["sinks.csv", "massive.csv"], "paths": ["paths.csv"],
}  # fmt: skip


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def subject() -> Subject:
    register_resolvers()
    return load(None, NET, 8, torch.device("cpu"))


def choices(**changes: Any) -> Choices:
    return Choices(**{"pictures": 1, **changes})


def test_the_net_and_the_images(subject: Subject):
    assert subject.images.shape == (8, 3, 16, 16) and subject.labels.shape == (8,)
    assert subject.photos.min() >= 0 and subject.photos.max() <= 1 and subject.photos.std() > 0.1
    assert subject.title == "deit_tiny on digits, untrained"
    assert not any(parameter.requires_grad for parameter in subject.net.parameters())


@pytest.mark.parametrize("kind", [*VIEWS, *TABLES])
def test_every_kind_leaves_a_picture_and_data(kind: str, subject: Subject, tmp_path: Path):
    show(kind, subject, choices(), tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    pictures = [name for name in files if name.endswith(".png")]
    assert f"{kind}.png" in pictures and sorted([*DATA[kind], *pictures]) == files
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    for name in DATA[kind]:
        if name.endswith(".csv"):
            assert rows(tmp_path / name)
        else:
            with np.load(tmp_path / name) as arrays:
                assert arrays.files and all(arrays[array].size for array in arrays.files)


def test_data_say_what_the_net_does(subject: Subject, tmp_path: Path):
    show("attention", subject, choices(query=None, blocks=["blocks.1.mixer"]), tmp_path)
    with np.load(tmp_path / "attention.npz") as arrays:
        assert arrays.files == ["0/blocks.1.mixer"]
        # The class token attends to itself too.
        sums = arrays["0/blocks.1.mixer"].sum((1, 2))
        assert ((sums > 0.5) & (sums < 1)).all()
    show("cka", subject, choices(), tmp_path)
    assert [float(row[row["block"]]) for row in rows(tmp_path / "cka.csv")] == pytest.approx([1, 1])
    with pytest.raises(ValueError, match="CKA compares nets on the same test images"):
        show("cka", subject, choices(other=replace(subject, labels=subject.labels + 1)), tmp_path)
    show("similarity", subject, choices(resized={32: subject}), tmp_path)
    assert [row["image_size"] for row in rows(tmp_path / "similarity.csv")] == ["16", "16", "32", "32"]


def test_an_op_without_attention_is_left_out(subject: Subject, tmp_path: Path, capsys):
    mixed = load(None, [*NET, "model.mixers=[[channel,window]]"], 4, torch.device("cpu"))
    show("routes", mixed, choices(), tmp_path)
    assert "blocks.0.mixer: ChannelAttention has no attention: it is of the family channel" in capsys.readouterr().err
    with np.load(tmp_path / "routes.npz") as arrays:
        assert {name.split("/")[1] for name in arrays.files} == {"blocks.1.mixer"}
    only = load(None, [*NET, "model.mixers=channel"], 4, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"no module.s attention can be shown; blocks.1.mixer: Channel"):
        show("attention", only, choices(), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kind=efr"], "kind must be .* Did you mean 'erf'"),
        (["kind=attention", "query=[0.5,2]"], r"query must be class, or \[y,x\] from 0 to 1, not \[0.5,2\]"),
        (["kind=erf", "other=RUN"], "other=RUN is for kind=cka, not kind=erf"),
        (["kind=erf", "sizes=[32]"], "sizes is for kind=frequency or similarity"),
        (["kind=erf", "data=scenes_segmentation", "task=segmentation"], "not task=segmentation"),
        (["kind=erf", "run=nowhere"], "run=nowhere is no run folder"),
        (["kind=gradcam", "method=gradcan", *NET], "method must be one of .* Did you mean 'gradcam'"),
        (["kind=pca", "blocks=blocks.7", *NET], "there is no block 'blocks.7'. Did you mean 'blocks.1'"),
    ],
)
def test_a_mistake_is_refused(arguments: list[str], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        see.main([*arguments, "images=2", f"out={tmp_path}"])


def test_a_sheet_has_a_row_for_each_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subject: Subject, capsys):
    channel = load(None, [*NET, "model.mixers=channel"], 8, torch.device("cpu"))
    nets, drawn = {"a": subject, "b": channel}, {}
    monkeypatch.setattr(sheet, "load", lambda run, *_: nets[run.name])
    monkeypatch.setattr(pictures, "draw_grid", lambda path, cells, *rest: drawn.update({path.stem: (cells, *rest)}))
    out = {kind: tmp_path / f"{kind}.png" for kind in ("erf", "attention")}
    runs = {"full": Path("a"), "channel": Path("b")}
    sheet.draw_sheets(runs, (0.9, 0.1), torch.device("cpu"), out, "two nets")
    for cells, title, mark in drawn.values():
        assert [row[0][0].splitlines()[0] for row in cells] == ["full", "channel"] and title.endswith(", two nets")
        assert mark == ((0.9, 0.1) if title.startswith("attention") else None)
    # A net without attention has the reason in its row.
    [(caption, _, heat)] = drawn["attention"][0][1]
    assert "ChannelAttention has no attention" in " ".join(caption.split()) and heat is None
    assert "attention of channel: no module's attention can be shown" in capsys.readouterr().err
    with np.load(tmp_path / "attention.npz") as arrays:
        assert arrays.files == ["full/0/blocks.0.mixer"]


def test_the_files_of_a_run_lie_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subject: Subject):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(see, "load", lambda *_: subject)
    (tmp_path / "run").mkdir()
    see.main(["kind=attention", "run=run", "query=[0.2,0.7]", "pictures=1"])
    [shown] = read_pictures(tmp_path / "run")
    assert shown["title"] == "attention, query 0.2,0.7"
    assert shown["command"] == "python scripts/see.py kind=attention run=run 'query=[0.2,0.7]' pictures=1"
    assert shown["src"].startswith("data:image/png;base64,iVBOR")
    see.main(["kind=erf", *NET])
    assert sorted(path.name for path in (tmp_path / "sight").iterdir()) == ["erf.csv", "erf.json", "erf.npz", "erf.png"]
