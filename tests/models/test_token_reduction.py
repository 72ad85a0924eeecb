"""EViT and Sparsifiner: token counts that fall by depth, and their special cases."""

from itertools import pairwise

import pytest
import torch

from models import load_weights
from models.reduction.evit import EViTReduction
from ops.losses import loss_weights
from tests.models.test_backbones import build


def test_evit_that_keeps_all_tokens_is_deit():
    deit = build("deit_small", num_classes=3).eval()
    x = torch.randn(2, 3, 64, 80)
    for arguments in ({"keep": 1.0}, {"reduce_at": []}):
        net = build("evit_small", num_classes=3, **arguments).eval()
        load_weights(net, deit.state_dict())
        with torch.inference_mode():
            assert torch.allclose(net(x), deit(x), atol=1e-6)


@pytest.mark.parametrize(("fuse", "counts"), [(True, [20, 11, 7, 5]), (False, [20, 10, 5, 3])])
def test_evits_tokens_become_fewer(fuse, counts):
    net = build("evit_small", num_classes=3, keep=0.5, fuse=fuse).eval()
    found = []
    for block in net.blocks:
        block.register_forward_hook(lambda _, args, out: found.append(out.shape[1] - 1))
    with torch.inference_mode():
        net(torch.randn(2, 3, 64, 80))
    assert found == counts


def test_evit_keeps_the_tokens_that_the_class_token_attends_to():
    reduction, x = EViTReduction(0, 12, keep=0.5), torch.randn(1, 6, 8)
    step = reduction.reorganize(x, torch.tensor([[0.1, 0.4, 0.05, 0.2, 0.15, 0.1]]))
    fused = 0.1 * x[:, 0] + 0.05 * x[:, 2] + 0.1 * x[:, 5]
    assert torch.equal(step.tokens[:, :3], x[:, [1, 3, 4]]) and torch.allclose(step.tokens[:, 3], fused)
    assert step.targets.tolist() == [[3, 0, 3, 1, 2, 3]] and step.sources[0, :3].tolist() == [1, 3, 4]
    assert step.sources[0, 3] in (0, 2, 5)


def test_sparsifiners_pruned_tokens_are_zeros_in_all_later_blocks():
    net = build("sparsifiner_small", num_classes=3, keep_tokens=0.5, prune_at=(1, 2), img_size=64).eval()
    alive = []
    for block in net.blocks:
        block.register_forward_hook(lambda _, args, out: alive.append((out[:, 1:] != 0).any(-1)))
    with torch.inference_mode():
        net(torch.randn(2, 3, 64, 64))
    assert [int(tokens.sum(1).max()) for tokens in alive] == [16, 8, 4, 4]
    assert all((later <= earlier).all() for earlier, later in pairwise(alive))


def test_sparsifiners_phases_train_the_predictors_then_the_rest():
    x, deit = torch.randn(2, 3, 64, 64), build("deit_small", num_classes=3, img_size=64).eval()
    first = build("sparsifiner_small", num_classes=3, img_size=64, phase="predictors").eval()
    missing = load_weights(first, deit.state_dict()).missing
    assert missing and {name for name, p in first.named_parameters() if p.requires_grad} == set(missing)
    scores, losses = first.forward_with_losses(x)
    assert torch.allclose(scores, deit(x), atol=1e-5) and loss_weights(first) == {"connectivity": 0.01}
    losses["connectivity"].backward()
    assert all((p.grad is not None and p.grad.any()) == p.requires_grad for p in first.parameters())

    second = build("sparsifiner_small", num_classes=3, img_size=64, phase="net")
    with pytest.raises(ValueError, match="mask_predictor"):
        load_weights(second, deit.state_dict())
    load_weights(second, first.state_dict())
    second(x).sum().backward()
    assert loss_weights(second) == {} and second.forward_with_losses(x)[1] == {}
    assert {name for name, p in second.named_parameters() if p.grad is None} == set(missing)


def test_token_distillation_leaves_out_pruned_tokens():
    arguments = {"num_classes": 3, "img_size": 64, "keep_tokens": 0.5, "prune_at": (1,)}
    net, x = build("sparsifiner_small", **arguments).eval(), torch.randn(2, 3, 64, 64)
    target = torch.randn(2, 16, 384)
    before = []
    net.norm.register_forward_hook(lambda _, args, out: before.append((args[0][:, 1:], out[:, 1:])))
    _, losses = net.forward_with_losses(x, target)
    squares = [
        (tokens[b, i] - target[b, i]).square().mean()
        for raw, tokens in before
        for b in range(2)
        for i in range(16)
        if raw[b, i].any()
    ]
    assert len(squares) == 16 and torch.allclose(losses["tokens"], torch.stack(squares).mean())
    with pytest.raises(ValueError, match=r"tokens of one shape .B, N, C., not .2, 16, 384. and .2, 15, 384."):
        net.forward_with_losses(x, target[:, 1:])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("evit_small", {"keep": 0.0}, "keep must be a share of the tokens above 0 and at most 1, not 0.0"),
        ("sparsifiner_small", {"phase": "joint"}, "phase must be predictors, net or null, not 'joint'"),
        ("evit_small", {"reduce_at": [4]}, "reduce_at must be indices of blocks from 0 to 3, not .4."),
        (
            "evit_small",
            {"mixers": "agent"},
            "EViT takes no reduction: its last block must be a ViT's",
        ),
        ("sparsifiner_small", {"keep_tokens": 1.5}, "keep_tokens must be a share above 0 and at most 1, not 1.5"),
        ("sparsifiner_small", {"keep_tokens": 0.5, "prune_at": [7]}, "prune_at must be indices of 4 blocks"),
        ("sparsifiner_small", {"keep_tokens": 0.5, "mixers": "full", "prune_at": [1]}, "needs the op sparsifiner"),
    ],
)
def test_wrong_values_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(name, **arguments)
