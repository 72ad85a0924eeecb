"""Training and evaluating from the command line, on the embedded digits."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from retinue.runs.training import check_limits
from retinue.tasks.classification import Classification
from retinue.tasks.distillation import Teacher
from tests.retinue.runs.cli import SMALL, SWIN, result, rows

FIELDS = {
    "status", "task", "model", "data", "seed", "metrics", "params", "macs", "epochs", "steps", "seconds",
    "images_per_second", "peak_memory_mb", "device", "precision", "versions", "git_commit", "config_sha256",
}  # fmt: skip


def assert_same_metrics(one, other):
    """Check that metrics are equal up to the rounding of a different batch size."""
    assert one["metrics"].keys() == other["metrics"].keys()
    for name, value in one["metrics"].items():
        if isinstance(value, float | int):
            assert value == pytest.approx(other["metrics"][name], rel=1e-6), name


def test_a_run_leaves_one_result_and_is_not_run_again(cli):
    first = cli.train("data=digits")
    assert first.code == 0, first.err
    [config] = cli.folder.glob("outputs/classification/digits/swin_nano/*-s0/config.yaml")
    run = config.parent
    assert {"config.yaml", "metrics.csv", "result.json", "curves.png", "checkpoints"} <= {p.name for p in run.iterdir()}
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt", "best.ckpt"}
    wrote = result(run)
    assert wrote.keys() >= FIELDS and wrote["status"] == "finished"
    assert (wrote["epochs"], wrote["steps"], wrote["seed"]) == (2, 10, 0)
    assert 0 <= wrote["metrics"]["test/top1"] <= 1 and wrote["metrics"]["test/n"] == 357
    assert "epoch 2/2" in first.err and "images/s" in first.err and str(run) in first.out and "test/top1" in first.out

    stamp = (run / "result.json").stat().st_mtime_ns
    again = cli.train("data=digits")
    assert again.code == 0 and "epoch" not in again.err and str(run) in again.out
    assert (run / "result.json").stat().st_mtime_ns == stamp

    assert cli.train("data=digits", "rerun=true").code == 0
    assert (run / "result.json").stat().st_mtime_ns > stamp
    # The same seed gives the same run.
    assert result(run)["metrics"] == wrote["metrics"]

    same = cli("eval", f"run={run}", "trainer.accelerator=cpu")
    assert same.code == 0, same.err
    [evaluated] = run.glob("evaluation/*/result.json")
    assert_same_metrics(result(evaluated.parent), wrote)
    files = {p.name for p in evaluated.parent.iterdir()}
    assert files >= {"result.json", "predictions.csv", "confusion.png", "reliability.png"}
    predictions = rows(evaluated.parent / "predictions.csv")
    assert len(predictions) == 357
    assert sum(row["correct"] == "1" for row in predictions) / 357 == pytest.approx(wrote["metrics"]["test/top1"])


def test_a_sweep_goes_on_past_a_job_that_fails(cli):
    outcome = cli("train", "-m", *SWIN, *SMALL, "model.mixers=windw,full")
    assert "no op is called 'windw'" in outcome.error
    assert len(list(cli.folder.glob("outputs/*/*/*/*/result.json"))) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("recipe.optimizer.name=lamb", "recipe.clip_grad=1.0"),
        (
            "recipe.optimizer.name=sgd",
            "recipe.optimizer.eps=null",
            "recipe.optimizer.momentum=0.9",
            "recipe.ema.decay=null",
        ),
        (
            "recipe.loss=bce",
            "recipe.bce_target_threshold=0.2",
            "recipe.augment.mixup=0.2",
            "recipe.optimizer.layer_decay=0.7",
        ),
        ("trainer.precision=bf16", "task.grad_checkpointing=true", "trainer.accumulate_grad_batches=2"),
        ("recipe.augment.repeats=3", "recipe.augment.auto_augment=3a", "recipe.augment.color_jitter=0.3"),
        ("model=timm", "model.name=resnet10t", "callbacks=early_stopping", "logger=tensorboard"),
        ("model=biformer", "model.size=null", "data.in_chans=1", "data.mean=[0.309]", "data.std=[0.349]"),
    ],
    ids=["lamb", "sgd", "bce", "bf16", "augment", "timm", "grey"],
)
def test_the_options_of_a_recipe_train(cli, arguments):
    outcome = cli.train(*arguments, "recipe.epochs=1", "hydra.run.dir=run")
    assert outcome.code == 0, outcome.err
    logged = rows(cli.folder / "run/metrics.csv")
    assert logged and all(float(row["train/loss"]) > 0 for row in logged)


def test_accumulated_batches_equal_one_large_batch(cli):
    sgd = ("recipe.optimizer.name=sgd", "recipe.optimizer.eps=null", "recipe.optimizer.lr=0.05", "recipe.epochs=1",
           "+model.args.drop_path_rate=0.0", "recipe.ema.decay=null")  # fmt: skip
    assert cli.train(*sgd, "hydra.run.dir=whole", "trainer.limit_train_batches=3").code == 0
    halves = ("trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=6")
    assert cli.train(*sgd, *halves, "hydra.run.dir=halves").code == 0
    whole, accumulated = (
        torch.load(f"{name}/checkpoints/last.ckpt", weights_only=True) for name in ("whole", "halves")
    )
    assert whole["global_step"] == accumulated["global_step"] == 3
    for key, value in whole["state_dict"].items():
        torch.testing.assert_close(value, accumulated["state_dict"][key], rtol=1e-4, atol=1e-6)


def test_the_average_of_the_weights_is_saved_and_evaluated(cli):
    assert cli.train("hydra.run.dir=run", "recipe.ema.decay=0.9", "recipe.ema.warmup=false").code == 0
    state = torch.load("run/checkpoints/best.ckpt", weights_only=True)
    average, current = state["state_dict"], state["current_model_state"]
    weight = next(key for key in average if key.endswith("head.weight"))
    assert not torch.equal(average[weight], current[weight])
    whole_numbers = [key for key in average if not average[key].is_floating_point()]
    assert all(torch.equal(average[key], current[key]) for key in whole_numbers)
    assert cli("eval", "run=run", "hydra.run.dir=evaluation", "trainer.accelerator=cpu").code == 0
    assert_same_metrics(result(cli.folder / "evaluation"), result(cli.folder / "run"))


def test_fine_tuning_at_another_size_and_number_of_classes(cli, tmp_path_factory):
    from tests.imagenet_folder import make_imagenet_folder

    assert cli.train("hydra.run.dir=small").code == 0
    root = make_imagenet_folder(tmp_path_factory.mktemp("imagenet"), classes=3, per_class=12, broken=False)
    tuned = cli.train(
        "data=imagenet", f"data.root={root}", "data.image_size=48", "recipe=small_data", "recipe.batch_size=8",
        "hydra.run.dir=tuned", "weights=small/checkpoints/best.ckpt", "drop_classifier=true",
    )  # fmt: skip
    assert tuned.code == 0, tuned.err
    refused = cli.train("data=imagenet", f"data.root={root}", "recipe=small_data", "recipe.batch_size=8",
                        "weights=small/checkpoints/best.ckpt", "hydra.run.dir=refused")  # fmt: skip
    assert "drop_classifier" in refused.error
    assert not (cli.folder / "refused").exists()


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_distillation_loss(mode, tmp_path):
    weights = str(tmp_path / "teacher.pth")
    torch.save(timm.create_model("swin_nano", num_classes=5).state_dict(), weights)
    teacher = Teacher(teacher="swin_nano", weights=weights, mode=mode, alpha=0.25, temperature=2.0, num_classes=5)
    image, loss = torch.randn(3, 3, 32, 32), torch.tensor(2.0)
    mean, std = teacher.preprocessing["mean"], teacher.preprocessing["std"]
    scores = teacher.net(teacher.see(image, (0.3, 0.4, 0.5), (0.1, 0.2, 0.3)))
    torch.testing.assert_close(teacher.see(image, mean, std), image)
    assert not scores.requires_grad
    logits = torch.randn(3, 5)
    student, teacher_shares = (F.softmax(x / 2.0, -1) for x in (logits, scores))
    expected = {
        "soft": 4 * (teacher_shares * (teacher_shares / student).log()).sum(1).mean(),
        "hard": -F.log_softmax(logits, -1)[range(3), scores.argmax(1)].mean(),
    }[mode]
    answer, tokens = teacher.answer(image, (0.3, 0.4, 0.5), (0.1, 0.2, 0.3))
    assert torch.equal(answer, scores) and tokens is None
    torch.testing.assert_close(teacher.blend(loss, logits, answer), 0.75 * loss + 0.25 * expected)
    assert copy.deepcopy(teacher) is teacher


@pytest.mark.parametrize(
    ("share", "batches", "devices", "refused"),
    [
        (0.1, 9, 1, True),
        (0.2, 9, 1, False),
        (0.2, 9, 2, False),
        (0.1, 9, 2, True),
        (1.0, 1, 2, False),
        (1, 1, 2, False),
    ],
)
def test_a_share_of_less_than_one_batch_is_refused(share, batches, devices, refused):
    """The batches are those of a device, of which validation pads the last one: all of one batch is one for each."""
    trainer = {"devices": devices, "num_nodes": 1, "limit_train_batches": 1.0, "limit_val_batches": share}
    data: Any = SimpleNamespace(train_dataloader=lambda: range(64), val_dataloader=lambda: range(batches))
    with pytest.raises(ValueError, match="less than one") if refused else nullcontext():
        check_limits(OmegaConf.create({"trainer": trainer}), data)


def test_a_student_learns_from_a_teacher_and_does_not_save_it(cli):
    assert cli.train("hydra.run.dir=teacher").code == 0
    distil = ("task.distillation.teacher=swin_nano", "task.distillation.weights=teacher/checkpoints/last.ckpt")
    student = cli.train("hydra.run.dir=student", *distil)
    assert student.code == 0
    assert "teacher swin_nano: mean 0.309 0.309 0.309, std 0.349 0.349 0.349" in student.out
    teacher, student = (
        torch.load(f"{name}/checkpoints/last.ckpt", weights_only=True) for name in ("teacher", "student")
    )
    assert teacher["state_dict"].keys() == student["state_dict"].keys()
    assert result(cli.folder / "student")["metrics"] != result(cli.folder / "teacher")["metrics"]


@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_labels_are_smoothed_once_with_and_without_mixing(kind):
    recipe = {
        "loss": kind,
        "bce_target_threshold": None,
        "augment": {"label_smoothing": 0.1},
        "optimizer": {"name": "adamw"},
        "schedule": {"kind": "cosine"},
    }
    task = Classification(
        torch.nn.Linear(1, 1), recipe, num_classes=4, distillation={"teacher": None}, channels_last=False
    )
    logits, label = torch.randn(3, 4), torch.tensor([0, 2, 3])
    smooth = 0.9 * F.one_hot(label, 4) + 0.1 / 4
    if kind == "ce":
        expected = -(smooth * F.log_softmax(logits, -1)).sum(1).mean()
    else:
        expected = F.binary_cross_entropy_with_logits(logits, smooth)
    torch.testing.assert_close(task.loss(logits, label), expected)
    torch.testing.assert_close(task.loss(logits, smooth), expected)
