"""Hierarchical self-attention: its weights in loops over the tree, and the cases of full attention."""

import itertools

import pytest
import torch

from ops import create_op

SIZE = (5, 7)
X = torch.randn(1, *SIZE, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = list(itertools.product(range(SIZE[0]), range(SIZE[1])))


def hierarchical(**arguments):
    torch.manual_seed(0)
    return create_op("hierarchical", dim=8, num_heads=2, **arguments).double()


def branches(window, branch):
    """Return for each level the block of each token: windows first, the whole map last."""
    side, levels = window, []
    while True:
        levels.append({t: (t[0] // side, t[1] // side) for t in TOKENS})
        if len(set(levels[-1].values())) == 1:
            return levels
        side = max(SIZE) if branch is None else side * branch


def tied_weights(q, k, levels, block_normalized):
    """Return the attention (N, N) of one head from its queries and keys (H, W, D)."""
    keys = {t: k[t] for t in TOKENS}
    # Sums of weights of each token over ever larger blocks, and the weights relative to that sum
    weights = {i: {j: (q[i] @ keys[j] / 2).exp() for j in TOKENS if levels[0][i] == levels[0][j]} for i in TOKENS}
    for lower, upper in itertools.pairwise(levels):
        members: dict = {}
        for t in TOKENS:
            members.setdefault(lower[t], []).append(t)
        means = {a: [torch.stack([t[i] for i in inside]).mean(0) for t in (q, k)] for a, inside in members.items()}
        for a, inside in members.items():
            totals = {i: torch.stack(list(weights[i].values())).sum() for i in inside}
            common = torch.stack([total.log() for total in totals.values()]).mean().exp()
            for i in inside:
                if block_normalized:
                    weights[i] = {j: w / totals[i] * common for j, w in weights[i].items()}
                for b in members:
                    if b != a and upper[members[b][0]] == upper[i]:
                        weights[i] |= dict.fromkeys(members[b], (means[a][0] @ means[b][1] / 2).exp())
    rows = [torch.stack([weights[i][j] for j in TOKENS]) for i in TOKENS]
    return torch.stack([row / row.sum() for row in rows])


@pytest.mark.parametrize("normalize", ["row", "block"])
@pytest.mark.parametrize(("window", "branch"), [(2, None), (3, None), (2, 2), (1, 2), (1, 3)])
def test_attends_as_defined(window, branch, normalize):
    op = hierarchical(window=window, branch=branch, normalize=normalize)
    q, k, v = (t[0].unflatten(-1, (2, 4)) for t in op.qkv(X).chunk(3, dim=-1))
    levels = branches(window, branch)
    heads = [
        tied_weights(q[:, :, h], k[:, :, h], levels, normalize == "block") @ v[:, :, h].flatten(0, 1) for h in range(2)
    ]
    assert torch.allclose(op(X).flatten(1, 2)[0], op.proj(torch.cat(heads, dim=-1)), atol=1e-12)


def test_block_normalisation_is_closest_to_softmax_among_tied_weights():
    q, k = torch.randn(2, *SIZE, 4, dtype=torch.float64).unbind()
    softmax = (q.flatten(0, 1) @ k.flatten(0, 1).T / 2).softmax(-1)
    levels = branches(2, None)
    window = torch.tensor([levels[0][t][0] * 4 + levels[0][t][1] for t in TOKENS])
    tied = tied_weights(q, k, levels, True)

    def divergence(weights):
        return (weights * (weights / softmax).log()).sum()

    far = window[:, None] != window
    pairs = itertools.permutations(window.unique(), 2)
    assert all(torch.allclose(part, part[:1, :1]) for part in (tied[window == a][:, window == b] for a, b in pairs))
    # Move weight between one window and all others
    for a in window.unique():
        for factor in (0.99, 1.01):
            changed = tied.clone()
            changed[window == a] = torch.where(far, tied * factor, tied)[window == a]
            rest = 1 - (changed * far).sum(-1, keepdim=True)
            own = (changed * ~far) / (changed * ~far).sum(-1, keepdim=True) * rest
            changed = torch.where(far, changed, own)
            assert divergence(changed) > divergence(tied)


@pytest.mark.parametrize("arguments", [{"window": 1}, {"window": 7}, {"window": 1, "branch": 7}])
@pytest.mark.parametrize("normalize", ["row", "block"])
def test_cases_of_full_attention(arguments, normalize):
    op, full = hierarchical(normalize=normalize, **arguments), create_op("full", dim=8, num_heads=2).double()
    full.load_state_dict(op.state_dict())
    assert torch.allclose(op(X), full(X), atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window must be at least 1 and branch at least 2, not 0 and None"),
        ({"branch": 1}, "window must be at least 1 and branch at least 2, not 7 and 1"),
        ({"normalize": "column"}, "normalize must be one of row, block, not 'column'"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        hierarchical(**arguments)
