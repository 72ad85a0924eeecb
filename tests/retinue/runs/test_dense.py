"""Detection and segmentation from the command line: trained, killed and resumed, evaluated by two processes."""

import json
import shutil
import signal

import pytest
import torch

from datamodules.scenes import write_scenes
from tests.retinue.runs.cli import SWIN, averages_shards, result, rows, run_here, start, stop_when
from tests.retinue.runs.test_resume import assert_a_killed_run_ends_the_same, assert_same_run

FIGURES = {"detection": ("box_ap", "mask_ap", "box_ar100", "box_ap_small"), "segmentation": ("miou", "pixel_accuracy")}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, {"train": 12, "val": 4, "test": 7})
    return folder


def command(task, scenes):
    return (
        *SWIN, f"task={task}", f"data.root={scenes}", "data.image_size=[96,120]", "data.num_workers=0", "logger=none",
        "trainer.accelerator=cpu", "recipe.epochs=2", "recipe.batch_size=4", "recipe.ema.decay=0.5",
        # With a learning rate for another batch size the batch counts as chosen, and is not reduced for few images.
        "recipe.optimizer.lr_batch_size=8",
        "recipe.schedule.warmup_steps=1", "recipe.optimizer.lr=2e-3", "checkpoint.every_steps=1", "hydra.run.dir=run",
        *(("recipe.augment.crop=[64,64]",) if task == "segmentation" else ()),
    )  # fmt: skip


