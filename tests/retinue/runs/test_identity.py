"""A run's folder changes with what changes its result, and with nothing else."""

import copy
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf, open_dict

from retinue.results.collection import find_runs, group_runs
from retinue.runs.identity import fingerprint, identity, run_folder
from tests.retinue.runs.test_config import composed

IMAGENET = ("data=imagenet", "data.root=/data/in1k", "model=swin")


@pytest.mark.parametrize(
    "override",
    [
        "recipe.epochs=21", "model.size=tiny", "data.image_size=28", "trainer.precision=bf16", "model.mixers=window",
        "data=image_folder", "+model.args.drop_path_rate=0.3", "weights=start.pth", "recipe.clip_grad=5.0",
        "recipe.ema.decay=null", "task.distillation.teacher=resnet50", "recipe.augment.device=gpu",
        "recipe.augment.decode=reduced", "data.sampler=repeat_factor", "recipe.freeze=[stem]", "model.reduction=tome",
        "recipe.val_every=2", "recipe.average_best=3", "recipe.augment.sizes=[8,16]",
        "recipe.optimizer.lr_scaling=sqrt",
        "data.sampler=balanced", "recipe.class_weights=balanced", "task.margin_loss=0.5",
    ],
)  # fmt: skip
def test_the_folder_changes_with_what_changes_the_result(override):
    assert run_folder(composed(override)) != run_folder(composed())
    assert fingerprint(composed(override)) != fingerprint(composed())


@pytest.mark.parametrize(
    "override",
    [
        "data.num_workers=3", "logger=none", "trainer=cpu", "trainer.devices=2", "rerun=true",
        "checkpoint.every_steps=7", "task.distillation.alpha=0.7", "drop_classifier=true", "model.size=nano",
        "data.repeat_threshold=0.5", "recipe.freeze=null", "model.reduction=null",
        "checkpoint.top_k=3", "task.log_grad_norm=true", "recipe.val_every=null", "recipe.augment.sizes=null",
        "recipe.class_weights=null", "classifier_map=imagenet22k", "task.margin_loss=null",
    ],
)  # fmt: skip
def test_the_folder_stays_with_what_does_not(override):
    assert run_folder(composed(override)) == run_folder(composed())


def test_a_detectors_augmentation_of_tests_counts_only_if_it_is_on():
    cfg = composed("task=detection")
    before = copy.deepcopy(cfg)
    with open_dict(before):
        del before.task.test, before.data.sampler, before.data.repeat_threshold
    off = composed("task=detection", "task.test.nms_iou=0.6")
    assert run_folder(cfg) == run_folder(before) == run_folder(off)
    for override in ("task.test.flip=true", "task.test.scales=[0.8,1.0]"):
        assert run_folder(composed("task=detection", override)) != run_folder(cfg)


def test_the_folder_names_task_data_model_and_seed():
    folder = run_folder(composed("model=swin", "model.size=nano", "seed=3"))
    assert folder.startswith("classification/digits/swin_nano/") and folder.endswith("-s3")
    assert run_folder(composed("model=swin", "model.size=nano", "seed=4")) == folder[:-1] + "4"
    assert not set(run_folder(composed("model=timm", "model.name='hf-hub:a/b=c,d'"))) & set("=,: ")


def changed(cfg: DictConfig, **values: Any) -> DictConfig:
    """Return a copy of the config with values at dotted names, written with two underscores."""
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        for name, value in values.items():
            OmegaConf.update(cfg, name.replace("__", "."), value, force_add=True)
    return cfg


