"""Tests of frozen parts of nets."""

import copy
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from retinue.tasks.freezing import NORMS, freeze, keep_in_evaluation, parts_of
from tests.models.openmmlab import CLASSES, build
from tests.models.openmmlab.test_build import losses

# Numbers of stages and blocks of nets of ours and of timm's; plain nets have no stages.
NETS = {
    "swin_nano": (4, 8), "biformer_nano": (4, 5), "deit_tiny": (0, 12), "resnet10t": (4, 4), "convnext_atto": (4, 12),
    "vit_tiny_patch16_224": (0, 12), "swin_tiny_patch4_window7_224": (4, 12),
}  # fmt: skip


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", NETS)
def test_each_parameter_is_the_stems_a_blocks_or_comes_after_the_blocks(name):
    with torch.device("meta"):
        parts = parts_of(timm.create_model(name))
    stages, blocks = ([part for part in parts if part.startswith(kind)] for kind in ("stage", "block"))
    assert (len(stages), len(blocks)) == NETS[name]
    for level in filter(None, (stages, blocks)):
        levels = [parts["stem"], *(parts[part] for part in level)]
        members = set().union(*levels)
        assert sum(map(len, levels)) == len(members), "no parameter belongs to two parts"
        assert all("norm" in parameter for parameter in parts["backbone"] - members)


def test_a_linear_probe_trains_the_classifier_alone():
    for name, classifier in (("swin_nano", "head"), ("resnet10t", "fc"), ("convnext_atto", "head.fc")):
        net = timm.create_model(name, num_classes=3, drop_path_rate=0.5)
        freeze(net, ["backbone"])
        net.train()
        assert trained(net) == {f"{classifier}.weight", f"{classifier}.bias"}
        x = torch.randn(2, 3, 64, 64)
        # Batch norm, dropout and drop path compute as in evaluation.
        assert torch.equal(net(x), net.eval()(x))


@pytest.mark.parametrize("recompute", [False, True])
def test_steps_leave_frozen_parts_and_their_statistics_as_they_are(recompute):
    torch.manual_seed(0)
    net: Any = timm.create_model("resnet10t", num_classes=3)
    if recompute:
        net.set_grad_checkpointing()
    freeze(net, ["stem", "stage1-2"])
    # An average of the weights is a copy.
    net = copy.deepcopy(net).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = create_optimizer_v2(net, opt="adamw", lr=0.1, weight_decay=0.5, layer_decay=0.7)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
    for name, value in net.state_dict().items():
        frozen = name.startswith(("conv1", "bn1", "layer1", "layer2"))
        assert torch.equal(value, before[name]) == frozen, name


def test_frozen_norms_keep_weights_and_statistics_and_the_other_layers_learn():
    net = timm.create_model("resnet10t", num_classes=3)
    names = freeze(net, ["norms"])
    # Lightning replaces batch norms after the net is built.
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    keep_in_evaluation(net, names)
    net.train()
    norms = [module for module in net.modules() if isinstance(module, NORMS)]
    assert norms and not any(norm.training or norm.weight.requires_grad for norm in norms)
    assert trained(net) == {name for name, parameter in net.named_parameters() if parameter.ndim > 1 or "fc" in name}


def test_under_a_head_the_net_is_frozen_and_the_norms_of_its_maps_are_not():
    model = build("fpn_lite")
    freeze(model, ["backbone"])
    torch.stack([*losses(model).values()]).sum().backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned == trained(model) == {name for name in model.state_dict() if learns(name)}


def learns(name: str) -> bool:
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return not name.startswith("backbone.net") and not name.endswith(statistics)


def test_an_unknown_part_is_refused_with_the_nearest():
    net = timm.create_model("swin_nano", num_classes=CLASSES)
    with pytest.raises(ValueError, match=r"Swin has no part 'stage5'\. Did you mean 'stage\d'\? There are: backbone,"):
        freeze(net, ["stage3-5"])
    with pytest.raises(ValueError, match=r"the range 'block3-1' is empty; did you mean 'block1-3'"):
        freeze(net, ["block3-1"])
