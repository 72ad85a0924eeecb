"""Sparsifiner's attention: definition by loops, special cases, and the loss of the predictor."""

from math import ceil, sqrt

import pytest
import torch

from ops import Place, create_op
from ops.losses import Losses


def build(extra=0, **arguments):
    torch.manual_seed(0)
    op = create_op({"name": "sparsifiner", "size": (3, 4), **arguments}, 8, 2, place=Place(extra=extra)).double()
    # Larger tables, so that few entries of the basis are below the threshold
    for table in (op.mask_predictor.proj_n, op.mask_predictor.proj_back_n):
        torch.nn.init.normal_(table)
    return op


@pytest.mark.parametrize("extra", [0, 1])
def test_attends_and_learns_as_defined(extra):
    op, tokens = build(extra, keep=0.4, basis=5, coefficients=2), torch.randn(1, extra + 12, 8, dtype=torch.float64)
    predictor, n = op.mask_predictor, extra + 12
    q, k, v = op.qkv(tokens)[0].chunk(3, -1)
    out, distance = torch.empty(n, 8, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for h in (slice(0, 4), slice(4, 8)):
        small_q, small_k = predictor.proj_c_q(q[:, h]), predictor.proj_c_k(k[:, h])
        mixtures = torch.stack(
            [torch.stack([predictor.proj_n[j, m] * small_k[j] for j in range(n)]).sum(0) for m in range(5)]
        )
        for i in range(n):
            scores = torch.stack([q[i, h] @ k[j, h] / sqrt(4) for j in range(n)])
            keys = list(range(n))
            if i >= extra:
                coefficients = (mixtures @ small_q[i] / sqrt(2)).softmax(0)
                approximation = coefficients @ predictor.proj_back_n.T
                distance = distance + (approximation - scores.softmax(0)).square().sum()
                kept = coefficients * (coefficients >= coefficients.sort().values[-2])
                basis = predictor.proj_back_n.abs()
                importance = (basis * (basis > 0.02)) @ kept
                keys = sorted(range(n), key=lambda j: -importance[j].item())[: ceil(0.4 * n)]
            out[i, h] = scores[keys].softmax(0) @ v[keys, h]
    expected, losses = op.proj(out), Losses()
    x = tokens[:, extra:].view(1, 3, 4, 8)
    result = op(x, tokens[:, :1], losses=losses) if extra else op(x, losses=losses)
    result = torch.cat([result[1], result[0].flatten(1, 2)], dim=1) if extra else result.flatten(1, 2)
    assert torch.allclose(result[0], expected, atol=1e-12)
    assert torch.allclose(losses.means()["connectivity"], distance)


def test_all_keys_are_full_attention():
    op, full = build(keep=1.0), create_op("full", 8, 2).double()
    full.load_state_dict({key: value for key, value in op.state_dict().items() if "predictor" not in key})
    x = torch.randn(2, 6, 5, 8, dtype=torch.float64)
    assert torch.allclose(op(x), full(x), atol=1e-12)


def test_pruned_tokens_are_no_keys_of_the_map():
    op, tokens = build(1, keep=0.5), torch.randn(2, 13, 8, dtype=torch.float64)
    alive = torch.rand(2, 12) > 0.4
    _, weights = op.attend(tokens, (3, 4), alive=alive, limit=int(alive.sum(1).min()))
    of_the_map = weights[:, :, 1:, 1:]
    assert not of_the_map[~alive[:, None, None].expand_as(of_the_map)].any() and of_the_map.any()


@pytest.mark.parametrize("arguments", [{"keep": 0.0}, {"keep": 1.5}, {"basis": 0}, {"coefficients": 0}, {"size": 0}])
def test_wrong_values_are_refused(arguments):
    with pytest.raises(ValueError, match="keep must be above 0 and at most 1"):
        build(**arguments)
