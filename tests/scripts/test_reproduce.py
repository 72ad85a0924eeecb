import json
import re
from functools import cache, partial
from pathlib import Path

import pytest
import timm
import yaml

from models import complexity
from retinue.results import papers as paper_tables
from retinue.results.collection import find_runs
from scripts import reproduce
from tests.imagenet_folder import make_imagenet_folder
from tests.retinue.runs.cli import SMALL, SWIN, CommandLine, result, rows


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def paper(tmp_path, monkeypatch):
    """Yield a function that writes the tables of `paper=toy`."""

    def make(*variants, detection=()):
        net = {"name": "Toy", "input": 32, "params_m": None, "macs_g": None, "top1": None, "pretrain": None}
        facts = {"title": "A toy", "variants": [net | row for row in variants], "detection": [*detection]}
        (tmp_path / "papers").mkdir(exist_ok=True)
        (tmp_path / "papers/toy.yaml").write_text(yaml.safe_dump(facts))

    monkeypatch.setattr(paper_tables, "PAPERS", tmp_path / "papers")
    yield make
    paper_tables._load.cache_clear()


def table(*options):
    reproduce.main(["paper=toy", "out=table.csv", *options])
    return rows("table.csv")


def finished(folder, result, seed=0, top1=0.5, epochs=300, mixers=None, **config):
    """Write the folder of a finished run, as train.py leaves it."""
    metrics = {"test/top1": top1, "test/top1_ci95": [top1 - 0.01, top1 + 0.01]}
    facts = {"task": "classification", "data": "imagenet", "model": "swin_nano", "metrics": metrics, "epochs": epochs}
    settings = {"model": {"mixers": mixers}, "data": {"classes": None}, "recipe": {"epochs": epochs}, "seed": seed}
    Path(folder).mkdir(parents=True)
    Path(folder, "config.yaml").write_text(yaml.safe_dump(settings | config))
    Path(folder, "result.json").write_text(json.dumps(facts | result))


@cache
def swin_nano():
    params, macs = complexity(partial(timm.create_model, "swin_nano"), 32)
    return {"params": params, "macs": macs}


def test_counts_are_compared_with_the_papers(paper, capsys):
    counted = swin_nano()
    params, macs = counted["params"] / 1e6, counted["macs"] / 1e9
    paper(
        {"net": "swin_nano", "params_m": round(params, 1), "macs_g": round(macs, 3)},
        {"name": "Off", "net": "swin_nano", "params_m": round(1.2 * params, 2)},
        {"name": "Known", "net": "swin_nano", "params_m": 9.9, "params_exception": f"{params:.1f} M are counted"},
        {"name": "Absent", "params_m": 5.0},
    )
    ours, off, known, absent = table()
    for row in (ours, off, known):
        assert float(row["params_m_ours"]) == params and float(row["macs_g_ours"]) == macs
    assert (ours["params_m_note"], ours["macs_g_note"], off["params_m_note"]) == ("", "", "outside the tolerance")
    assert known["params_m_note"] == f"{params:.1f} M are counted"
    assert absent["params_m"] == "5.0" and absent["params_m_ours"] == ""
    out = capsys.readouterr().out
    assert f"{1.2 * params:.2f} / {params:.2f} ✗" in out and f"9.9 / {params:.2f}*" in out
    assert "missing, no net here: Absent" in out and f"* Known at 32 px: {params:.1f} M are counted" in out


def test_accuracy_is_the_mean_over_the_runs_of_the_longest_configuration(paper):
    counted = swin_nano()
    for seed, top1 in enumerate((0.50, 0.52, 0.54)):
        finished(f"outputs/a/long-s{seed}", counted, seed, top1)
    finished("outputs/a/short-s0", counted, top1=0.9, epochs=1)
    finished("outputs/a/other_op-s0", counted, top1=0.9, epochs=600, mixers="full")
    finished("outputs/a/other_classes-s0", counted, top1=0.9, epochs=600, data={"classes": "imagenet_a"})
    finished("outputs/a/other_size-s0", counted | {"macs": 1}, top1=0.9, epochs=600)
    finished("outputs/a/other_net-s0", counted | {"model": "swin_tiny"}, top1=0.9, epochs=600)
    net = {"net": "swin_nano"}
    paper(net | {"top1": 53.0}, net | {"name": "Within", "top1": 54.9}, net | {"name": "Off", "top1": 70.0})
    reproduced = table()
    assert [float(row["top1_ours"]) for row in reproduced] == pytest.approx([52.0] * 3)
    # The interval is 52 ± 4.97.
    assert [row["top1_note"] for row in reproduced] == ["", "", "outside the tolerance"]