@pytest.mark.parametrize(
    ("overrides", "values"),
    [
        (IMAGENET, {"model__sizes__huge": {"name": "swin_base", "depths": [2, 2, 30, 2]}}),
        (IMAGENET, {"model__sizes__base__drop_path_rate": 0.6}),
        (IMAGENET, {"model__sizes__tiny__images_up_to": 512}),
        (IMAGENET, {"model__sizes__tiny__dense": {"patch": 2}}),
        (IMAGENET, {"model__recipe": "deit"}),
        (IMAGENET, {"data___target_": "data_sets.imagenet.ImageNet", "task___target_": "elsewhere.Classification"}),
        (IMAGENET, {"task__distillation__layers": 3, "recipe__ema__every": 10}),
        (IMAGENET, {"recipe__optimizer__nesterov": None, "data__limit": None, "model__norm": None}),
        (("task=detection",), {"head__sizes__large": {"neck": {"out_channels": 512}}, "head__recipe": "coco_3x"}),
        (("callbacks=early_stopping",), {"callbacks__early_stopping___target_": "lightning.EarlyStopping"}),
    ],
)
def test_the_folder_stays_when_something_is_added_that_was_not_chosen(overrides, values):
    cfg = composed(*overrides)
    assert run_folder(changed(cfg, **values)) == run_folder(cfg)
    assert fingerprint(changed(cfg, **values)) == fingerprint(cfg)


@pytest.mark.parametrize(
    ("overrides", "values"),
    [
        (IMAGENET, {"model__sizes__tiny__drop_path_rate": 0.6}),
        (IMAGENET, {"model__sizes__tiny__window": 14}),
        (IMAGENET, {"recipe__optimizer__nesterov": True}),
        ((*IMAGENET, "task.distillation.teacher=resnet50"), {"task__distillation__layers": 3}),
        ((*IMAGENET, "recipe.ema.decay=0.9"), {"recipe__ema__warmup": True}),
        (("task=detection",), {"head__sizes__small__neck__out_channels": 32}),
        (("task=detection",), {"head__args__rpn_head": {"norm_cfg": None}}),
        (("task=detection",), {"model__sizes__nano__dense": {"stem_stride": 2}}),
        (("callbacks=early_stopping",), {"callbacks__early_stopping__patience": 3}),
    ],
)
def test_the_folder_changes_with_the_chosen_entry_and_section(overrides, values):
    cfg = composed(*overrides)
    assert run_folder(changed(cfg, **values)) != run_folder(cfg)


def test_an_argument_of_the_net_is_the_same_wherever_it_is_given():
    explicit = identity(composed(*IMAGENET, "+model.args.drop_path_rate=0.2"))
    assert explicit == identity(composed(*IMAGENET)) == identity(composed(*IMAGENET, "model.size=tiny"))
    assert explicit["model"] == {"name": "swin_tiny", "drop_path_rate": 0.2}


def save(cfg: DictConfig, folder) -> None:
    folder.mkdir(parents=True)
    OmegaConf.save(
        OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]), folder / "config.yaml", True
    )


def test_saved_configs_are_grouped_by_the_same_rule(tmp_path):
    cfg = composed(*IMAGENET)
    menu = {"model__sizes__huge": {"name": "swin_base"}, "task__distillation__layers": 3}
    save(cfg, tmp_path / "a-s0")
    save(changed(cfg, seed=1, **menu), tmp_path / "b-s1")
    save(changed(cfg, seed=1, model__sizes__tiny__drop_path_rate=0.3), tmp_path / "c-s1")
    runs = find_runs(tmp_path)
    assert [len(members.runs) for members in group_runs(runs)] == [2, 1]
    assert runs[0].values["model"] == "swin_tiny" and runs[0].values["data.num_workers"] is None


def test_a_config_that_names_no_net_of_today_can_still_be_read(tmp_path):
    """Earlier versions had neither a kind of data nor these sizes."""
    for seed, size in ((0, "gone"), (1, "gone"), (2, "tiny")):
        folder = tmp_path / f"{seed}"
        folder.mkdir()
        config = {"model": {"size": size, "sizes": {"tiny": {"name": "swin_tiny"}}}, "data": {"name": "digits"},
                  "task": {"name": "classification", "_target_": "x"}, "seed": seed}  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert [len(members.runs) for members in group_runs(find_runs(tmp_path))] == [2, 1]
