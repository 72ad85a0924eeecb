"""Evolution stays within the budget and the space."""

import numpy as np
import pytest
from yaml import safe_load

from models.supernets.vit_resnas_space import Cost, expressed, largest, read_space, smallest
from retinue.results.evolution import LOWEST_SHARE, Evolution, draw_new
from retinue.utils.paths import CONF
from tests.models.supernets.test_vit_resnas import SPACE

NANO = read_space(safe_load((CONF / "model/vit_resnas_supernet.yaml").read_text())["sizes"]["nano"]["space"])
COST = Cost((32, 32), 3, 10, 12, 1)
BUDGET = 4_000_000


@pytest.fixture
def evolution():
    return Evolution(NANO, lambda architecture: COST.macs(NANO, architecture), BUDGET)


def assert_allowed(architectures):
    for architecture in architectures:
        assert LOWEST_SHARE * BUDGET <= COST.macs(NANO, architecture) <= BUDGET
        for stage, genes in zip(NANO, architecture, strict=True):
            assert genes.dim in stage.dims
            assert set(genes.heads) <= set(stage.heads) and set(genes.hidden) <= set(stage.hidden)
            assert all(kept or removable for kept, removable in zip(genes.kept, stage.removable, strict=True))


def test_no_candidate_leaves_the_budget_or_the_space_or_comes_twice(evolution):
    rng = np.random.default_rng(0)
    known = draw_new(lambda: evolution.random(rng), 40, [])
    for _ in range(3):
        known += evolution.next_generation(known[::-1], 15, 10, rng)
    assert len(known) == 40 + 3 * 30
    assert len({expressed(architecture) for architecture in known}) == len(known)
    assert_allowed(known)
    for field in ("dim", "heads", "hidden", "kept"):
        assert len({getattr(architecture[0], field) for architecture in known}) > 1


def test_a_mutation_changes_a_share_of_the_sizes_and_a_crossover_takes_the_parents(evolution):
    rng = np.random.default_rng(0)
    one, other = (evolution.random(rng) for _ in range(2))
    child = evolution.cross(one, other, rng)
    for genes, a, b in zip(child, one, other, strict=True):
        assert genes.dim in (a.dim, b.dim)
        assert all(value in pair for value, *pair in zip(genes.heads, a.heads, b.heads, strict=True))
    rare = Evolution(NANO, evolution.macs, BUDGET, mutation_rate=0.02)

    def changes(strategy):
        children = [strategy.mutate(one, rng) for _ in range(30)]
        stages = [pair for child in children for pair in zip(child, one, strict=True)]
        return sum(a != b for new, old in stages for a, b in zip(new.hidden, old.hidden, strict=True))

    assert changes(rare) < changes(evolution)


def test_a_small_space_gives_fewer_candidates():
    space = read_space(SPACE)
    cost = Cost((56, 56), 3, 5, 0, 1)
    evolution = Evolution(space, lambda architecture: cost.macs(space, architecture), cost.macs(space, largest(space)))
    rng = np.random.default_rng(0)
    drawn = draw_new(lambda: evolution.random(rng), 500, [])
    assert 0 < len(drawn) < 500


def test_a_budget_outside_the_space_is_refused(evolution):
    least, most = (evolution.macs(edge(NANO)) for edge in (smallest, largest))
    for budget in (least - 1, 2 * most):
        with pytest.raises(ValueError, match=f"budget_macs must be from {least} to {most}"):
            Evolution(NANO, evolution.macs, budget)
