"""Linear attention in plain PyTorch equals its definition, written as loops, in all forms and on large sums."""

import pytest
import torch
from torch import Tensor

from ops.linear import linear_attention

FORMS = [(f, n) for f in ("elu", "relu", "identity") for n in ("none", "sum", "subtract")] + [("softmax", "none")]


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, features: str, normalization: str, scale: Tensor, min_sum: float
) -> Tensor:
    """Compute one head of one image, q (N, D), k (M, D) and v (M, E), from the weight of each pair of tokens."""
    if features == "softmax":
        q, k = q.exp() / q.exp().sum(1, keepdim=True), k.exp() / k.exp().sum(0)
    elif features != "identity":
        q, k = (t.clamp(min=0) if features == "relu" else torch.where(t > 0, t + 1, t.exp()) for t in (q, k))
    out = []
    for i in range(len(q)):
        products = torch.stack([(q[i] * k[j]).sum() for j in range(len(k))])
        if normalization == "sum":
            weights = scale * products / max(products.sum(), torch.tensor(min_sum))
        elif normalization == "subtract":
            weights = (scale * (products - products.mean()) + 1) / len(k)
        else:
            weights = scale * products
        out.append(sum(weights[j] * v[j] for j in range(len(k))))
    return torch.stack([torch.as_tensor(row) for row in out])


@pytest.mark.parametrize(("features", "normalization"), FORMS)
def test_weights_and_gradients_are_as_defined(features, normalization):
    """With identical features, queries and keys are positive; the minimum of the sums binds for some of the queries."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 6), torch.randn(2, 7, 6), torch.randn(2, 7, 8)
    if features == "identity" and normalization == "sum":
        q, k = q.exp(), k.exp()
    q, k, v = (t.double().requires_grad_() for t in (q, k, v))
    scale = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    minimum = {"elu": 20.0, "relu": 5.0, "identity": 50.0}.get(features, 1.0)
    out = linear_attention((q, k, v), 2, features, normalization, scale, minimum)
    heads = []
    for b in range(2):
        for head in range(2):
            query, key, values = (t[b].chunk(2, dim=-1)[head] for t in (q, k, v))
            heads.append(by_definition(query, key, values, features, normalization, scale[head], minimum))
    expected = torch.stack([torch.cat(heads[:2], -1), torch.cat(heads[2:], -1)])
    assert torch.allclose(out, expected, atol=1e-12)
    dout, inputs = torch.randn_like(out), (q, k, v, scale)
    gradients, expected_gradients = (torch.autograd.grad(y, inputs, dout) for y in (out, expected))
    for actual, reference in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(actual, reference, atol=1e-11)


def test_one_tensor_holds_queries_keys_and_values():
    qkv = torch.randn(2, 9, 24)
    q, k, v = qkv.chunk(3, dim=-1)
    assert torch.equal(linear_attention(qkv, 2), linear_attention((q, k, v), 2))


@pytest.mark.parametrize("normalization", ["sum", "subtract"])
def test_large_sums_stay_in_range_in_half_precision(normalization):
    """The sum of 3,000 products of keys and values is beyond the largest float16; autocast must not compute it so."""
    torch.manual_seed(0)
    qkv = (4 + torch.randn(1, 3000, 24)).half()
    with torch.autocast("cpu", torch.float16):
        out = linear_attention(qkv, 2, "relu", normalization, 0.01)
    expected = linear_attention(qkv.double(), 2, "relu", normalization, 0.01)
    assert out.dtype == torch.float16 and torch.allclose(out.double(), expected, rtol=1e-3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("elo",), "features must be elu, relu, softmax, identity, not 'elo'. Did you mean 'elu'"),
        (("elu", "sums"), "normalization must be none, sum, subtract, not 'sums'. Did you mean 'sum'"),
        (("softmax", "sum"), "softmax features take normalization none, since they sum to 1, not 'sum'"),
    ],
)
def test_unknown_forms_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(torch.zeros(1, 2, 12), 2, *arguments)
