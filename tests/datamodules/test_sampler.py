"""Samplers: order, groups, repeats, ranks and resumption."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from datamodules.sampler import EvalSampler, TrainSampler, draw_balanced, draw_copies, repeat_factors


def indices(sampler):
    return [plan.index for plan in sampler]


@pytest.mark.parametrize("repeats", [1, 3])
def test_two_ranks_take_the_samples_of_one_process_with_twice_the_batch(repeats):
    single = TrainSampler(103, 8, seed=5, repeats=repeats)
    ranks = [TrainSampler(103, 4, seed=5, repeats=repeats, rank=rank, world_size=2) for rank in range(2)]
    for sampler in (single, *ranks):
        sampler.set_epoch(2)
    assert len(single) == len(ranks[0]) == 103 // 8
    for whole, *parts in zip(single, *ranks, strict=True):
        pairs = sorted(zip(whole.index, whole.copy, strict=True))
        assert pairs == sorted(pair for part in parts for pair in zip(part.index, part.copy, strict=True))
        assert whole.key == parts[0].key == (5, 2)
        assert parts[0].seed != parts[1].seed


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = TrainSampler(50, 10, seed=seed)
        sampler.set_epoch(epoch)
        return indices(sampler), [plan.seed for plan in sampler]

    assert order(0, 0) == order(0, 0)
    assert len({str(order(seed, epoch)) for seed in range(2) for epoch in range(2)}) == 4
    first, seeds = order(3, 1)
    assert sorted(itertools.chain(*first)) == list(range(50))
    assert len(set(seeds)) == 5


def test_a_global_batch_holds_one_group_except_at_the_end_of_an_epoch():
    groups = np.random.default_rng(0).random(203) < 0.3
    ungrouped, grouped = TrainSampler(203, 10), TrainSampler(203, 10, groups=groups)
    mixed = [len({bool(groups[i]) for i in index}) == 2 for index in indices(grouped)]
    assert len(mixed) == len(ungrouped) == 20 and not any(mixed[:-1])
    assert sum(len({bool(groups[i]) for i in index}) == 2 for index in indices(ungrouped)) > 10
    order = list(itertools.chain(*indices(grouped)))
    assert len(set(order)) == len(order) == 200
    batch_groups = [bool(groups[index[0]]) for index in indices(grouped)[:-1]]
    # Batches of both groups alternate; one group does not come after the other.
    assert len(set(batch_groups[:8])) == len(set(batch_groups[-8:])) == 2
    ranks = [TrainSampler(203, 5, groups=groups, rank=rank, world_size=2) for rank in range(2)]
    for whole, *parts in zip(indices(grouped), *map(indices, ranks), strict=True):
        assert sorted(whole) == sorted(itertools.chain(*parts))
    assert indices(TrainSampler(203, 10, groups=np.zeros(203))) == indices(ungrouped)


def test_repeats_keep_the_number_of_steps_and_go_to_different_ranks():
    ranks = [TrainSampler(96, 4, repeats=3, rank=rank, world_size=3) for rank in range(3)]
    assert len(ranks[0]) == len(TrainSampler(96, 4, rank=0, world_size=3)) == 8
    for plans in zip(*ranks, strict=True):
        for place in range(4):
            # Each rank has one copy of the image.
            assert len({plan.index[place] for plan in plans}) == 1
            assert {plan.copy[place] for plan in plans} == {0, 1, 2}
    # An epoch has a third of the images.
    assert len(set(itertools.chain(*indices(ranks[0])))) == 32


def test_an_incomplete_batch_is_dropped_but_a_small_data_set_makes_one_batch():
    assert [len(index) for index in indices(TrainSampler(29, 10))] == [10, 10]
    assert [len(index) for index in indices(TrainSampler(7, 10))] == [7]
    assert [len(index) for index in indices(TrainSampler(7, 10, rank=1, world_size=2))] == [3]
    with pytest.raises(ValueError, match="2 training images cannot be shared among 3 processes"):
        TrainSampler(2, 10, world_size=3)


def test_resuming():
    sampler, fresh = TrainSampler(40, 4, seed=1), TrainSampler(40, 4, seed=1)
    fresh.set_epoch(3)
    whole = list(fresh)
    sampler.load_state_dict({"epoch": 3, "batches": 7})
    # Epoch 3 is being resumed.
    sampler.set_epoch(3)
    assert sampler.state_dict() == {"epoch": 3, "batches": 7}
    assert list(sampler) == whole[7:]
    assert list(sampler) == whole
    sampler.load_state_dict({"epoch": 2, "batches": 10})
    # Epoch 2 was complete, so epoch 3 starts at its first batch.
    sampler.set_epoch(3)
    assert sampler.state_dict() == {"epoch": 3, "batches": 0}
    assert list(sampler) == whole


@pytest.mark.parametrize("length, batch_size, world_size", [(20, 4, 1), (21, 4, 2), (5, 4, 3), (1, 8, 2), (24, 4, 3)])
def test_evaluation_sees_each_sample_once_on_ranks_of_equal_length(length, batch_size, world_size):
    ranks = [indices(EvalSampler(length, batch_size, rank=r, world_size=world_size)) for r in range(world_size)]
    assert len({tuple(map(len, batches)) for batches in ranks}) == 1
    positions = [i for batches in ranks for batch in batches for i in batch]
    assert sorted(i for i in positions if i >= 0) == list(range(length))
    assert positions.count(-1) < world_size
    assert len(ranks[0]) == len(EvalSampler(length, batch_size, world_size=world_size))


def rare_classes(images=400, seed=0):
    """Return the image and the class of objects; class c is in about a share of 2^-c of the images."""
    rng = np.random.default_rng(seed)
    objects = [(i, c) for i in range(images) for c in range(9) for _ in range(2) if rng.random() < 2.0**-c and c]
    return (*np.array(objects).T, images)


def test_repeat_factors_are_those_of_the_definition_and_of_mmdetection():
    from mmengine.dataset import ClassBalancedDataset

    image, label, images = rare_classes()
    factors = repeat_factors(image, label, images, 0.05)
    classes = [set(label[image == i].tolist()) for i in range(images)]
    share = {c: sum(c in of_image for of_image in classes) / images for c in range(1, 9)}
    loops = [max([1.0, *(math.sqrt(0.05 / share[c]) for c in of_image)]) for of_image in classes]
    np.testing.assert_allclose(factors, loops, rtol=1e-12)
    assert (factors == 1).any() and factors.max() > 1.5

    class Set(list):
        def get_cat_ids(self, index):
            return self[index]

    balanced: Any = SimpleNamespace(dataset=Set(classes))
    theirs = ClassBalancedDataset._get_repeat_factors(balanced, balanced.dataset, 0.05)
    np.testing.assert_allclose(factors, theirs, rtol=1e-12)
    assert repeat_factors(np.zeros(0, int), np.zeros(0, int), 3, 0.05).tolist() == [1, 1, 1]


def test_images_are_drawn_as_often_as_their_factors_say():
    factors = np.array([1.0, 1.25, 2.0, 3.7] * 25)
    rng = np.random.default_rng(0)
    drawn = np.mean([np.bincount(draw_copies(factors, rng), minlength=100) for _ in range(2000)], 0)
    assert (np.bincount(draw_copies(factors, rng), minlength=100)[factors == 2] == 2).all()
    np.testing.assert_allclose(drawn, factors, atol=0.06)

    sampler = TrainSampler(100, 10, factors=factors)
    counts = np.zeros(100)
    for epoch in range(400):
        sampler.set_epoch(epoch)
        plans = list(sampler)
        entries = [pair for plan in plans for pair in zip(plan.index, plan.copy, strict=True)]
        # The copies of an image have different random numbers.
        assert len(entries) == len(set(entries)) == 100
        counts += np.bincount([index for index, _ in entries], minlength=100)
    shares = counts / counts.sum()
    np.testing.assert_allclose(shares, factors / factors.sum(), rtol=0.2)


def test_a_sampler_with_factors_is_resumed_and_shared_as_without():
    image, label, images = rare_classes()
    arguments = {
        "factors": repeat_factors(image, label, images, 0.2), "groups": np.arange(images) % 3 == 0, "seed": 4,
    }  # fmt: skip
    whole = TrainSampler(images, 8, **arguments)
    ranks = [TrainSampler(images, 4, rank=rank, world_size=2, **arguments) for rank in range(2)]
    resumed = TrainSampler(images, 8, **arguments)
    for sampler in (whole, *ranks):
        sampler.set_epoch(3)
    plans = list(whole)
    assert len(plans) == len(TrainSampler(images, 8)) == 50
    for plan, *parts in zip(plans, *ranks, strict=True):
        pairs = sorted(zip(plan.index, plan.copy, strict=True))
        assert pairs == sorted(pair for part in parts for pair in zip(part.index, part.copy, strict=True))
    resumed.load_state_dict({"epoch": 3, "batches": 20})
    assert list(resumed) == plans[20:]
    whole.set_epoch(4)
    assert list(whole) != plans


def test_balanced_draws_have_all_classes_and_the_images_of_a_class_equally_often():
    counts = np.array([60, 30, 0, 7, 3])
    classes = np.random.default_rng(0).permutation(np.arange(5).repeat(counts))
    totals = np.zeros(100)
    sampler = TrainSampler(100, 7, classes=classes, seed=1)
    for epoch in range(200):
        order = draw_balanced(classes, np.random.default_rng(epoch))
        assert len(order) == 100 and np.bincount(classes[order], minlength=5).tolist() == [25, 25, 0, 25, 25]
        of_image = np.bincount(order, minlength=100)
        for label in (0, 1, 3, 4):
            assert np.ptp(of_image[classes == label]) <= 1
        sampler.set_epoch(epoch)
        plans = list(sampler)
        entries = [pair for plan in plans for pair in zip(plan.index, plan.copy, strict=True)]
        # The copies of an image have different random numbers.
        assert len(entries) == len(set(entries)) == 98
        totals += np.bincount([index for index, _ in entries], minlength=100)
    shares = np.bincount(classes, totals, 5) / totals.sum()
    np.testing.assert_allclose(shares, [0.25, 0.25, 0, 0.25, 0.25], atol=0.005)
    # The 60 images of class 0 have 25 places an epoch.
    np.testing.assert_allclose(totals[classes == 0] / 200, 25 / 60, atol=0.12)


@pytest.mark.parametrize("arguments", [{}, {"repeats": 3}])
def test_a_balanced_sampler_is_resumed_and_shared_as_any_other(arguments):
    classes = np.arange(96) % 7 // 3
    whole = TrainSampler(96, 8, classes=classes, seed=4, **arguments)
    ranks = [TrainSampler(96, 4, classes=classes, seed=4, rank=rank, world_size=2, **arguments) for rank in range(2)]
    for sampler in (whole, *ranks):
        sampler.set_epoch(3)
    plans = list(whole)
    for plan, *parts in zip(plans, *ranks, strict=True):
        pairs = sorted(zip(plan.index, plan.copy, strict=True))
        assert pairs == sorted(pair for part in parts for pair in zip(part.index, part.copy, strict=True))
    resumed = TrainSampler(96, 8, classes=classes, seed=4, **arguments)
    resumed.load_state_dict({"epoch": 3, "batches": 5})
    assert list(resumed) == plans[5:]
    whole.set_epoch(4)
    assert list(whole) != plans
