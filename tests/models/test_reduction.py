"""Token reductions in ViT-shaped nets, ours and timm's: definitions in loops, special cases, maps, weights, copies."""

import copy
import math
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import DenseBackbone, complexity, load_weights
from models.factory import build
from models.reduction import list_reductions
from models.reduction.groups import Groups
from models.reduction.registry import Attended, create_reduction
from models.reduction.tome import match
from models.reference import load_vector
from tests.vectors import VECTOR_FILES
from tests.vectors.comparison import assert_reproduces
from tests.vectors.kinds import Net, classes

# Name of a net -> arguments; all take images of 45 x 70 pixels, of 3 x 5 tokens.
NETS: dict[str, dict[str, Any]] = {
    "deit_tiny": {"depths": (4,), "dim": 32, "heads": 2, "patch": 15},
    "deit_tiny_distilled": {"depths": (4,), "dim": 32, "heads": 2, "patch": 15},
    "lvvit_tiny": {"depths": (4,), "dim": 32, "heads": 2, "patch": 14},
    "test_vit": {
        "img_size": (45, 70), "patch_size": (15, 14), "depth": 4, "embed_dim": 32, "num_heads": 2, "init_values": 0.1,
    },
}  # fmt: skip
SIZE = (45, 70)


def make(name: str, reduction: Any = None, **arguments: Any) -> Any:
    """Build a net with random weights, such that its tokens differ much."""
    torch.manual_seed(0)
    net: Any = build(name, num_classes=3, reduction=reduction, **{**NETS[name], **arguments})
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class ReducedNet(Net):
    """A net with a reduction, of the project's factory."""

    def build(self, vector):
        return build(self.name, num_classes=classes(vector), **self.arguments)


