"""Options of the softmax: a temperature that follows the number of keys, and biases of low rank."""

import math

import pytest
import torch
import torch.nn.functional as F

from models import create_model
from ops import Place, create_op, list_ops
from ops.low_rank import LearnedBias, alibi_factors, append_factors, distance_factors, svd_factors
from ops.registry import _OPS
from ops.softmax import SoftmaxOptions

NAMES = [name for name in list_ops() if getattr(_OPS[name], "softmax_options", False)]
WINDOWED = [name for name in NAMES if not create_op(name, 8, 2).softmax.content]
# These ops pad maps smaller than a window, so that the number of keys stays
ALWAYS_PADDED = ("lora_window", "plain_window")
GLOBAL = [name for name in NAMES if name not in WINDOWED]
X = torch.randn(1, 6, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def build(name, **options):
    torch.manual_seed(0)
    return create_op({"name": name, **options}, 8, 2, place=Place(3, stride=32)).double()


def entropy_scale(keys, train_keys, head_dim=64):
    options = SoftmaxOptions(1, head_dim, Place(stride=16))
    options.configure("entropy", train_keys=train_keys)
    return options.scale(keys) * head_dim**0.5


def test_global_and_windowed_ops_take_the_options():
    assert {"full", "grouped_query", "hilo", "single_head", "spatial_reduction", "strip_self"} <= set(GLOBAL)
    assert {"conv_enhanced_window", "grid", "lora_window", "plain_window", "window"} <= set(WINDOWED)


def test_factor_of_the_entropy_temperature():
    factors = [entropy_scale(577, 197), entropy_scale(1025, 197), entropy_scale(49, 196), entropy_scale(1, 2)]
    assert factors == pytest.approx([1.097, 1.145, 0.859, 1], abs=6e-4)
    assert entropy_scale(196, 196) == 1


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [("fixed", (0.878, 0.904, 0.925, 0.937)), ("entropy", (0.909, 0.904, 0.905, 0.903))],
)
def test_entropy_relative_to_that_of_uniform_weights(temperature, expected):
    options = SoftmaxOptions(1, 64, Place(stride=16))
    options.configure(temperature)
    torch.manual_seed(0)
    for keys, mean in zip((49, 196, 784, 3136), expected, strict=True):
        # Scores have a variance of 1 before the factor
        scores = torch.randn(200, 64) @ torch.randn(64, keys) * options.scale(keys)
        entropy = torch.distributions.Categorical(logits=scores).entropy().mean() / math.log(keys)
        assert entropy.item() == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_the_temperature_changes_nothing_but_at_another_number_of_keys(name):
    op, plain, x = build(name, temperature="entropy"), build(name), torch.randn(1, 7, 7, 8, dtype=torch.float64)
    assert torch.equal(op(x), plain(x))
    assert not torch.allclose(op(x[:, :5]), plain(x[:, :5])) or name in ALWAYS_PADDED
    assert not torch.allclose(build(name, temperature="entropy", train_keys=9)(x), plain(x))


def test_pooled_keys_are_counted():
    op = create_op("spatial_reduction", 8, 2, place=Place(1, stride=8, extra=1), temperature="entropy")
    assert op.softmax.train_keys == 7 * 7 + 1
    op.softmax.configure("entropy", train_size=100)
    assert op.softmax.train_keys == 4 * 4 + 1


def test_squared_distances_and_alibi_are_exact():
    torch.manual_seed(0)
    queries, keys, slopes = torch.randn(5, 2).double(), torch.randn(7, 2).double(), torch.tensor([0.5, 3]).double()
    phi_q, phi_k = distance_factors(queries, keys, slopes)
    bias = -slopes.view(-1, 1, 1) * torch.cdist(queries, keys).square()
    assert phi_q.shape == (2, 5, 4) and torch.allclose(phi_q @ phi_k.mT, bias, atol=1e-12)
    phi_q, phi_k = alibi_factors(6, slopes)
    distance = (torch.arange(6)[:, None] - torch.arange(6)).double()
    assert phi_q.shape == (2, 6, 2) and torch.allclose((phi_q @ phi_k.mT), -slopes.view(-1, 1, 1) * distance)


def test_appended_factors_are_a_bias():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 6, 5, dtype=torch.float64).unbind(0)
    phi_q, phi_k = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True).unbind(0)
    wide_q, wide_k = append_factors(q, k, (phi_q, phi_k), 5**-0.5)
    assert wide_q.shape[-1] % 8 == 0
    # The first two tokens are extra ones
    bias = F.pad(phi_q @ phi_k.mT, (2, 0, 2, 0))
    out = F.scaled_dot_product_attention(wide_q, wide_k, v, scale=1.0)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
    assert torch.allclose(out, expected, atol=1e-12)
    grads = [torch.autograd.grad(y.square().sum(), (phi_q, phi_k), retain_graph=True) for y in (out, expected)]
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*grads, strict=True))


