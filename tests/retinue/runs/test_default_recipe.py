"""The default recipe follows from the data, the task, the model and the head, wherever their yaml files lie."""

import subprocess
import sys
from contextlib import contextmanager

import pytest
from hydra import compose
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from retinue.runs.config import register_resolvers
from retinue.utils.paths import CONF, PROJECT
from tests.retinue.runs.test_config import composed


@pytest.mark.parametrize(
    ("overrides", "recipe", "data", "task"),
    [
        ((), "small_data", "digits", "classification"),
        (("model=swin",), "small_data", "digits", "classification"),
        (("data=cifar10",), "small_data", "cifar10", "classification"),
        (("data=imagenet",), "biformer", "imagenet", "classification"),
        (("data=imagenet", "model=swin"), "swin", "imagenet", "classification"),
        (("data=webdataset", "model=timm"), "deit", "webdataset", "classification"),
        (("data=imagenet", "recipe=small_data"), "small_data", "imagenet", "classification"),
        (("task=detection",), "small_detection", "scenes", "detection"),
        (("task=segmentation", "head=semantic_fpn"), "small_segmentation", "scenes", "segmentation"),
        (("data=coco", "model=swin"), "coco_1x", "coco", "detection"),
        (("data=coco", "head=dino"), "dino_1x", "coco", "detection"),
        (("data=pidray", "head=sdanet"), "sdanet_1x", "pidray", "detection"),
        (("data=ade20k",), "ade20k_80k", "ade20k", "segmentation"),
        (("data=ade20k", "head=upernet"), "ade20k_160k", "ade20k", "segmentation"),
    ],
)
def test_the_recipe_goes_with_the_data(overrides, recipe, data, task):
    cfg = composed(*overrides)
    assert (cfg.data.name, cfg.task.name) == (data, task)
    assert cfg.recipe == composed(f"recipe={recipe}").recipe


# A user's own yaml files: data that inherits imagenet's file or says its kind itself, a model, a head, detection data.
FILES = {
    "data/inherits.yaml": "# @package _global_\ndefaults: [imagenet]\ndata: {name: mine, root: /data/mine}\n",
    "data/inherits_twice.yaml": "defaults: [inherits]\nflip: false\n",
    "data/own_kind.yaml": "# @package _global_\ndata: {name: mine, kind: imagenet, task: classification}\n",
    "data/own_coco.yaml": "# @package _global_\ndefaults: [coco, _self_]\ndata: {name: mine}\n",
    "data/small_photos.yaml": "# @package _global_\ndefaults: [imagenet]\ndata: {name: mine, kind: small}\n",
    "model/own.yaml": "defaults: [swin]\nrecipe: nat\n",
    "model/renamed.yaml": "defaults: [swin]\n",
    "head/own.yaml": "defaults: [mask_rcnn]\nrecipe: coco_3x\n",
    "head/renamed.yaml": "defaults: [dino]\n",
}


@pytest.fixture(scope="module")
def config_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conf")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def recipe_of(config_dir, *arguments):
    """Return the recipe that `python train.py --config-dir ...` composes."""
    command = [sys.executable, str(PROJECT / "train.py"), f"--config-dir={config_dir}", "--cfg=job", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=config_dir)
    return OmegaConf.create(done.stdout).recipe


@pytest.mark.parametrize(
    ("overrides", "recipe"),
    [
        (("data=inherits", "model=swin"), "swin"),
        (("data=inherits_twice", "model=cswin"), "cswin"),
        (("data=own_kind", "model=swin"), "swin"),
        (("data=small_photos", "model=swin"), "small_data"),
        (("data=imagenet", "model=own"), "nat"),
        (("data=inherits", "model=renamed"), "swin"),
        (("data=own_coco",), "coco_1x"),
        (("data=own_coco", "head=own"), "coco_3x"),
        (("data=coco", "head=renamed"), "dino_1x"),
        (("task=detection", "head=own"), "small_detection"),
    ],
)
def test_yaml_files_in_the_users_folder_choose_the_recipe(config_dir, overrides, recipe):
    with hydra_with(config_dir):
        cfg = compose("train", overrides=["run_dir=run", *overrides])
    assert cfg.recipe == composed(f"recipe={recipe}").recipe


def test_the_runs_of_a_sweep_have_the_recipe_of_their_own_data(config_dir):
    with hydra_with(config_dir):
        loader = GlobalHydra.instance().config_loader()
        sweep = loader.load_configuration("train", ["model=swin"], RunMode.MULTIRUN)
        run = loader.load_sweep_config(sweep, ["data=inherits", "model=swin", "run_dir=run"])
    assert run.recipe == composed("recipe=swin").recipe


@contextmanager
def hydra_with(config_dir):
    """Start Hydra as `--config-dir` does."""
    register_resolvers()
    search_path = create_automatic_config_search_path(None, None, str(CONF))
    search_path.prepend("command-line", f"file://{config_dir}", "schema")
    Hydra.create_main_hydra2("train", search_path)
    try:
        yield
    finally:
        GlobalHydra.instance().clear()


def test_the_command_line_finds_them_with_config_dir(config_dir):
    swin, dino = composed("recipe=swin").recipe, composed("recipe=dino_1x").recipe
    assert recipe_of(config_dir, "data=inherits", "model=swin") == swin
    assert recipe_of(config_dir, "data=own_coco", "head=renamed") == dino


def test_a_mistyped_key_beside_the_users_own_data_is_answered(config_dir):
    command = [sys.executable, str(PROJECT / "train.py"), f"--config-dir={config_dir}", "data=inherits", "seeed=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=config_dir)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no key 'seeed' in the config. Did you mean 'seed'?")
