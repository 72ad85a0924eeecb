"""Gates in nets of all layouts: maps, channels-last maps and tokens; places, weights, features, copies."""

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import nn

from models import DenseBackbone, load_weights
from models.factory import build
from ops import gate_registry, list_gates
from retinue.results.compare_ops import choices_of

# Name of a net -> arguments, and the (height, width) of images that it is run with
NETS = {
    "test_resnet": ({}, (50, 70)),
    "mobilenetv2_035": ({}, (50, 70)),
    "swin_tiny_patch4_window7_224": (
        {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "img_size": (56, 84), "drop_path_rate": 0},
        (56, 84),
    ),
    "test_vit": ({"img_size": (48, 64)}, (48, 64)),
    "swin_nano": ({"depths": (1, 1, 2, 1), "dim": 16}, (45, 70)),
    "deit_tiny": ({"depths": (2,), "dim": 32, "heads": 2}, (45, 70)),
}


class Same(nn.Module):
    """Gate that changes nothing."""

    def __init__(self, dim: int):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        assert x.shape[1] == len(self.unused)
        return x


class Zero(Same):
    """Gate that leaves nothing of a map, whose place is seen by what is left."""

    def forward(self, x):
        return x * 0 * self.unused.view(-1, 1, 1)


@pytest.fixture
def own_gates(monkeypatch):
    monkeypatch.setitem(gate_registry._GATES, "same", Same)
    monkeypatch.setitem(gate_registry._GATES, "zero", Zero)


def make(name: str, **arguments) -> Any:
    torch.manual_seed(0)
    return build(name, num_classes=3, **{**NETS[name][0], **arguments})