def test_a_table_of_relative_positions_has_a_low_rank_approximation():
    window = create_op("window", 8, 2, window=5)
    torch.nn.init.normal_(window.relative_position_bias_table)
    bias = window.bias((5, 5)).detach()
    errors = []
    for rank in (1, 4, 9, 25):
        phi_q, phi_k = svd_factors(bias, rank)
        errors.append(((phi_q @ phi_k.mT - bias).norm() / bias.norm()).item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5
    phi_q, phi_k = svd_factors(bias)
    kept = 1 - (phi_q @ phi_k.mT - bias).square().sum((1, 2)) / bias.square().sum((1, 2))
    assert kept.min() > 0.995 and phi_q.shape[-1] < 25
    learned = LearnedBias(2, 25, 5)
    learned.approximate(bias)
    phi_q, phi_k = learned(X, X, (5, 5), (5, 5))
    assert torch.allclose(phi_q @ phi_k.mT, bias, atol=1e-4)


@pytest.mark.parametrize("low_rank_bias", ["distance", "learned", "content"])
def test_full_attention_has_the_bias_added(low_rank_bias):
    op = build("full", low_rank_bias=low_rank_bias, bias_rank=3)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in op.qkv(X.flatten(1, 2)).chunk(3, -1))
    phi_q, phi_k = op.softmax.bias(q, k, (6, 4), (6, 4))
    out = ((q @ k.mT / 2 + phi_q @ phi_k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert torch.allclose(op(X).flatten(1, 2), op.proj(out), atol=1e-12)
    if low_rank_bias == "distance":
        i, j = 1 * 4 + 3, 4 * 4 + 0
        # The longer side has 6 tokens
        distance = ((1 - 4) ** 2 + (3 - 0) ** 2) * (2 / 6) ** 2
        assert (phi_q @ phi_k.mT)[1, i, j].item() == pytest.approx(-16 * distance)


@pytest.mark.parametrize("name", NAMES)
def test_every_bias_trains_in_every_op(name):
    for low_rank_bias in ("distance", "learned") + (("content",) if name in GLOBAL else ()):
        op, x = build(name, low_rank_bias=low_rank_bias), X[:, :5].clone().requires_grad_()
        extra = getattr(op, "takes_extra", False)
        out = torch.cat([t.flatten() for t in op(x, x[:, 0, :1])]) if extra else op(x)
        grads = torch.autograd.grad(out.square().sum(), [x, *op.softmax.parameters()])
        assert all(grad.abs().max() > 0 for grad in grads)


def test_pooled_keys_have_positions_in_the_middle_of_their_cells():
    op = create_op("spatial_reduction", 8, 2, place=Place(stride=8), ratio=2, low_rank_bias="distance").double()
    _, phi_k = op.softmax.bias(X, X, (4, 4), (2, 2))
    assert torch.allclose(phi_k[0, :, 2:], torch.tensor([[y, x] for y in (-0.5, 0.5) for x in (-0.5, 0.5)]).double())


def test_options_reach_ops_in_nets_and_inside_other_ops():
    mixers = {"name": "gated", "of": {"name": "full", "temperature": "entropy", "low_rank_bias": "distance"}}
    net = create_model({"name": "swin_nano", "mixers": ["window", "window", mixers, "full"]}, 3, 3, 64)
    assert net(torch.randn(1, 3, 70, 45)).isfinite().all()
    assert {name.rpartition(".")[2] for name, _ in net.named_parameters() if "softmax" in name} == {"log_slope"}


def test_wrong_options_are_refused():
    for spec, message in (
        ({"name": "full", "temperature": "log"}, "temperature must be 'fixed' or 'entropy', not 'log'"),
        (
            {"name": "full", "low_rank_bias": "svd"},
            "low_rank_bias must be one of distance, learned, content, not 'svd'",
        ),
        (
            {"name": "full", "bias_rank": 0},
            "bias_rank, train_size and train_keys must be at least 1, not 0, 224 and None",
        ),
        ({"name": "full", "temperatur": "entropy"}, "takes no 'temperatur'. Did you mean 'temperature'"),
        ({"name": "grid", "low_rank_bias": "content"}, "low_rank_bias of this op must be 'distance' or 'learned'"),
        ({"name": "agent", "temperature": "entropy"}, "op 'agent' takes no 'temperature'"),
    ):
        with pytest.raises(ValueError, match=message):
            create_op(spec, 8, 2)
