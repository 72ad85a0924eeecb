"""The supernet of ViT-ResNAS is every net of its space at once."""

import random
from typing import Any

import pytest
import timm
import torch
from torch import nn
from yaml import safe_load

from models.backbones.vit_resnas import LAYOUTS
from models.complexity import complexity
from models.supernets.vit_resnas import Widths, draw_evenly
from models.supernets.vit_resnas_space import (
    Cost,
    Genes,
    expressed,
    from_json,
    largest,
    layouts,
    read_space,
    smallest,
    subnet_state,
    to_json,
)
from retinue.utils.paths import CONF
from retinue.utils.sizes import resolve

SPACE = (
    {"dims": [24, 16], "head_dim": 8, "heads": [3, 1], "hidden": [40, 24], "removable": [False, True]},
    {"dims": [40, 32], "head_dim": 8, "heads": [4, 3], "hidden": [48, 16], "removable": [True, False, True]},
)


def supernet(img_size=56, **kwargs) -> Any:
    """Return a supernet with weights and statistics that are not those of the start."""
    torch.manual_seed(0)
    net: Any = timm.create_model("vit_resnas_supernet", space=SPACE, num_classes=5, img_size=img_size, stem=4, **kwargs)
    for parameter in net.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net.eval()


def draw(space, seed):
    rng = random.Random(seed)
    return tuple(
        Genes(
            rng.choice(stage.dims),
            tuple(rng.choice(stage.heads) for _ in stage.removable),
            tuple(rng.choice(stage.hidden) for _ in stage.removable),
            tuple(not may_go or rng.random() < 0.5 for may_go in stage.removable),
        )
        for stage in space
    )


def architectures(space):
    return [largest(space), smallest(space), *(draw(space, seed) for seed in range(4))]


def standalone(net, architecture, img_size=56, **kwargs):
    """Return the architecture's own net, with the weights that it has in the supernet."""
    arguments: Any = {"layouts": layouts(net.space, architecture), "num_classes": 5, "img_size": img_size, "stem": 4}
    alone = timm.create_model("vit_resnas_nano", **arguments | kwargs)
    alone.load_state_dict(subnet_state(net.state_dict(), net.space, architecture))
    return alone.eval()


@torch.no_grad()
def test_an_architecture_computes_what_its_own_net_computes():
    net, x = supernet(), torch.randn(3, 3, 56, 50)
    for architecture in architectures(net.space):
        expected = standalone(net, architecture)(x)
        torch.testing.assert_close(net.forward_as(x, architecture), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net(x), standalone(net, largest(net.space))(x), rtol=0, atol=0)


def test_a_batch_of_several_architectures_gives_the_gradients_of_their_own_nets():
    net, x = supernet(images_per_architecture=2), torch.randn(4, 3, 56, 56)
    stages = list(zip(*(draw(net.space, seed) for seed in (1, 2)), strict=True))
    widths = [Widths(*(torch.tensor([genes[i] for genes in stage]).long() for i in range(4))) for stage in stages]
    net.forward_head(net.forward_widths(x, widths)).square().sum().backward()
    wanted = {name: torch.zeros_like(value) for name, value in net.named_parameters()}
    for i, seed in enumerate((1, 2)):
        # Differentiate with respect to the supernet's own weights, of which the net's are slices.
        leaves = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
        architecture = draw(net.space, seed)
        slices = subnet_state({**net.state_dict(), **leaves}, net.space, architecture)
        torch.func.functional_call(standalone(net, architecture), slices, (x[i::2],)).square().sum().backward()
        for name in wanted:
            if leaves[name].grad is not None:
                wanted[name] += leaves[name].grad
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-4, msg=name)


def test_every_parameter_gets_a_gradient_in_training():
    net = supernet(images_per_architecture=2, drop_path_rate=0.1).train()
    torch.manual_seed(0)
    net(torch.randn(16, 3, 56, 56)).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(("img_size", "stem"), [(56, 4), (50, 0), ((90, 56), 4)])
def test_the_macs_are_those_of_the_counter(img_size, stem):
    space = read_space(SPACE)
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    cost = Cost(size, 3, 5, stem, 1)
    for architecture in (largest(space), draw(space, 0)):
        arguments: Any = {"layouts": layouts(space, architecture), "num_classes": 5, "img_size": img_size, "stem": stem}
        counted = complexity(lambda arguments=arguments: timm.create_model("vit_resnas_nano", **arguments), img_size)[1]
        assert cost.macs(space, architecture) == counted


def test_sorting_keeps_the_largest_net_and_puts_large_weights_first():
    net, x = supernet(), torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        before = net(x)
        for parameter, dim, order in list(net.importance_orders()):
            parameter.copy_(parameter.index_select(dim, order))
        torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-4)
    fc1, fc2 = net.stages[0].blocks[0].mlp.fc1, net.stages[0].blocks[0].mlp.fc2
    sizes = fc1.weight.abs().sum(1) + fc1.bias.abs() + fc2.weight.abs().sum(0)
    assert (sizes.diff() <= 0).all()
    assert all((order == torch.arange(len(order))).all() for _, _, order in net.importance_orders())


def test_choices_are_drawn_evenly_and_from_the_allowed_ones_alone():
    torch.manual_seed(0)
    assert sorted(draw_evenly((5, 4, 3, 2), 8, 1.0).tolist()) == [2, 2, 3, 3, 4, 4, 5, 5]
    assert len(set(draw_evenly((5, 4, 3, 2), 3, 1.0).tolist())) == 3
    assert set(draw_evenly((5, 4, 3, 2), 8, 0.0).tolist()) == {5}
    assert set(draw_evenly((5, 4, 3, 2), 8, 0.4).tolist()) == {5, 4}


def test_the_papers_nets_are_in_the_papers_spaces():
    config = safe_load((CONF / "model/vit_resnas_supernet.yaml").read_text())
    for size, nets in (("tiny", ("tiny",)), ("small", ("small", "medium"))):
        space = read_space(resolve(config | {"size": size}, 224)[1]["space"])
        for net in nets:
            for stage, layout in zip(space, LAYOUTS[net], strict=True):
                assert layout.dim in stage.dims and layout.head_dim == stage.head_dim
                assert set(layout.heads) <= set(stage.heads) and set(layout.hidden) <= set(stage.hidden)
                kept = len(stage.removable) - sum(stage.removable)
                assert kept <= len(layout.heads) <= len(stage.removable)


def test_json_keeps_an_architecture_and_blocks_that_are_left_out_do_not_count():
    space = read_space(SPACE)
    architecture = smallest(space)
    assert from_json(to_json(architecture)) == architecture
    other = (architecture[0]._replace(heads=(1, 3)), architecture[1])
    assert other != architecture and expressed(other) == expressed(architecture)
    assert expressed(largest(space)) == largest(space)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": [20]}, r"stage 2 must have at least the 24 channels .* not 20"),
        ({"heads": []}, "stage 2 needs at least one choice"),
        ({"depth": 3}, "stage 2 must have the keys dims, head_dim, heads, hidden, removable, not .*depth"),
    ],
)
def test_a_wrong_space_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        read_space([SPACE[0], SPACE[1] | change])