@pytest.mark.parametrize(
    ("vector", "net"),
    [
        ("evit__deit_s_k70_fuse", ReducedNet("deit_small", {"reduction": "evit"})),
        pytest.param(
            "evit__deit_s_k70",
            ReducedNet("vit_small_patch16_224", {"reduction": {"name": "evit", "fuse": False}}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_evits_vectors_hold_for_other_nets_with_its_reduction(vector, net):
    assert_reproduces(net, load_vector(VECTOR_FILES[vector]))


def block_outputs(net: Any, x: Tensor) -> list[Tensor]:
    """Return the output of each block in a forward pass."""
    outputs: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, args, out: outputs.append(out)) for block in net.blocks]
    net(x)
    for hook in hooks:
        hook.remove()
    return outputs


def attend(block: Any, x: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply the attention of a block of DeiT to one image's tokens (N, C), of which key j counts `sizes[j]` times.

    Returns:
        The tokens after the attention, the attention of the first token (heads, N), the heads' outputs (heads, N, D),
        and the mean of the keys over the heads (N, D).
    """
    mixer = block.mixer
    q, k, v = mixer.qkv(block.norm1(x)).unflatten(-1, (3, mixer.num_heads, -1)).permute(1, 2, 0, 3)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).exp() * torch.tensor(sizes)
    weights = weights / weights.sum(-1, keepdim=True)
    out = weights @ v
    mixed = x + mixer.proj(torch.cat(list(out), dim=-1))
    return mixed, weights[:, 0], out, k.mean(0)


def reduce_in_loops(net: Any, image: Tensor, name: str, keep: Any) -> Tensor:
    """Run a DeiT of four blocks with one extra token on one image; return the final class token, by definition."""
    x = net.embed(image[None])[0][0]
    total, sizes = len(x) - 1, [1] * len(x)
    for i, block in enumerate(net.blocks):
        mixed, seen, out, keys = attend(block, x, sizes)
        n, number, chosen = len(x) - 1, 0, []
        if name == "tome":
            left = total - round((1 - keep) * total * (i + 1) / 4)
            mixed, sizes = merge_in_loops(mixed, keys, sizes, min(n - left, n // 2))
        if name == "evit" and i:
            score = seen.mean(0)[1:]
            order = sorted(range(n), key=lambda j: -score[j])
            number = math.ceil(keep * n)
            fused = torch.stack([score[j] * mixed[1 + j] for j in order[number:]]).sum(0)
            mixed = torch.stack([mixed[0], *(mixed[1 + j] for j in order[:number]), fused])
            sizes = [1] * len(mixed)
        x = mixed + block.mlp(block.norm2(mixed))
        if name == "eet" and i < 3:
            norms = out.norm(dim=-1)
            shares = norms / (norms.sum(0) + 1e-8)
            chosen = [sum(seen[h, j] * shares[h, j] for h in range(2)) for j in range(1, n + 1)]
            number = max(int(keep[i] * total), 1)
        if name == "sparsifiner" and i:
            chosen, number = list(seen.mean(0)[1:]), math.ceil(keep**i * total)
        if chosen:
            order = sorted(range(n), key=lambda j: -chosen[j])
            x = torch.stack([x[0], *(x[1 + j] for j in order[:number])])
            sizes = [1] * len(x)
    return net.norm(x)[0]


def merge_in_loops(x: Tensor, keys: Tensor, sizes: list[int], number: int) -> tuple[Tensor, list[int]]:
    """Merge tokens (N, C), of which the first is the class token, as the paper defines bipartite soft matching."""
    first, second = range(2, len(x), 2), range(1, len(x), 2)
    pairs = []
    for i in first:
        similar = [float(keys[i] @ keys[j] / keys[i].norm() / keys[j].norm()) for j in second]
        pairs.append((max(similar), i, second[similar.index(max(similar))]))
    merged = {i: j for _, i, j in sorted(pairs, reverse=True)[:number]}
    tokens, counts = [x[0]], [1]
    for i in [*(i for i in first if i not in merged), *second]:
        members = [i, *(j for j, partner in merged.items() if partner == i)]
        counts.append(sum(sizes[j] for j in members))
        tokens.append(torch.stack([sizes[j] * x[j] for j in members]).sum(0) / counts[-1])
    return torch.stack(tokens), counts


@pytest.mark.parametrize(
    ("name", "keep"), [("tome", 0.3), ("evit", 0.6), ("eet", (0.7, 0.4, 0.0625)), ("sparsifiner", 0.6)]
)
@torch.no_grad()
def test_a_reduction_is_what_its_definition_says(name, keep):
    net = make("deit_tiny", {"name": name, "keep": keep}).double().eval()
    x = images().double()
    expected = torch.stack([reduce_in_loops(net, image, name, keep) for image in x])
    torch.testing.assert_close(net.forward_features(x)[:, 0], expected, rtol=1e-10, atol=1e-10)
    plain = make("deit_tiny").double().eval()
    assert (plain.forward_features(x)[:, 0] - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("n", "extra"), [(9, 0), (9, 1), (10, 2), (1, 1), (2, 0)])
def test_a_matching_is_a_partition_that_keeps_the_authors_order(n, extra):
    """Each token goes to one group; with a class token, the tokens of the first set that stay keep their order."""
    keys = torch.randn(2, n, 4, dtype=torch.float64)
    targets, sources = match(keys, extra, n // 2)
    assert sources.shape == (2, n - n // 2)
    for groups, homes in zip(targets.tolist(), sources.tolist(), strict=True):
        assert sorted(set(groups)) == list(range(n - n // 2))
        assert [groups[home] for home in homes] == list(range(n - n // 2))
        stay = [home for home in homes if (home + extra) % 2 == 0]
        assert homes == stay + [j for j in range(n) if (j + extra) % 2]
        assert not extra or stay == sorted(stay)


def test_merged_groups_hold_all_tokens():
    """Over all blocks, the sizes of the groups sum to the number of tokens, and a token is the mean of its group."""
    values = torch.randn(2, 15, 3, dtype=torch.float64)
    reduction, x, groups = create_reduction({"name": "tome", "r": 4}, 0, 4), values, Groups.of_one(values)
    for number, left in enumerate([11, 7, 4, 2]):
        keys = torch.randn(2, 1, 1 + x.shape[1], 4, dtype=torch.float64)
        step = reduction.reduce(x, Attended(keys, keys, keys, 1.0, 1), groups, number)
        x, groups = step.tokens, groups.after(step)
        counts = groups.counts()
        assert x.shape[1] == left and counts.sum(1).tolist() == [15, 15]
        for b in range(2):
            for j in range(left):
                members = groups.owner[b] == j
                assert counts[b, j] == members.sum() and members[groups.home[b, j]]
                torch.testing.assert_close(x[b, j], values[b, members].mean(0))


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_special_cases(name):
    """Without reduction the net is bit for bit itself; merging equal tokens changes nothing if sizes are counted."""
    plain, x = make(name).eval(), images()
    for nothing in ("none", {"name": "tome", "r": 0}, {"name": "tome", "keep": 1}, {"name": "evit", "keep": 1}):
        assert torch.equal(make(name, nothing).eval()(x), plain(x))
    outputs = {}
    for proportional in (None, True, False):
        reduction = None if proportional is None else {"name": "tome", "r": 3, "proportional": proportional}
        net = make(name, reduction).eval()
        net.pos_embed.data.zero_()
        # Constant images, of the positions of whole patches
        outputs[proportional] = net(torch.ones(1, 3, *(45, 75) if name == "deit_tiny" else SIZE))
    if name in ("deit_tiny", "test_vit"):
        torch.testing.assert_close(outputs[True], outputs[None], rtol=1e-4, atol=1e-5)
        assert (outputs[False] - outputs[None]).abs().max() > 1e-3


@pytest.mark.parametrize("reduction", list_reductions())
@pytest.mark.parametrize("name", NETS)
def test_every_parameter_has_a_gradient(name, reduction):
    net = make(name, reduction)
    assert len(block_outputs(net, images())) == 4
    net(images()).square().sum().backward()
    assert not [key for key, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    grads = {key: p.grad.clone() for key, p in net.named_parameters()}
    net.zero_grad()
    net.set_grad_checkpointing()
    net(images()).square().sum().backward()
    for key, p in net.named_parameters():
        torch.testing.assert_close(p.grad, grads[key], rtol=1e-3, atol=1e-4)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert net.eval()(images(1)).isfinite().all()


@pytest.mark.parametrize("reduction", list_reductions())
@pytest.mark.parametrize("name", ["deit_tiny", "test_vit"])
@torch.no_grad()
def test_weights_load_and_copies_compute_the_same(name, reduction):
    net, x = make(name, reduction).eval(), images()
    report = load_weights(make(name, reduction), make(name).state_dict())
    assert not report.missing and set(net.state_dict()) == set(make(name).state_dict())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    for twin in (net, copied):
        features, maps = twin.forward_intermediates(x)
        torch.testing.assert_close(features, net.forward_features(x), rtol=1e-4, atol=1e-5)
        assert [m.shape for m in maps] == [(2, 32, 3, 5)] * 4
    copied.blocks[-1].mlp.fc2.bias.data.add_(1)
    assert not torch.allclose(copied.forward_intermediates(x)[1][-1], net.forward_intermediates(x)[1][-1])


@pytest.mark.parametrize(
    ("reduction", "left"),
    [
        ({"name": "tome", "r": 6}, 9),
        ({"name": "evit", "keep": 0.5}, 9),
        ({"name": "evit", "keep": 0.5, "fuse": False}, 8),
        ({"name": "eet", "keep": 0.5}, 7),
        ({"name": "sparsifiner", "keep": 0.5}, 8),
    ],
)
@torch.no_grad()
def test_maps_have_all_tokens(reduction, left):
    """Block 1 reduces: a merged token has the value of its group's token, and a dropped token keeps its value."""
    plain, net, x = make("deit_tiny").eval(), make("deit_tiny", reduction | {"reduce_at": [1]}).eval(), images()
    tokens = [t[:, 1:] for t in block_outputs(net, x)[1:3]]
    maps = [m.flatten(2).transpose(1, 2) for m in net.forward_intermediates(x, intermediates_only=True)]
    expected = [m.flatten(2).transpose(1, 2) for m in plain.forward_intermediates(x, intermediates_only=True)]
    torch.testing.assert_close(maps[0], expected[0])
    drops_at_the_end = reduction["name"] in ("eet", "sparsifiner")
    assert torch.allclose(maps[1], expected[1], atol=1e-4) == drops_at_the_end
    for i, own in enumerate(tokens, start=1):
        same = torch.isclose(maps[i][:, :, None], own[:, None], atol=1e-4).all(-1)
        assert own.shape[1] == left and same.any(1).all()
        merges = reduction["name"] == "tome" or (reduction["name"] == "evit" and reduction.get("fuse", True))
        assert same.any(2).sum(1).tolist() == [15 if merges else left] * 2
    stay = torch.isclose(maps[1], maps[2], atol=1e-5).all(-1) & torch.isclose(maps[2], maps[3], atol=1e-5).all(-1)
    assert stay.sum(1).tolist() == [0 if merges else 15 - left] * 2


@pytest.mark.parametrize(
    ("name", "reduction"), [("deit_tiny", "tome"), ("deit_tiny", "evit"), ("deit_tiny", "eet"), ("test_vit", "tome")]
)
def test_dense_features(name, reduction):
    arguments = {key: value for key, value in NETS[name].items() if key not in ("img_size", "patch", "patch_size")}
    net = DenseBackbone(name, reduction=reduction, simple_pyramid=True, **arguments)
    maps = net(torch.randn(2, 3, 90, 70))
    assert [m.shape[1:] for m in maps] == [(8, 23, 18), (16, 12, 9), (32, 6, 5), (32, 3, 3)]
    torch.cat([m.flatten() for m in maps]).square().sum().backward()
    trained = {key: p for key, p in net.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None and p.grad.any() for p in trained.values())


def test_macs_are_those_of_the_reduced_net():
    """A block's MACs: 12 C C for each token it ends with or begins with, and 2 C for each pair of tokens."""
    name, (C, n) = "deit_tiny", (32, 15)
    plain = complexity(make(name), SIZE)[1]
    full = 4 * (12 * C * C * (n + 1) + 2 * C * (n + 1) ** 2)
    for reduction, before, after in (
        ({"name": "tome", "r": 3}, [15, 12, 9, 6], [12, 9, 6, 3]),
        ({"name": "evit", "keep": 0.5}, [15, 15, 9, 6], [15, 9, 6, 4]),
        ({"name": "sparsifiner", "keep": 0.5}, [15, 15, 8, 4], [15, 15, 8, 4]),
    ):
        macs = 0
        for b, a in zip(before, after, strict=True):
            macs += 4 * C * C * (b + 1) + 2 * C * (b + 1) ** 2 + 8 * C * C * (a + 1)
        # Choosing the tokens costs a few more products: the class token's row, or the similarities of the keys.
        saved = plain - complexity(make(name, reduction), SIZE)[1]
        assert 0 <= full - macs - saved <= 3 * C * (n + 1) + 4 * (n * n) * C // 8


@torch.no_grad()
def test_gates_and_a_reduction_together():
    net, x = make("deit_tiny", "tome", gates="se").eval(), images()
    assert net(x).shape == (2, 3) and net.forward_intermediates(x, intermediates_only=True)[-1].shape == (2, 32, 3, 5)
    assert not torch.allclose(net(x), make("deit_tiny", "tome").eval()(x))


@torch.no_grad()
def test_blocks_of_other_ops_come_first():
    mixers = [["agent", "agent", "full", "full"]]
    net = make("deit_tiny", {"name": "tome", "keep": 0.4}, mixers=mixers).eval()
    assert [t.shape[1] for t in block_outputs(net, images())] == [16, 16, 12, 16]
    # Blocks of the paper's net with spectral gating come first too.
    spectral: Any = build("spectformer_xsmall", depths=(6,), dim=32, heads=2, reduction="tome").eval()
    assert [t.shape[1] for t in block_outputs(spectral, torch.randn(1, 3, 64, 64))][3:] == [16, 12, 16]
    with pytest.raises(ValueError, match=r"indices of blocks from 2 to 3, which have full attention, not \[1\]"):
        make("deit_tiny", {"name": "tome", "reduce_at": [1]}, mixers=mixers)


@pytest.mark.parametrize(
    ("name", "reduction", "message"),
    [
        ("swin_nano", "tome", "Swin takes no reduction: its tokens must stay a map"),
        ("resnet18", "evit", "ResNet takes no reduction"),
        ("fan_tiny", "tome", "FAN takes no reduction: its last block must be a ViT's"),
        ("evit_small", "tome", "EViT takes no reduction: its last block"),
        ("deit_tiny", "tomee", "no reduction is called 'tomee'. Did you mean 'tome'"),
        ("deit_tiny", {"name": "tome", "q": 1}, "reduction 'tome' takes no 'q'.*It takes: keep, r, proportional"),
        ("deit_tiny", {"r": 1}, "reduction must be a name or a mapping with a 'name'"),
        ("deit_tiny", {"name": "tome", "r": 1.5}, "r must be a number of tokens of at least 0, not 1.5"),
        ("deit_tiny", {"name": "evit", "keep": 0}, "keep must be a share of the tokens above 0 and at most 1, not 0"),
        ("deit_tiny", {"name": "evit", "reduce_at": [12]}, "indices of blocks from 0 to 11, not .12."),
        ("deit_tiny", {"name": "eet", "keep": [0.2, 0.5, 0.1]}, "keep must be a falling share for each of the blocks"),
        ("vit_base_patch16_siglip_224", "evit", "evit needs a class token, which VisionTransformer does not have"),
    ],
)
def test_what_cannot_be_is_refused(name, reduction, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        build(name, reduction=reduction)
