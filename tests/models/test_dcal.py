"""DCAL's branches against loops over their definitions, and its agreement with DeiT."""

import math

import pytest
import torch

from models import load_weights
from ops.functional import split_heads
from tests.models.test_backbones import build


def branch_net(**arguments):
    net = build("dcal_tiny", num_classes=3, depths=(2,), img_size=64, **arguments)
    net.set_branch_training()
    return net


def heads_of(block, x):
    """Return the queries, keys and values (3, B, 3, N, 64) of a block's attention, and the tokens before it."""
    return torch.stack(split_heads(block.mixer.qkv(block.norm1(x)), 9).chunk(3, dim=1))


def attend(q, k, v):
    """Return softmax(q k^T / 8) v of one head, and the weights."""
    weights = (q @ k.T / 8).softmax(-1)
    return weights @ v, weights


def finish(block, x, heads):
    """Add the joined heads (N, 64) of one image and the MLP to its tokens (N, C)."""
    x = x + block.mixer.proj(torch.cat(heads, -1))
    return x + block.mlp(block.norm2(x))


def test_pairs_attend_to_the_image_half_a_batch_away_too():
    net = branch_net().train()
    image = torch.randn(3, 3, 64, 64)
    scores = net(image)[2]
    x, _ = net.embed(image)
    for block in net.blocks:
        q, k, v = heads_of(block, x)
        rows = []
        for i in range(3):
            j = (i + 1) % 3
            parts = [attend(q[i, h], torch.cat([k[i, h], k[j, h]]), torch.cat([v[i, h], v[j, h]]))[0] for h in range(3)]
            rows.append(finish(block, x[i], parts))
        x = torch.stack(rows)
    torch.testing.assert_close(scores, net.head(net.norm(x)[:, 0]), atol=1e-4, rtol=0)


def test_the_tokens_with_the_highest_rollout_attend_once_more():
    net = branch_net(local=0.2).eval()
    image = torch.randn(2, 3, 64, 64)
    x, _ = net.embed(image)
    rollouts = [torch.eye(17)] * 2
    for block in net.blocks:
        q, k, v = heads_of(block, x)
        rows = []
        for i in range(2):
            parts = [attend(q[i, h], k[i, h], v[i, h]) for h in range(3)]
            mean = sum(weights for _, weights in parts) / 3
            rollouts[i] = (0.5 * mean + 0.5 * torch.eye(17)) @ rollouts[i]
            rows.append(finish(block, x[i], [out for out, _ in parts]))
        x = torch.stack(rows)
    local, block = [], net.local_block
    for i in range(2):
        chosen = [0, *(1 + rollouts[i][0, 1:].topk(math.ceil(0.2 * 16)).indices).tolist()]
        assert len(chosen) == 5
        tokens = block.norm1(x[i])
        q, (k, v) = block.q(tokens[chosen]), block.kv(tokens).chunk(2, dim=-1)
        parts = [attend(*(t[:, 64 * h : 64 * h + 64] for t in (q, k, v)))[0] for h in range(3)]
        out = x[i, chosen] + block.proj(torch.cat(parts, -1))
        local.append(net.local_norm(out + block.mlp(block.norm2(out)))[0])
    probabilities = (net.head(net.norm(x)[:, 0]).softmax(1) + net.head_local(torch.stack(local)).softmax(1)) / 2
    torch.testing.assert_close(net(image), probabilities.log(), atol=1e-4, rtol=0)


def test_evaluation_has_no_pairs():
    net = branch_net().eval()
    image = torch.randn(4, 3, 64, 64)
    with torch.inference_mode():
        together, alone = net(image), torch.cat([net(image[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
        paired = net.train()(image)[2] - torch.cat([net(image[i : i + 1])[2] for i in range(4)])
    assert paired.abs().max() > 1e-4


def test_an_image_that_is_paired_with_itself_changes_nothing():
    net = branch_net().train()
    image = torch.randn(2, 3, 64, 64)
    image[1] = image[0]
    scores = net(image)
    torch.testing.assert_close(scores[2], scores[0], atol=1e-5, rtol=0)


def test_deits_weights_load_and_the_other_branches_keep_their_initial_values():
    deit, net = (build(name, num_classes=3, depths=(2,)) for name in ("deit_tiny", "dcal_tiny"))
    before = net.local_block.q.weight.clone()
    state = deit.state_dict()
    state["head_local.weight"], state["head_local.bias"] = state["head.weight"], state["head.bias"]
    load_weights(net, state)
    assert torch.equal(net.local_block.q.weight, before)
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        features = net.eval().forward_features(x)
        torch.testing.assert_close(net.head(features[:, 0]), deit.eval()(x), atol=1e-5, rtol=0)


def test_weights_of_a_run_load_without_its_uncertainty():
    trained, net = branch_net(), build("dcal_tiny", num_classes=3, depths=(2,), img_size=64)
    assert load_weights(net, trained.state_dict()).dropped == ["uncertainty"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"local": 0.0},
        {"local": 1.5},
        {"mixers": "agent"},
        {"mixers": {"name": "full", "diversity": 2.0}},
        {"class_token": False},
    ],
)
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=r"local must be a share|DCAL needs full attention"):
        build("dcal_tiny", num_classes=3, depths=(1,), **arguments)
