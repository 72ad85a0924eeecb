"""Properties of every registered gate, and the definitions of gates without a reference vector as loops."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.ghostnet import GhostModuleV2

from ops import list_gates, parse_gates
from ops.gate_registry import create_gate, create_gate_context, place_of

SIZES = ((1, 1), (3, 20), (7, 7), (13, 9))


def build(spec, dim=16) -> tuple[Any, tuple[Any, ...]]:
    """Return a gate and the arguments that it takes after the map, for images of 26 x 18 pixels."""
    torch.manual_seed(1)
    gate, body = create_gate(spec, dim), create_gate_context(spec, 3)
    context = () if body is None else (body(torch.randn(2, 3, 26, 18)).detach(),)
    return gate, context


@pytest.mark.parametrize("name", list_gates())
def test_a_gate_keeps_any_shape_and_trains_every_parameter(name):
    gate, context = build(name, 64)
    for size in SIZES:
        x = torch.randn(2, 64, *size, requires_grad=True)
        out = gate(x, *context)
        assert out.shape == x.shape and out.isfinite().all()
    grads = torch.autograd.grad(out.pow(3).sum(), (x, *gate.parameters()))
    for key, grad in zip(("input", *(key for key, _ in gate.named_parameters())), grads, strict=True):
        # A bias before a softmax has a gradient of 0.
        assert grad.isfinite().all() and (grad.abs().sum() > 0 or grad.ndim == 1), key
    alone = gate.eval()(x[:1], *(values[:1] for values in context))
    torch.testing.assert_close(gate(x, *context)[:1], alone)
    half = gate.bfloat16()(x.bfloat16(), *(values.bfloat16() for values in context))
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


@pytest.mark.parametrize("spec", [*list_gates(), {"name": "psa", "form": "sequential"}], ids=str)
def test_gradients(spec):
    gate, context = build(spec, 8)
    gate, context = gate.double().eval(), tuple(values[:1].double() for values in context)
    x = torch.randn(1, 8, 3, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gate(x, *context), x)


@pytest.mark.parametrize("name", list_gates())
def test_arguments_have_defaults(name):
    spec = {"name": name, "at": "stage"}
    assert place_of(spec) == "stage" and all(
        parameter.default is not parameter.empty
        for parameter in list(inspect.signature(type(create_gate(spec, 8))).parameters.values())[1:]
        if parameter.kind is not parameter.VAR_KEYWORD
    )


@pytest.mark.parametrize("form", ["tiny", "base", "small", "large"])
def test_ela_by_loops(form):
    gate, _ = build({"name": "ela", "form": form}, 32)
    torch.nn.init.normal_(gate.norm.weight)
    x = torch.randn(1, 32, 5, 6)
    length, width, groups = {"tiny": (5, 1, 32), "base": (7, 1, 16), "small": (5, 8, 16), "large": (7, 8, 16)}[form]
    assert gate.conv.weight.shape == (32, width, length) and gate.norm.num_groups == groups
    factors = []
    for means in (x[0].mean(2), x[0].mean(1)):
        n = means.shape[1]
        convolved = torch.zeros(32, n)
        for c in range(32):
            for i in range(n):
                for k in range(length):
                    j = i + k - length // 2
                    if 0 <= j < n:
                        first = c // width * width
                        convolved[c, i] += gate.conv.weight[c, :, k] @ means[first : first + width, j]
        parts = convolved.view(groups, -1)
        parts = (parts - parts.mean(1, True)) / (parts.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        factors.append((parts.view(32, n) * gate.norm.weight[:, None] + gate.norm.bias[:, None]).sigmoid())
    expected = x[0] * factors[0][:, :, None] * factors[1][:, None, :]
    torch.testing.assert_close(gate(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_dfc_is_the_gate_of_ghostnetv2():
    gate, _ = build("dfc")
    ghost = GhostModuleV2(16, 16).eval()
    ghost.short_conv.load_state_dict(gate.factors.state_dict())
    x = torch.randn(2, 16, 6, 8)
    primary = ghost.primary_conv(x)
    features = torch.cat([primary, ghost.cheap_operation(primary)], dim=1)[:, :16]
    factors = gate.eval()(x) / x
    torch.testing.assert_close(features * factors, ghost(x), rtol=1e-4, atol=1e-5)


def test_gaussian_adaptive_weights_by_loops():
    gate, _ = build({"name": "gaussian_adaptive", "heads": 2, "gaussians": 3}, 8)
    for head in gate.attention.attention_heads:
        torch.nn.init.normal_(head.mean_offsets, std=0.3)
        torch.nn.init.uniform_(head.c, 1, 2)
    x = torch.randn(1, 8, 2, 3)
    out = x.clone()
    for i in range(2):
        for j in range(3):
            for head, heads in enumerate(gate.attention.attention_heads):
                part = x[0, 4 * head : 4 * head + 4, i, j]
                density = torch.ones(4)
                for offset, width in zip(heads.mean_offsets, heads.c, strict=True):
                    scale = (part.var() + 1e-8).sqrt() * width
                    density *= (-((part - part.mean() - offset) ** 2) / (2 * scale**2)).exp() / width
                out[0, 4 * head : 4 * head + 4, i, j] += part * density / density.sum()
    torch.testing.assert_close(gate(x), out, rtol=1e-4, atol=1e-5)


def test_medusa_reads_the_image_and_the_map():
    gate, context = build("medusa")
    gate.eval()
    scores = context[0]
    x = torch.randn(2, 16, 13, 9)
    factors = (gate(x, scores) / x - 1)[:, 0]
    assert ((factors > 0) & (factors < 1)).all()
    # All channels of a place have one factor, which follows from the scores and the mean over channels.
    torch.testing.assert_close(gate(x, scores), x * (1 + factors[:, None]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gate(x.flip(1), scores), (x * (1 + factors[:, None])).flip(1), rtol=1e-4, atol=1e-5)
    joined = torch.cat([F.interpolate(scores, (13, 9), mode="bilinear"), x.mean(1, True)], 1)
    torch.testing.assert_close(gate.head(joined).sigmoid()[:, 0], factors, rtol=1e-4, atol=1e-4)


def test_gates_by_stage_and_block():
    assert parse_gates(["none", None, ["eca", None], {"name": "ela", "at": "stage"}], (1, 2, 3, 1)) == [
        [None],
        [None, None],
        ["eca", None, "eca"],
        [{"name": "ela", "at": "stage"}],
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("elaa", "no gate is called 'elaa'. Did you mean 'ela'?"),
        ({"name": "ela", "frm": "tiny"}, "gate 'ela' takes no 'frm'. Did you mean 'form'?"),
        ({"name": "ela", "form": "huge"}, "form must be one of tiny, base, small, large, not 'huge'"),
        ({"name": "ela", "at": "blck"}, "at must be one of branch, conv, block, stage, not 'blck'. Did you mean"),
        ({"name": "ulsam", "groups": 3}, "groups must divide 16 channels, which 3 does not"),
        ({"name": "dfc", "kernel": 4}, "kernel must be odd, not 4"),
        (3, "gate must be a name or a mapping with a 'name', not 3"),
    ],
)
def test_wrong_values_are_refused(spec, message):
    with pytest.raises(ValueError) as caught:
        place_of(spec)
        create_gate(spec, 16)
    assert message in str(caught.value)