@pytest.fixture(scope="module", params=FIGURES)
def undisturbed(request, scenes, tmp_path_factory):
    """Train a task without a stop, and return its name and the run's folder."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        assert run_here("train", *command(request.param, scenes), monkeypatch=monkeypatch) == 0
    return request.param, folder / "run"


def test_a_run_leaves_its_result_and_its_log(undisturbed):
    task, run = undisturbed
    saved = result(run)
    assert (saved["task"], saved["data"], saved["model"]) == (task, "scenes", "swin_nano")
    assert saved["head"] == {"detection": "mask_rcnn", "segmentation": "semantic_fpn"}[task]
    assert saved["params"] > 1e5 and saved["macs"] > 1e7
    assert saved["metrics"]["test/n"] == 7
    for name in FIGURES[task]:
        value = saved["metrics"][f"test/{name}"]
        assert value is None or 0 <= value <= 1
    logged = rows(run / "metrics.csv")[-1]
    losses = {"detection": ("loss_rpn_cls", "loss_bbox", "loss_mask"), "segmentation": ("decode.loss_ce",)}[task]
    assert all(float(logged[f"train/{name}"]) > 0 for name in losses), logged
    assert logged[f"val/{FIGURES[task][0]}"] != ""


def test_a_killed_run_ends_like_an_undisturbed_run(undisturbed, scenes, cli, tmp_path):
    task, run = undisturbed
    killed = start("train", *command(task, scenes), folder=tmp_path)
    previous = tmp_path / "run/checkpoints/previous.ckpt"
    assert stop_when(killed, previous, signal.SIGKILL) == -signal.SIGKILL
    assert not (tmp_path / "run/result.json").exists()
    again = cli("train", *command(task, scenes))
    assert again.code == 0 and "going on from" in again.err, again.err
    assert_same_run(run, tmp_path / "run")


HEADS = {
    "fcos": ("task=detection",), "rtmdet": ("task=detection",), "segformer": (), "fpn_lite": (), "ds_transunet": (),
    "hbformer": (), "att_swin_unet": (), "iml_vit": (), "transdae": (), "wau": (),
    "linear": ("recipe.freeze=[backbone]",), "eomt": ("model=deit", "+model.args.dim=48", "+model.args.heads=3"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_a_killed_run_of_a_head_ends_like_an_undisturbed_run(head, scenes, tmp_path):
    task = "detection" if "task=detection" in HEADS[head] else "segmentation"
    arguments = [*command(task, scenes), f"head={head}", *HEADS[head]]
    if head == "eomt":
        arguments = [argument for argument in arguments if argument not in SWIN]
    assert_a_killed_run_ends_the_same(arguments, tmp_path)


@pytest.mark.parametrize(
    "undisturbed", ["detection", pytest.param("segmentation", marks=pytest.mark.slow)], indirect=True
)
def test_two_processes_count_each_image_once(undisturbed, cli, tmp_path):
    task, run = undisturbed
    shutil.copytree(run, tmp_path / "run")
    evaluation = cli(
        "eval", "run=run", "trainer=cpu", "trainer.devices=2", "trainer.strategy=ddp", "batch_size=2", "save_images=3",
        "hydra.run.dir=evaluation",
    )  # fmt: skip
    assert evaluation.code == 0, evaluation.err
    parallel, single = result(tmp_path / "evaluation")["metrics"], result(run)["metrics"]
    assert parallel["test/n"] == 7
    for name in FIGURES[task]:
        assert parallel[f"test/{name}"] == pytest.approx(single[f"test/{name}"], abs=1e-6), name
    files = {path.name for path in (tmp_path / "evaluation").iterdir()}
    expected = {"detection": {"detections.json", "pr_curves.png"}, "segmentation": {"iou.csv", "confusion.png"}}[task]
    assert expected | {"per_class.png", "images"} <= files
    assert len(list((tmp_path / "evaluation/images").glob("*.png"))) == 3


@averages_shards
@pytest.mark.slow
def test_a_sharded_run_leaves_the_weights_of_a_whole_net(undisturbed, scenes, tmp_path):
    task, run = undisturbed
    sharded = start(
        "train", *command(task, scenes), "trainer.devices=2", "trainer.strategy=fsdp", "recipe.ema.decay=null",
        folder=tmp_path,
    )  # fmt: skip
    _, err = sharded.communicate(timeout=400)
    assert sharded.returncode == 0, err
    states = [torch.load(folder / "checkpoints/last.ckpt", weights_only=True) for folder in (run, tmp_path / "run")]
    whole_net, sharded_net = (
        {key: value.shape for key, value in state["state_dict"].items() if key.startswith("model.")} for state in states
    )
    assert sharded_net == whole_net
    evaluation = start("eval", "run=run", "trainer=cpu", "hydra.run.dir=evaluation", folder=tmp_path)
    _, err = evaluation.communicate(timeout=400)
    assert evaluation.returncode == 0, err
    evaluated, trained = result(tmp_path / "evaluation")["metrics"], result(tmp_path / "run")["metrics"]
    for name in FIGURES[task]:
        assert evaluated[f"test/{name}"] == pytest.approx(trained[f"test/{name}"], abs=1e-6), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=detection", "head=upernet"], "head=upernet is for task=segmentation, not task=detection, which has"),
        (["head=mask_rcnn"], "head=mask_rcnn is for task=detection, not task=classification, which takes none"),
        (["task=detection", "head=mask_rcn"], "head=mask_rcn is not there. Did you mean 'mask_rcnn'?"),
        (["task=detection", "head.neck=rcnt"], "head.neck 'rcnt' is unknown. Did you mean 'rcnet'?"),
        (["task=detection", "head.size=smal"], "head.size 'smal' is unknown. Did you mean 'small'?"),
        (["task=detection", "data=digits"], "data=digits is for task=classification, not task=detection"),
        (["task=segmentation", "task.test.mode=slid"], "task.test.mode must be whole or slide, not 'slid'"),
        (["task=segmentation", "+data.sampler=repeat_factor"], "repeat_factor is for classification and detection"),
        (["task=detection", "task.test.scales=[0.0]"], "task.test.scales"),
        (["task=detection", "model=crossvit"], "has no pyramid of maps"),
        (["data=coco"], "data.root=FOLDER"),
        (["data=ade20k", "data.root=nowhere"], "data.root=nowhere is missing"),
        (["task=detection", "recipe.schedule.kind=stp"], "recipe.schedule.kind must be one of cosine, step, poly"),
    ],
)
def test_an_error_is_one_line_and_leaves_no_files(cli, scenes, arguments, message):
    keys = {argument.partition("=")[0].partition(".")[0] for argument in arguments}
    root = (f"data.root={scenes}",) if "task" in keys and "data" not in keys else ()
    net = () if "model" in keys else SWIN
    outcome = cli("train", *net, "trainer.accelerator=cpu", "logger=none", *arguments, *root)
    assert message in outcome.error
    assert cli.files() == []


def test_an_annotation_without_its_image_is_an_error(cli, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "scenes")
    (tmp_path / "scenes/images/train/00003.jpg").unlink()
    outcome = cli("train", *SWIN, "task=detection", "data.root=scenes", "trainer.accelerator=cpu")
    assert "00003.jpg" in outcome.error


def test_an_unknown_class_is_an_error(cli, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "scenes")
    path = tmp_path / "scenes/annotations/instances_train.json"
    truth = json.loads(path.read_text())
    truth["annotations"][0]["category_id"] = 77
    path.write_text(json.dumps(truth))
    outcome = cli("train", *SWIN, "task=detection", "data.root=scenes", "trainer.accelerator=cpu")
    assert "77" in outcome.error


def test_an_image_without_its_mask_is_an_error(cli, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "scenes")
    (tmp_path / "scenes/masks/train/00003.png").unlink()
    outcome = cli("train", *SWIN, "task=segmentation", "data.root=scenes", "trainer.accelerator=cpu")
    assert "00003" in outcome.error


def test_maps_are_for_segmentation(cli):
    outcome = cli("eval", "model=swin", "weights=nowhere.pth", "save_maps=true", "trainer=cpu")
    assert outcome.error == "error: save_maps=true is for task=segmentation or panoptic, not task=classification"
    assert cli.files() == []
