"""Compiled nets: which blocks share their code, that the values stay, and when compiling pays."""

import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounter

import models  # noqa: F401  (registers our nets)
from retinue.tasks import compilation
from retinue.tasks.compilation import TensorDropPath, alike_blocks, by_block, compile_net, seconds_gained


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("swin_tiny", [2, 2, 6, 2]),
        ("biformer_small", [4, 4, 18, 4]),
        ("deit_tiny", [12]),
        ("vit_tiny_patch16_224", [12]),
        ("resnet50", [2, 3, 5, 2]),
    ],
)
def test_blocks_are_alike_within_a_stage(name, blocks):
    with torch.device("meta"):
        net = timm.create_model(name)
    assert [len(kind) for kind in alike_blocks(net)] == blocks
    assert by_block(net) == alike_blocks(net)


def test_few_blocks_are_compiled_as_a_whole():
    with torch.device("meta"):
        assert by_block(timm.create_model("swin_nano")) == []


def test_like_blocks_share_their_code_and_the_names_stay(monkeypatch):
    """Without a shared drop path, each of the twelve blocks would be compiled."""
    torch.compiler.reset()
    counter = CompileCounter()
    monkeypatch.setattr(compilation, "BACKEND", counter)
    torch.manual_seed(0)
    net = timm.create_model("deit_tiny", dim=32, heads=2, img_size=32, drop_path_rate=0.1)
    x, names = torch.randn(2, 3, 32, 32), list(net.state_dict())
    expected = net.eval()(x)
    compile_net(net)
    assert torch.allclose(net(x), expected, atol=1e-6)
    net.train()(x).sum().backward()
    assert counter.frame_count == 2, "one graph for evaluation, one for training"
    assert list(net.state_dict()) == names
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_drop_path_by_tensor_drops_and_scales():
    torch.manual_seed(0)
    x = torch.rand(20000, 1, 2) + 1
    path = TensorDropPath(0.3)
    out = path(x)
    dropped = (out == 0).all((1, 2))
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.allclose(out[~dropped], x[~dropped] / 0.7)
    assert path.eval()(x) is x
    assert path.to(torch.float64).keep.dtype == torch.float64


def test_inductor_computes_the_same_values_and_gradients():
    torch.compiler.reset()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    x = torch.randn(3, 8)
    expected = net(x)
    expected_grads = torch.autograd.grad(expected.square().sum(), list(net.parameters()))
    compile_net(net, cuda_graphs=True)
    out = net(x)
    grads = torch.autograd.grad(out.square().sum(), list(net.parameters()))
    for actual, reference in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert torch.allclose(actual, reference, atol=1e-5)


def test_long_runs_gain_by_compiling():
    with torch.device("meta"):
        deep, wide = timm.create_model("biformer_small"), timm.create_model("swin_nano")
    for net, enough in ((deep, 3000), (wide, 20001)):
        cost, gain = seconds_gained(net, enough)
        assert gain > cost > 10
        assert seconds_gained(net, enough // 2)[1] < cost