def images(name: str, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, *NETS[name][1], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NETS)
def test_weights_of_the_net_load_and_a_gate_that_changes_nothing_changes_nothing(name, own_gates):
    """At every place, the net without gates and the net with them compute the same with the weights of the former."""
    plain, x = make(name).eval(), images(name)
    expected = plain(x)
    for at in gate_registry.PLACES:
        net = make(name, gates={"name": "same", "at": at}).eval()
        report = load_weights(net, plain.state_dict())
        assert set(report.loaded) == set(net.state_dict()) - set(report.missing)
        assert report.missing and all(key.endswith("unused") for key in report.missing)
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
        copied = copy.deepcopy(net)
        assert not load_weights(copied, net.state_dict()).missing
        torch.testing.assert_close(pickle.loads(pickle.dumps(copied))(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", ["ela", {"name": "medusa", "width": 4}], ids=["ela", "medusa"])
@pytest.mark.parametrize("name", NETS)
def test_every_parameter_has_a_gradient(name, gate):
    net = make(name, gates=gate)
    # Batch norm in training needs more than one value of a channel.
    net(images(name, 2)).square().sum().backward()
    assert not [key for key, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    if hasattr(net, "set_grad_checkpointing"):
        grads = {key: p.grad.clone() for key, p in net.named_parameters()}
        net.zero_grad()
        net.set_grad_checkpointing()
        net(images(name, 2)).square().sum().backward()
        for key, p in net.named_parameters():
            torch.testing.assert_close(p.grad, grads[key], rtol=1e-3, atol=1e-4)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert net.eval()(images(name)).isfinite().all()


@pytest.mark.parametrize("name", NETS)
def test_places(name, own_gates):
    """A block without its branch returns its input; a zero at the last stage leaves zeros, but no extra tokens."""
    net, x = make(name, gates={"name": "zero", "at": "branch"}).eval(), images(name)
    seen = []
    for module in net.modules():
        if isinstance(getattr(module, "output_gate", None), Zero):
            module.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    net(x)
    same = [(taken, out) for taken, out in seen if taken.shape == out.shape]
    extra = getattr(net, "num_prefix_tokens", getattr(net, "extra", 0))
    for taken, out in same:
        torch.testing.assert_close(taken[:, extra:], out[:, extra:])
    assert same or name == "test_resnet"
    net = make(name, gates={"name": "zero", "at": "stage"}).eval()
    blocks = [m for m in net.modules() if isinstance(getattr(m, "output_gate", None), Zero)]
    blocks[-1].register_forward_hook(lambda _, args, output: seen.append(output))
    net(x)
    assert not seen[-1][:, extra:].any() and (not extra or seen[-1][:, :extra].all())


def test_attention_of_timms_resnets_is_a_gate():
    """SE and ECA at the default place are those of SE-ResNet-50 and ECA-ResNet, whose parameters are published."""
    x = torch.randn(1, 3, 64, 64)
    for name in ("se", "eca"):
        net, theirs = (
            build("resnet26", gates=name).eval(),
            timm.create_model("resnet26", block_args={"attn_layer": name}),
        )
        theirs.load_state_dict(net.state_dict())
        assert torch.equal(net(x), theirs.eval()(x))


@pytest.mark.parametrize(
    ("gate", "params"),
    [
        # SE-ResNet-50 as timm has it; the tables of SE and CBAM print 28.1 M
        ("se", 28_088_024),
        # The formulas of the gates: 9, 7, 42 and 58 C for ELA's forms, 5 C and 3 for each group of channels for ULSAM;
        # the channels C of the blocks sum up to 15104
        ("ela", 25_557_032 + 9 * 15104),
        ({"name": "ela", "form": "tiny"}, 25_557_032 + 7 * 15104),
        ({"name": "ela", "form": "small"}, 25_557_032 + 42 * 15104),
        ({"name": "ela", "form": "large"}, 25_557_032 + 58 * 15104),
        ("ulsam", 25_557_032 + 5 * 15104 + 16 * 3 * 4),
    ],
    ids=str,
)
def test_parameters_of_resnet50(gate, params):
    with torch.device("meta"):
        net = build("resnet50", gates=gate)
    assert sum(parameter.numel() for parameter in net.parameters()) == pytest.approx(
        params, rel=1e-3 * (gate == "cbam")
    )


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "swin_nano", "test_vit"])
def test_dense_features(name):
    """Maps for a head: gates take part, every trained parameter has a gradient, and a plain file loads."""
    arguments = {key: value for key, value in NETS.get(name, ({},))[0].items() if key != "img_size"}
    net = DenseBackbone(name, gates={"name": "medusa", "width": 4}, **arguments)
    maps = net(torch.randn(2, 3, 97, 130))
    assert [m.shape[1] for m in maps] == net.channels
    torch.stack([m.square().sum() for m in maps]).sum().backward()
    missing = [key for key, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing and any(".output_gate." in key for key, p in net.named_parameters() if p.requires_grad)
    plain = DenseBackbone(name, **arguments)
    report = load_weights(net, plain.state_dict())
    assert all("gate" in key for key in report.missing)
    assert not load_weights(net, net.state_dict()).missing


@pytest.mark.parametrize("name", ["test_resnet", "swin_nano", "test_vit"])
def test_features_only(name):
    net: Any = build(name, gates="ela", features_only=True)
    maps = net(torch.randn(1, 3, *((160, 160) if name == "test_vit" else (64, 96))))
    assert [m.shape[1] for m in maps] == net.feature_info.channels()
    assert any("output_gate" in key or ".se." in key for key in net.state_dict())


def test_a_net_that_removes_tokens():
    net: Any = build("evit_small", gates="ela", reduce_at=(1,), depths=(4,), dim=32, heads=2, num_classes=3)
    assert net(torch.randn(1, 3, 45, 70)).shape == (1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_nano", "test_vit"])
def test_compiles_as_one_graph(name):
    net, x = make(name, gates={"name": "medusa", "width": 4}).eval(), images(name)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize(
    ("name", "gates", "message"),
    [
        ("test_resnet", "elaa", "no gate is called 'elaa'. Did you mean 'ela'?"),
        ("swin_nano", ["ela"], "gates must be one gate, or one for each of 4 stages, not 1"),
        ("swin_nano", {"name": "ulsam", "groups": 5}, "groups must divide 16 channels, which 5 does not"),
    ],
)
def test_wrong_gates_are_refused(name, gates, message):
    with pytest.raises(ValueError) as caught:
        make(name, gates=gates)
    assert message in str(caught.value)


def test_none_is_compared_with_the_gates():
    assert choices_of("gate") == ["none", *list_gates()]
