"""Spherical k-means, and centroids that follow the batches: by definition, on two processes, and after a resume."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from ops import Place, create_op
from ops.clusters import Centroids, nearest_centroids, spherical_step

# Ops with centroids
OPS = ("cluster_routing", "content_aggregation")


def unit_vectors(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)


def test_a_step_sums_the_members_of_all_images_and_keeps_empty_centroids():
    tokens, means = unit_vectors(2, 3, 9, 4), unit_vectors(3, 5, 4, seed=1)
    # Either the first centroid or its opposite is nearer than the last
    means[:, 3], means[:, 4] = -means[:, 0], 0
    expected = means.clone()
    for head in range(3):
        members = [[] for _ in range(5)]
        for token in tokens[:, head].flatten(0, 1):
            members[max(range(5), key=lambda c: (token @ means[head, c]).item())].append(token)
        for c, own in enumerate(members):
            if own:
                expected[head, c] = torch.stack(own).sum(0) / torch.stack(own).sum(0).norm()
        assert not all(members), "the test has no empty centroid"
    assert torch.allclose(spherical_step(tokens, means), expected)


def test_start_places_the_centroids_once_at_fixed_points_of_separate_clusters():
    centres = unit_vectors(2, 3, 8)
    tokens = F.normalize(centres.repeat_interleave(6, dim=1) + 1e-3 * unit_vectors(4, 2, 18, 8, seed=1), dim=-1)
    centroids = Centroids(2, 3, 8).double()
    torch.manual_seed(3)
    centroids.start(tokens)
    means = centroids.means.clone()
    assert centroids.initted and torch.allclose(spherical_step(tokens, means), means)
    assert torch.allclose(means.norm(dim=-1), torch.ones(2, 3, dtype=torch.float64))
    centroids.start(-tokens)
    assert torch.equal(centroids.means, means)
    # Fewer tokens than centroids
    few = Centroids(2, 5, 8).double()
    few.start(tokens[:1, :, :2])
    assert few.means.isfinite().all() and nearest_centroids(tokens, few.means).shape == (4, 2, 18)


def test_centroids_follow_after_the_backward_pass():
    centroids, new = Centroids(5, 4, decay=0.9).double(), unit_vectors(5, 4)
    x = torch.ones(3, requires_grad=True)
    for means, expected in ((new, new), (-new, 0.8 * new)):
        before, y = centroids.means.clone(), 2 * x
        centroids.follow(means, after=y)
        assert torch.equal(centroids.means, before)
        y.sum().backward()
        assert torch.allclose(centroids.means, expected) and centroids.initted
    centroids.follow(new, after=x.detach())
    assert torch.allclose(centroids.means, 0.8 * new)


def train(tokens: torch.Tensor, steps: int = 3) -> tuple[Centroids, torch.Tensor]:
    """Return the centroids after some steps, and the gradient of a loss on the last batch's own centroids."""
    torch.manual_seed(0)
    centroids = Centroids(2, 3, 4).double()
    centroids.start(tokens[0])
    tokens.requires_grad_()
    for step in range(steps):
        own = spherical_step(tokens[step], centroids.means.clone())
        centroids.follow(own, after=own)
        (own**3).sum().backward()
    assert tokens.grad is not None
    return centroids, tokens.grad


def train_op(name: str, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Return the state and the summed gradients of an op after some steps on batches of maps (steps, B, H, W, C)."""
    torch.manual_seed(0)
    op = create_op(name, 8, 2, place=Place(stride=32)).double()
    for step in x:
        op(step).square().sum().backward()
    return op.state_dict(), [p.grad for p in op.parameters() if p.grad is not None]


def work(rank: int, folder: str):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(rank)
    centroids, grad = train(unit_vectors(3, 4, 2, 9, 4)[:, rank::2])
    ops = {name: train_op(name, unit_vectors(2, 4, 7, 7, 8)[:, rank::2]) for name in OPS}
    torch.save((centroids.state_dict(), grad, ops), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    centroids, grad = train(unit_vectors(3, 4, 2, 9, 4))
    written = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for rank, (state, own_grad, _) in enumerate(written):
        assert torch.allclose(state["means"], centroids.means) and state["initted"]
        # Each process has the loss of the common centroids, so the sum of both losses is twice one's
        assert torch.allclose(own_grad, 2 * grad[:, rank::2])
    for name in OPS:
        state, grads = train_op(name, unit_vectors(2, 4, 7, 7, 8))
        (first_state, first_grads), (second_state, second_grads) = (ops[name] for _, _, ops in written)
        for key, value in state.items():
            assert torch.allclose(value, first_state[key]) and torch.equal(first_state[key], second_state[key]), key
        for expected, first, second in zip(grads, first_grads, second_grads, strict=True):
            assert torch.allclose(first + second, expected)


def test_a_loaded_state_goes_on():
    tokens = unit_vectors(3, 4, 2, 9, 4)
    whole, _ = train(tokens.clone())
    resumed = Centroids(2, 3, 4).double()
    resumed.load_state_dict(train(tokens.clone(), steps=2)[0].state_dict())
    resumed.start(tokens[2])
    resumed.average(spherical_step(tokens[2], resumed.means.clone()))
    assert torch.equal(resumed.means, whole.means)
