"""Composed configs: the groups, the checks, and the config of an evaluation."""

import pytest
import timm
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from datamodules.dense_transforms import DenseAugment
from models import model_name
from retinue.runs.config import (
    allow_run_keys,
    check,
    per_device_batch,
    register_resolvers,
    with_run,
)
from retinue.runs.help import list_choices
from retinue.utils.paths import CONF

IMAGENET = ("data=imagenet", "data.root=/data/in1k")


def composed(*overrides: str, program: str = "train") -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(program, overrides=["run_dir=run", *overrides])


def test_biformer_recipe_is_the_papers():
    """The figures are those of the README and train_args of the authors' repository."""
    recipe = composed("model=biformer", "data=imagenet").recipe
    assert (recipe.epochs, recipe.batch_size, recipe.optimizer.name) == (300, 1024, "adamw")
    assert recipe.optimizer.lr * recipe.batch_size / recipe.optimizer.lr_batch_size == 5e-4 * 1024 / 512
    assert (recipe.optimizer.weight_decay, recipe.optimizer.eps) == (0.05, 1e-8)
    assert (recipe.schedule.warmup_epochs, recipe.schedule.warmup_lr, recipe.schedule.min_lr) == (5, 1e-6, 1e-5)
    augment = recipe.augment
    assert (augment.auto_augment, augment.mixup, augment.cutmix) == ("rand-m9-mstd0.5-inc1", 0.8, 1.0)
    assert (augment.erasing, augment.label_smoothing, augment.repeats) == (0.25, 0.1, 3)
    assert recipe.ema.decay == 0.99996


def test_a_step_is_divided_among_devices_and_accumulated_batches():
    cfg = composed(
        "recipe.batch_size=256", "trainer.devices=4", "trainer.num_nodes=2", "trainer.accumulate_grad_batches=2"
    )
    assert per_device_batch(cfg) == 16
    cfg.recipe.batch_size = 100
    with pytest.raises(ValueError, match=r"recipe\.batch_size=100 .* 8 devices x 2 accumulated batches; .* can: 96"):
        per_device_batch(cfg)


def test_data_of_another_task_is_refused():
    cfg = composed()
    cfg.task.name = "segmentation"
    with pytest.raises(ValueError, match="data=digits is for task=classification, not task=segmentation"):
        check(cfg)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("head=mask_rcnn",), "head=mask_rcnn is for task=detection, not task=classification, which takes none"),
        (
            ("task=segmentation", "head=dino"),
            "head=dino is for task=detection, not task=segmentation, which has .*upernet",
        ),
    ],
)
def test_a_head_of_another_task_is_refused(overrides, says):
    with pytest.raises(ValueError, match=says):
        check(composed(*overrides))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("data=ade20k", "recipe=coco_3x"), "recipe is for task=detection, not task=segmentation"),
        (("data=coco", "recipe=swin"), "recipe is for task=classification, not task=detection"),
        (("recipe=small_segmentation",), "recipe is for task=segmentation, not task=classification"),
    ],
)
def test_a_recipe_of_another_task_is_refused(overrides, says):
    with pytest.raises(ValueError, match=says):
        check(composed(*overrides))


@pytest.mark.parametrize(
    ("task", "figure"), [("classification", "top1"), ("detection", "box_ap"), ("segmentation", "miou")]
)
def test_early_stopping_watches_the_tasks_figure(task, figure):
    callback = composed(f"task={task}", "callbacks=early_stopping").callbacks.early_stopping
    assert (callback.monitor, callback.mode) == (f"val/{figure}", "max")


@pytest.mark.parametrize("data", ["coco", "ade20k"])
def test_the_config_of_an_evaluation_has_the_augmentation_of_its_task(data):
    DenseAugment.from_config(dict(composed(f"data={data}", program="eval").recipe.augment))


def evaluation_config(tmp_path, *arguments: str) -> DictConfig:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/best.ckpt").touch()
    OmegaConf.save(composed("data=ade20k", "data.root=/data/ade"), tmp_path / "config.yaml")
    overrides = allow_run_keys([f"run={tmp_path}", *arguments])
    return with_run(composed(*overrides, program="eval"), overrides, ["data", "task", "recipe"])


def test_overrides_of_a_run_apply_to_its_config(tmp_path):
    cfg = evaluation_config(tmp_path, "task.test.mode=slide", "data.root=/elsewhere", "trainer.precision=bf16")
    assert (cfg.task.test.mode, cfg.task.test.flip, cfg.data.root) == ("slide", False, "/elsewhere")
    assert (cfg.data.name, cfg.trainer.precision) == ("ade20k", "bf16")


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("task.test.mod=slide", "no key 'task.test.mod' in .*yaml. Did you mean 'mode'"),
        ("data.rot=/data", "no key 'data.rot' in .*yaml. Did you mean 'root'"),
        ("model.nam.x=1", "no key 'model.nam.x' in"),
    ],
)
def test_keys_that_the_runs_config_lacks_are_refused(tmp_path, argument, says):
    with pytest.raises(ValueError, match=says):
        evaluation_config(tmp_path, argument)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("data=ade20k", "recipe.epochs=1"), "not recipe.epochs=1 and recipe.steps=80000"),
        (("recipe.epochs=null",), "not recipe.epochs=null and recipe.steps=null"),
        (("recipe.epochs=0",), "recipe.epochs must be a whole number, 1 or more, or null, not 0"),
        (("data=ade20k", "recipe.steps=1.5"), "recipe.steps must be a whole number, 1 or more, or null, not 1.5"),
    ],
)
def test_a_recipe_has_epochs_or_steps_but_not_both(overrides, says):
    with pytest.raises(ValueError, match=says):
        check(composed(*overrides))


@pytest.mark.parametrize("group", ["model", "head", "data", "recipe", "trainer", "logger", "callbacks"])
def test_every_choice_composes_and_is_in_the_help(group):
    for path in sorted((CONF / group).glob("*.yaml")):
        assert composed(f"{group}={path.stem}")[group] is not None
        if not path.stem.startswith("default_"):
            assert path.stem in list_choices(group)


def test_every_size_of_every_model_is_registered():
    for path in (CONF / "model").glob("*.yaml"):
        cfg = composed(f"model={path.stem}")
        for size in cfg.model.get("sizes") or ():
            cfg.model.size = size
            assert timm.is_model(model_name(cfg.model, 224))
