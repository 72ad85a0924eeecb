"""Tests of nets that are created from `conf/model`."""

from typing import Any

import pytest
import timm
import torch
from omegaconf import OmegaConf

from models import create_model, model_name
from models.factory import build
from retinue.utils.paths import CONF
from retinue.utils.sizes import pick_size, resolve, size_pixels

MODEL_CONF = CONF / "model"


def config(group: str, **values) -> Any:
    return OmegaConf.merge(OmegaConf.load(MODEL_CONF / f"{group}.yaml"), values)


@pytest.mark.parametrize("name", ["biformer", "swin"])
def test_small_images_choose_the_smallest_size(name):
    sizes = config(name).sizes
    assert [pick_size(sizes, None, pixels)["name"] for pixels in (28, 64)] == [f"{name}_nano"] * 2
    assert [pick_size(sizes, None, pixels)["name"] for pixels in (65, 224)] == [f"{name}_tiny"] * 2
    assert (
        model_name(config(name), (32, 96)) == f"{name}_tiny"
        and model_name(config(name, size="base"), 32) == f"{name}_base"
    )


def test_arguments_come_from_the_size_and_from_the_command_line():
    net: Any = create_model(config("biformer"), num_classes=4, in_chans=1, img_size=32)
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 4)
    assert net.stages[-1].blocks[-1].drop_path.drop_prob == pytest.approx(0.05)
    net = create_model(
        config("swin", mixers=["full", "window", "full", "full"], args={"drop_path_rate": 0.0}), 4, 3, (32, 48)
    )
    assert type(net.stages[0].blocks[0].mixer).__name__ == "FullAttention"
    assert net.stages[-1].blocks[-1].drop_path.drop_prob == 0


@pytest.mark.parametrize("others", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["first", "others"])
@pytest.mark.parametrize("path", sorted(MODEL_CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_size_can_be_built_and_every_model_has_a_recipe(path, others):
    cfg: Any = OmegaConf.load(path)
    assert (CONF / f"recipe/{cfg.recipe}.yaml").exists()
    sizes = list(cfg.get("sizes") or {})
    for size in sizes[1:] if others else sizes[:1]:
        for under_head in (False, True):
            name, args = resolve(config(path.stem, size=size), 224, under_head)
            with torch.device("meta"):
                net: Any = build(name, num_classes=10, **args)
            assert net.num_classes == 10


def test_small_data_sets_choose_the_smallest_size_under_a_head():
    scenes = {"task": "detection", "kind": "small", "image_size": [256, 320]}
    assert model_name(config("swin"), size_pixels(scenes)) == "swin_nano"
    assert resolve(config("swin"), size_pixels(scenes), under_head=True)[1]["patch"] == 4
    assert "patch" not in resolve(config("swin"), size_pixels(scenes))[1]
    for data in (scenes | {"kind": "coco"}, scenes | {"task": "classification"}):
        assert size_pixels(data) == 320 and model_name(config("swin"), size_pixels(data)) == "swin_tiny"


def test_timms_nets_are_built_for_the_image_size():
    assert create_model(config("timm", name="resnet18"), 4, 1, 40)(torch.randn(1, 1, 40, 40)).shape == (1, 4)
    net: Any = create_model(config("timm", name="vit_tiny_patch16_224", args={"depth": 1}), 4, 3, 48)
    assert net.patch_embed.img_size == (48, 48) and net(torch.randn(1, 3, 48, 48)).shape == (1, 4)


@pytest.mark.parametrize(
    ("cfg", "size", "message"),
    [
        (
            config("biformer", size="tinny"),
            32,
            r"model.size 'tinny' is unknown. Did you mean 'tiny'\? There are: nano",
        ),
        (config("timm"), 32, "model.name must be the name of a net"),
        (config("timm", name="resnet_50"), 32, r"no net is called 'resnet_50'. Did you mean 'resnet50'\?"),
        (config("timm", name="resnet18", args={"mixers": "full"}), 32, "resnet18 takes no argument 'mixers'"),
        (config("biformer", args={"n_wins": 4}), 32, "biformer_nano takes no argument 'n_wins'. Did you mean 'n_win'"),
        (config("swin", mixers="agnt"), 32, "no op is called 'agnt'"),
        (config("timm", name="test_vit"), 225, "test_vit takes no images of 225 x 225 pixels; .* takes: 224, 240"),
    ],
)
def test_wrong_values_are_named_in_one_line(cfg, size, message):
    with pytest.raises(ValueError, match=message) as caught:
        create_model(cfg, 4, 3, size)
    assert "\n" not in str(caught.value)


def test_a_plain_mapping_is_a_model_config_too():
    assert create_model({"name": "resnet18"}, 2, 3, 32).num_classes == 2
    assert timm.is_model("biformer_nano")
