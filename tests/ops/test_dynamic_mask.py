"""Dynamic mask attention: its definition as loops, its masks and its special cases."""

import pytest
import torch
import torch.nn.functional as F

from ops import create_op
from ops.attention.dynamic_mask import vote

X = torch.randn(2, 4, 5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def dynamic_mask(**arguments):
    torch.manual_seed(0)
    return create_op("dynamic_mask", dim=12, num_heads=6, kv_heads=2, **arguments).double()


@pytest.mark.parametrize(
    "arguments", [{"keys": 6}, {"keys": 9, "block": 3}, {"mask": "relu"}, {"mask": "relu", "block": 3}], ids=str
)
def test_attends_as_defined(arguments):
    op = dynamic_mask(**arguments)
    with torch.no_grad():
        op.A.copy_(torch.tensor([0.7, -0.5]))
    block, none_kept = arguments.get("block", 1), 0
    for image, actual in zip(X.flatten(1, 2), op(X).flatten(1, 2), strict=True):
        q = op.q_norm(op.q(image).view(20, 6, 2))
        k, v = op.k_norm(op.k(image).view(20, 2, 2)), op.v(image).view(20, 2, 2)
        scores = op.A * F.softplus(op.dt_proj(v.flatten(1)))  # (N, kv_heads)
        heads = []
        for h in range(6):
            content = scores[:, h // 3]
            kept = [bool(s > 0) for s in content]
            if "keys" in arguments:
                kept = [sum(bool(other > s) for other in content) < arguments["keys"] for s in content]
            blocks = [kept[i : i + block] for i in range(0, 20, block)]
            kept = [2 * sum(part) > len(part) for part in blocks for _ in part]
            chosen = [j for j in range(20) if kept[j]]
            none_kept += not chosen
            if not chosen:
                heads.append(torch.zeros(20, 2, dtype=torch.float64))
                continue
            weights = (q[:, h] @ k[chosen, h // 3].T / 2**0.5 + content[chosen]).softmax(-1)
            heads.append(weights @ v[chosen, h // 3])
        assert torch.allclose(actual, op.proj(torch.cat(heads, dim=-1)), atol=1e-12)
    assert (none_kept > 0) == ("mask" in arguments)


def test_with_all_keys_and_no_factor_it_is_grouped_query_attention():
    op = dynamic_mask(keys=20)
    with torch.no_grad():
        op.A.zero_()
    grouped = create_op("grouped_query", 12, 6, kv_heads=2, qk_norm=True, qkv_bias=False, proj_bias=False).double()
    grouped.load_state_dict({name: value for name, value in op.state_dict().items() if name in grouped.state_dict()})
    assert torch.allclose(op(X), grouped(X), atol=1e-12)


def test_of_equal_keys_the_first_are_kept():
    op = dynamic_mask(keys=6)
    with torch.no_grad():
        op.A.zero_()
    changed = X.clone()
    changed[:, 2:] += 1
    assert torch.allclose(op(X)[:, 0], op(changed)[:, 0], atol=1e-12)


def test_gradients_of_every_mask_are_finite():
    for arguments in ({"keys": 6}, {"keys": 1, "block": 4}, {"mask": "relu"}):
        op = dynamic_mask(**arguments)
        x = X[:1].clone().requires_grad_()
        assert torch.autograd.gradcheck(op, x, fast_mode=True)


def test_the_last_block_votes_among_the_keys_that_it_has():
    kept = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 0, 1], dtype=torch.bool)
    assert vote(kept, 4).int().tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert vote(kept, 3).int().tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 1, 1]


def test_wrong_values_are_refused():
    for arguments, message in (
        ({"mask": "top"}, "mask must be 'topk' or 'relu', not 'top'"),
        ({"keys": 0}, "keys and block must be at least 1, not 0 and 1"),
        ({"kv_heads": 4}, "kv_heads must be positive and a divisor of"),
    ):
        with pytest.raises(ValueError, match=message):
            create_op({"name": "dynamic_mask", **arguments}, 12, 6)
