"""Mixture-of-head attention: definition by loops, special cases, and the load balance."""

import pytest
import torch

from ops import Place, create_op, create_ops
from ops.losses import Losses, loss_weights


def build(**arguments):
    torch.manual_seed(0)
    return create_op({"name": "mixture_of_heads", **arguments}, 16, 8).double()


@pytest.mark.parametrize(("shared", "routed"), [(2, 3), (1, 4), (0, 2), (3, 5), (8, 0)])
def test_weights_the_heads_as_defined(shared, routed):
    op, x = build(shared=shared, routed=routed), torch.randn(2, 3, 2, 16, dtype=torch.float64)
    heads = op.attention.attend(x)
    out, chosen = torch.empty_like(x), torch.zeros(8 - shared, dtype=torch.float64)
    probabilities = []
    for b in range(2):
        for n in range(6):
            token = x[b].flatten(0, 1)[n]
            group = (op.wg_0.weight @ token).softmax(0) * 2 if shared and routed else torch.ones(2)
            weights = torch.ones(shared, dtype=torch.float64)
            if shared > 1:
                weights = (op.wg_1.weight @ token).softmax(0) * shared
            weights = list(weights * group[0])
            if routed:
                gates = (op.wg.weight @ token).softmax(0)
                kept = sorted(range(8 - shared), key=lambda i: -gates[i].item())[:routed]
                total = sum(gates[i] for i in kept)
                weights += [
                    gates[i] / total * routed * group[1] if i in kept else gates.new_zeros(())
                    for i in range(8 - shared)
                ]
                probabilities.append(gates)
                for i in kept:
                    chosen[i] += 1
            mixed = torch.cat([weight * heads[b, h, n] for h, weight in enumerate(weights)])
            out[b, n // 2, n % 2] = op.attention.proj(mixed)
    losses = Losses()
    assert torch.allclose(op(x, losses=losses), out, atol=1e-12)
    if routed:
        balance = (torch.stack(probabilities).mean(0) * chosen / 12).sum() * (8 - shared)
        assert torch.allclose(losses.means()["load_balance"], balance)
    else:
        assert not losses.means() and not loss_weights(op)


@pytest.mark.parametrize("name", ["full", "pixel_focused", "aggregated", "length_scaled_cosine"])
def test_equal_weights_give_the_attention_op_itself(name):
    op, x = build(of=name, shared=8, routed=0), torch.randn(2, 9, 5, 16, dtype=torch.float64)
    torch.nn.init.zeros_(op.wg_1.weight)
    assert torch.allclose(op(x), op.attention(x), atol=1e-12)


def test_equally_frequent_choices_have_the_least_balance_loss():
    op, losses = build(shared=0, routed=2), Losses()
    torch.nn.init.eye_(op.wg.weight)
    # Token i prefers the heads i and i + 1, so each head is chosen twice.
    tokens = 20 * (torch.eye(8, 16) + torch.eye(8, 16).roll(1, 0)).double()
    op(tokens.view(1, 2, 4, 16), losses=losses)
    op(tokens[:1].expand(8, -1).reshape(1, 2, 4, 16), losses=losses)
    balanced, alone = losses.values["load_balance"]
    assert torch.allclose(balanced, torch.tensor(2.0, dtype=torch.float64)) and alone > 3 * balanced


def test_takes_extra_tokens_and_shares_the_context_of_the_attention_op():
    x, extra = torch.randn(2, 4, 3, 16), torch.randn(2, 1, 16)
    op = create_op("mixture_of_heads", 16, 8, place=Place(extra=1))
    out, token = op(x, extra)
    everything = torch.cat([extra, x.flatten(1, 2)], dim=1).unsqueeze(1)
    assert torch.allclose(torch.cat([token, out.flatten(1, 2)], dim=1), op(everything).flatten(1, 2), atol=1e-6)
    ops, contexts = create_ops([{"name": "mixture_of_heads", "of": "aggregated"}] * 2, 16, 8)
    assert contexts[0] is contexts[1] is not None
    assert torch.equal(ops[0](x, context=contexts[0](x)), ops[0](x))
    assert create_ops(["mixture_of_heads"], 16, 8)[1] == [None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shared": 9}, "shared must be from 0 to 8 heads"),
        ({"shared": 4, "routed": 5}, "not 4 and 5"),
        ({"shared": 4, "routed": 0}, "not 4 and 0"),
        ({"of": "channel"}, "whose heads can be weighted, such as full, not 'channel'"),
        ({"of": "ful"}, "Did you mean 'full'"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)
    with pytest.raises(ValueError, match="takes extra tokens"):
        create_op({"name": "mixture_of_heads", "of": "aggregated"}, 16, 8, place=Place(extra=1))
