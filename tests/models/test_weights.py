"""Tests of reading and loading weights; misfits and unsafe files are refused in one line."""

import argparse
import collections
import os
import pathlib
import pickle
import re
import zipfile
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from models import DenseBackbone
from models.reference import load_vector, official_state
from models.unpickling import read_weights
from models.weights import Loaded, load_weights

VECTORS = pathlib.Path(__file__).parent.parent / "vectors"
CLASSES = 3


def swin(**kwargs) -> Any:
    return timm.create_model("swin_nano", **{"num_classes": CLASSES, "depths": (1, 1), "heads": (1, 1)} | kwargs)


@pytest.fixture
def source():
    torch.manual_seed(1)
    return swin()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return swin()


def have_equal_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def error(call, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


class Config:
    """Node of a config in a checkpoint: a class that the test's process could import."""

    def __init__(self, **values):
        self.__dict__.update(values)

    def __setstate__(self, state):
        raise AssertionError("the file's code ran")


def checkpoint(net: nn.Module) -> dict:
    """Return weights beside the kinds of settings and random states that released checkpoints hold."""
    return {
        "model": collections.OrderedDict(net.state_dict()),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": np.float64(1e-3)}]},
        "args": argparse.Namespace(lr=1e-3, output=pathlib.PurePosixPath("out"), sizes={1, 2}),
        "config": Config(depth=3),
        "max_accuracy": np.float32(81.2),
        "rng": np.arange(4),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "shape": torch.Size([1, 2]),
        "epoch": 299,
    }


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_settings_beside_the_weights_are_read_without_executing_them(tmp_path, net, source, kind):
    path = tmp_path / "net.pth"
    torch.save(checkpoint(source), path, _use_new_zipfile_serialization=kind == "zip")
    done = load_weights(net, path)
    assert have_equal_weights(net, source)
    assert done == Loaded(list(net.state_dict()), [], [], [], []) and str(done) == f"{len(done.loaded)} weights loaded"
    content = read_weights(path)
    assert content["epoch"] == 299 and content["dtype"] == torch.bfloat16 and content["shape"] == (1, 2)
    assert type(content["args"]).__module__ == "models.unpickling" and not vars(content["args"])


def test_safetensors_files_and_state_dicts_load(tmp_path, net, source):
    save_file({key: value.contiguous() for key, value in source.state_dict().items()}, tmp_path / "net.bin")
    load_weights(net, str(tmp_path / "net.bin"))
    assert have_equal_weights(net, source)
    torch.manual_seed(2)
    third = swin()
    load_weights(net, third.state_dict())
    assert have_equal_weights(net, third)


class Call:
    """Object whose pickle calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Call(os.system, "touch {ran}"), "posix.system"),
        (Call(eval, "open('{ran}', 'w')"), "builtins.eval"),
        (Call(getattr, Call(os.system, "touch {ran}"), "x"), "posix.system"),
        (Call(torch.hub.load, "{ran}"), "torch.hub.load"),
        (Call(pathlib.Path.touch, pathlib.PurePosixPath("{ran}")), "builtins.getattr"),
    ],
)
def test_a_file_that_would_call_a_function_is_refused(tmp_path, net, call, name, kind):
    ran, path = tmp_path / "ran", tmp_path / "net.pth"

    def with_path(value):
        if isinstance(value, Call):
            function, args = value.call
            return Call(function, *(with_path(arg) for arg in args))
        return value.format(ran=ran) if isinstance(value, str) else value

    torch.save({"model": net.state_dict(), "x": with_path(call)}, path, _use_new_zipfile_serialization=kind == "zip")
    message = error(load_weights, net, path)
    assert message.startswith(f"{path} was refused") and f"it would call {name}" in message
    assert not ran.exists()


def test_the_error_says_what_a_file_is_that_is_no_weights_file(tmp_path, net, source):
    path = tmp_path / "net.pth"
    assert error(load_weights, net, path) == f"there is no weights file {path}"
    for content, kind in (
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>404</html>", "it is a web page, so the download failed"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "it is a Git LFS pointer"),
        (pickle.dumps({"a": 1}), "it is neither a safetensors nor a torch file"),
    ):
        path.write_bytes(content)
        assert kind in error(load_weights, net, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "x")
    assert "not a file of weights" in error(load_weights, net, path)
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), path)  # pyright: ignore[reportPrivateImportUsage]
    assert "not a file of weights" in error(load_weights, net, path)
    torch.save({"epoch": 3}, path)
    assert "holds no tensors by name" in error(load_weights, net, path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_is_refused(tmp_path, net, source, kind):
    path, before = tmp_path / "net.pth", {key: value.clone() for key, value in net.state_dict().items()}
    if kind == "safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    for share in (0.3, 0.9, 0.999):
        path.write_bytes(content[: int(share * len(content))])
        assert "is truncated or damaged; fetch it again" in error(load_weights, net, path)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict_ema": state, "state_dict": {key: value + 1 for key, value in state.items()}},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {"state_dict": {f"model._orig_mod.{key}": value for key, value in state.items()}},
        lambda state: {"state_dict": {"loss.weight": torch.ones(2)} | {f"model.{k}": v for k, v in state.items()}},
        lambda state: {"state_dict": {"neck.weight": torch.ones(2)} | {f"backbone.{k}": v for k, v in state.items()}},
    ],
    ids=["ema", "ddp", "lightning, compiled", "lightning", "detector"],
)
def test_prefixes_and_keys_of_wrappers_are_removed(net, source, wrap):
    done = load_weights(net, wrap(source.state_dict()))
    assert have_equal_weights(net, source)
    assert done.dropped in ([], ["loss.weight"], ["neck.weight"])


def test_weights_that_do_not_fit_are_listed(net, source):
    state = source.state_dict()
    state["stages.0.blocks.0.extra"] = torch.ones(1)
    del state["norm.weight"]
    state["norm.bias"] = torch.ones(5)
    message = error(load_weights, net, state)
    assert message == (
        "the state dict does not fit Swin: 1 missing (norm.weight), 1 unexpected (stages.0.blocks.0.extra), "
        "1 of another shape (norm.bias 5 for 64); check the model's name, size and arguments"
    )
    before = net.norm.bias.clone()
    done = load_weights(net, state, strict=False)
    assert done.missing == ["norm.weight", "norm.bias"] and done.unexpected == ["stages.0.blocks.0.extra"]
    assert str(done) == f"{len(done.loaded)} weights loaded, 2 missing, 1 unexpected"
    assert torch.equal(net.norm.bias, before)
    assert torch.equal(net.stages[0].blocks[0].mlp.fc1.weight, state["stages.0.blocks.0.mlp.fc1.weight"])


def test_long_lists_are_shortened_and_another_model_is_reported(net):
    message = error(load_weights, net, timm.create_model("resnet18").state_dict())
    assert ", ...)" in message and message.endswith("these are weights of another model") and len(message) < 400
    assert "another model" in error(load_weights, net, timm.create_model("resnet18").state_dict(), strict=False)


def test_another_classifier_is_dropped_only_when_asked(net):
    state = swin(num_classes=7).state_dict()
    message = error(load_weights, net, state)
    assert "2 of another shape (head.weight 7x64 for 3x64, head.bias 7 for 3)" in message
    assert message.endswith("they have another classifier: leave it out with drop_classifier=True")
    before = net.head.weight.clone()
    done = load_weights(net, state, drop_classifier=True)
    assert done.dropped == ["head.weight", "head.bias"] == done.missing and torch.equal(net.head.weight, before)
    state = swin(num_classes=0).state_dict()
    assert "drop_classifier=True" in error(load_weights, net, state)
    assert load_weights(net, state, drop_classifier=True).missing == ["head.weight", "head.bias"]
    # A classifier that fits is loaded.
    assert not load_weights(net, swin().state_dict(), drop_classifier=True).dropped


def test_bias_tables_are_interpolated_for_another_window():
    small, large = swin(window=3), swin(window=7)
    table = large.stages[0].blocks[0].mixer.relative_position_bias_table
    # A table that rises from left to right.
    with torch.no_grad():
        small.stages[0].blocks[0].mixer.relative_position_bias_table[:, 0] = torch.arange(-2.0, 3).repeat(5)
    done = load_weights(large, small.state_dict())
    assert done.resized == [f"stages.{i}.blocks.0.mixer.relative_position_bias_table" for i in (0, 1)]
    rows = table.detach().view(13, 13)
    assert torch.allclose(rows, rows[:1].expand(13, 13), atol=1e-4) and (rows[0].diff() > 0).all()
    assert rows[0, 6].abs() < 1e-4 and abs(rows[0, -1] - 2) < 0.2


def test_released_swin_weights_load_despite_buffers_and_another_window():
    state = official_state(load_vector(VECTORS / "swin__swin_tiny.json.gz"))
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    net: Any = timm.create_model("swin_tiny", window=12)
    done = load_weights(net, {"model": state})
    assert len(done.resized) == 12 and not done.missing and not done.unexpected
    assert torch.equal(net.stages[1].downsample.reduction.weight, state["layers.0.downsample.reduction.weight"])


def test_timms_filter_renames_the_weights_of_timms_nets():
    vector = load_vector(VECTORS / "swin__swin_tiny.json.gz")
    state = official_state(vector)
    net: Any = timm.create_model("swin_tiny_patch4_window7_224")
    load_weights(net, {"model": state})
    assert torch.equal(net.layers[1].downsample.reduction.weight, state["layers.0.downsample.reduction.weight"])


def test_position_embeddings_are_interpolated():
    net: Any = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64)
    state = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).state_dict()
    done = load_weights(net, state)
    assert done.resized == ["pos_embed"] and torch.equal(net.blocks[0].mlp.fc1.weight, state["blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize(
    ("vector", "net", "img_size", "heads"),
    [
        ("maxvit__maxvit_tiny_tf_224", "maxvit_tiny_tf_224", 256, 0),
        ("gcvit__gc_vit_xxtiny", "gcvit_xxtiny", 256, 1),
        ("efficientvit__m0", "efficientvit_m0", 512, 0),
        ("crossvit__9_224", "crossvit_9_240", 120, 2),
    ],
)
def test_tables_of_timms_nets_are_interpolated(vector, net, img_size, heads):
    state = official_state(load_vector(VECTORS / f"{vector}.json.gz"))
    # The table of each head holds the head's number.
    for key, table in state.items():
        if re.search(r"bias_table|attention_biases|pos_embed", key):
            table.movedim(heads, -1)[:] = torch.arange(table.shape[heads])
    net = timm.create_model(net, img_size=img_size)
    done = load_weights(net, state)
    assert done.resized
    for key in done.resized:
        table = net.state_dict()[key].movedim(heads, -1)
        assert torch.allclose(table, torch.arange(table.shape[-1]).float(), atol=1e-3)


def test_cached_biases_are_recomputed_from_loaded_weights():
    net, x = timm.create_model("efficientvit_m0").eval(), torch.randn(1, 3, 224, 224)
    state = official_state(load_vector(VECTORS / "efficientvit__m0.json.gz"))
    before = net(x)
    load_weights(net, state)
    after = net(x)
    assert not torch.allclose(after, before) and torch.equal(after, net.train().eval()(x))


def test_a_classifiers_weights_load_into_a_backbone_for_larger_images():
    net = DenseBackbone("efficientvit_m0", img_size=512)
    done = load_weights(net, official_state(load_vector(VECTORS / "efficientvit__m0.json.gz")))
    assert len(done.resized) == 3 and not done.missing and all(key.startswith("net.head.") for key in done.dropped)


def test_checkpoints_need_no_counters_of_batch_norms(source):
    net = timm.create_model("resnet18", num_classes=2)
    state = {key: value for key, value in net.state_dict().items() if "num_batches_tracked" not in key}
    assert not load_weights(net, state).missing


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "crossvit_9_240"])
@pytest.mark.parametrize("channels", [1, 2, 7])
def test_weights_for_three_colours_load_into_timms_nets_for_any_number_of_bands(name, channels):
    net: Any = timm.create_model(name, num_classes=3, in_chans=channels)
    colours: Any = timm.create_model(name, num_classes=3)
    layers = net.pretrained_cfg["first_conv"]
    layers = [layers] if isinstance(layers, str) else list(layers)
    assert load_weights(net, colours.state_dict()).resized == [f"{layer}.weight" for layer in layers]
    for layer in layers:
        weight, original = net.get_submodule(layer).weight, colours.get_submodule(layer).weight
        # An image of equal bands gives the sums of a grey image, but for bands beyond the last whole set of three.
        repeated = torch.cat([original] * 3, dim=1)[:, :channels] * 3 / channels
        expected = original.sum(1, keepdim=True) if channels == 1 else repeated
        assert torch.allclose(weight, expected)