def test_the_interval_of_a_single_run_counts(paper):
    finished("outputs/a/one-s0", swin_nano(), top1=0.52)
    paper(*({"net": "swin_nano", "top1": top1} for top1 in (51.2, 50.8)))
    assert [row["top1_note"] for row in table()] == ["", "outside the tolerance"]


def test_a_run_and_its_weights_give_the_same_accuracy(paper, tmp_path, capfd, monkeypatch):
    folder = make_imagenet_folder(tmp_path / "images", classes=3, per_class=8, broken=False)
    cli = CommandLine(capfd, monkeypatch, tmp_path)
    data = ("data.synsets=imagenet1k", f"data.root={folder}", "data.num_workers=0")
    short = ("data.image_size=32", "recipe.batch_size=8", "recipe.schedule.warmup_epochs=2")
    trained = cli("train", *SWIN, *SMALL, "data=imagenet", *data, *short)
    assert trained.code == 0, trained.err
    (run,) = find_runs("outputs")
    top1 = 100 * result(run.folder)["metrics"]["test/top1"]
    paper({"net": "swin_nano", "top1": 99.9})
    assert float(table()[0]["top1_ours"]) == pytest.approx(top1)
    (tmp_path / "outputs").rename("elsewhere")
    assert table()[0]["top1_ours"] == ""
    weights = next(Path("elsewhere").rglob("best.ckpt"))
    assert float(table(f"weights.swin_nano={weights}", *data)[0]["top1_ours"]) == pytest.approx(top1)


def test_the_table_of_biformer_is_complete_and_lists_how_to_train_its_rows(capsys):
    reproduce.main(["paper=biformer", "out=biformer.md"])
    out = capsys.readouterr().out
    lines = Path("biformer.md").read_text().splitlines()
    body = [line for line in lines if line.startswith("| BiFormer-")]
    assert len(body) == 5 and all(
        re.search(r"\| +224 \| +[\d.]+ / [\d.]+ \| +[\d.]+ / [\d.]+ \| +[\d.]+ / – \|", row) for row in body
    )
    assert "✗" not in out and "*" not in out
    experiments = re.findall(r"python train.py experiment=(\S+) data.root=DIR", out)
    assert len(experiments) == 5 and all(
        (paper_tables.CONF / f"experiment/{name}.yaml").is_file() for name in experiments
    )


def test_speed_and_memory_are_measured_on_request(paper):
    paper({"net": "swin_nano"}, {"net": "swin_nano", "input": 64})
    small, large = table("measure=true", "batch_size=4", "device=cpu")
    assert float(small["images_per_s_ours"]) > float(large["images_per_s_ours"]) > 0
    assert float(large["peak_mb_ours"]) > 0


def test_detectors_are_matched_by_net_head_and_schedule(paper):
    rows_ = ({"detector": "Mask R-CNN", "schedule": schedule, "backbone": "toy", "box_ap": 40.0, "mask_ap": None}
             for schedule in ("1x", "3x"))  # fmt: skip
    paper({"net": "swin_nano"}, detection=rows_)
    facts = {"task": "detection", "data": "coco", "metrics": {"test/box_ap": 0.4005}}
    finished("outputs/a/b-s0", facts, epochs=12, head={"name": "mask_rcnn"})
    once, thrice = table("table=detection")
    assert (float(once["box_ap_ours"]), once["box_ap_note"]) == (pytest.approx(40.05), "")
    assert thrice["box_ap_ours"] == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("paper=biformr",), r"there is no paper=biformr\. Did you mean 'biformer'"),
        ((), "paper=TEXT is missing: name of a paper"),
        (("papr=biformer",), r"there is no option 'papr=biformer'\. Did you mean 'paper'"),
        (
            ("paper=biformer", "table=detecton"),
            r"^table must be 'variants', 'detection' or 'segmentation', not detecton\. Did you mean 'detection'",
        ),
        (("paper=biformer", "out=table.txt"), r"out takes files that end in \.csv, \.md, not table\.txt"),
        (("paper=biformer", "weights=a.pth"), r"weights takes weights\.<name>=TEXT, not weights=a\.pth"),
        (("paper=biformer", "weights.biformer_tny=a.pth"), "no row has this net. Did you mean 'biformer_tiny'"),
        (("paper=biformer", "weights.biformer_tiny=a.pth"), "a.pth is not a file"),
    ],
)
def test_wrong_options_are_answered_with_the_nearest(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        reproduce.main(options)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_given_must_hold_runs(paper):
    paper({"net": "swin_nano"})
    with pytest.raises(ValueError, match="there is no folder nowhere"):
        table("folder=nowhere")
