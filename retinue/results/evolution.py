"""Evolution of architectures under a budget of multiply-accumulates, as ViT-ResNAS searches (2021, arXiv:2109.00642).

Written after the paper and what the authors' repository, yilunliao/vit-search, computes; none of its code is here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.supernets.vit_resnas_space import KEEP, Architecture, Genes, Space, expressed, largest, smallest

# Share of the budget that an architecture uses at least.
LOWEST_SHARE = 0.975
# Number of attempts after which drawing is given up.
MAX_ATTEMPTS = 20_000
# Number of reductions of heads and hidden channels after which channels and blocks are reduced too.
NARROW_FIRST = 100


@dataclass(frozen=True)
class Evolution:
    """Random architectures, mutation and crossover, all within a budget.

    Args:
        space: Choices of each stage.
        macs: Function that returns the multiply-accumulates of an architecture.
        budget: Maximum number of multiply-accumulates; an architecture has at least `LOWEST_SHARE` of it.
        mutation_rate: Probability that a choice is drawn anew in a mutation.

    Raises:
        ValueError: The space has no architecture in the budget.
    """

    space: Space
    macs: Callable[[Architecture], int]
    budget: int
    mutation_rate: float = 0.3

    def __post_init__(self) -> None:
        least, most = self.macs(smallest(self.space)), self.macs(largest(self.space))
        if not least <= self.budget or self.budget * LOWEST_SHARE > most:
            raise ValueError(f"budget_macs must be from {least} to {most}, which the space has, not {self.budget}")

    def is_within(self, architecture: Architecture) -> bool:
        """Tell whether an architecture is within the budget and uses at least `LOWEST_SHARE` of it."""
        return LOWEST_SHARE * self.budget <= self.macs(architecture) <= self.budget

    def random(self, rng: np.random.Generator) -> Architecture:
        """Draw channels and blocks, then reduce heads and hidden channels at random until the budget is met."""

        def attempt() -> Architecture:
            architecture = tuple(
                genes._replace(dim=int(rng.choice(stage.dims)), kept=_draw_kept(stage.removable, rng))
                for stage, genes in zip(self.space, largest(self.space), strict=True)
            )
            reductions = 0
            while self.macs(architecture) > self.budget:
                architecture = self._reduce(architecture, rng, all_sizes=reductions >= NARROW_FIRST)
                reductions += 1
            return architecture

        return self._first_within(attempt)

    def mutate(self, parent: Architecture, rng: np.random.Generator) -> Architecture:
        """Draw each choice anew with probability `mutation_rate`; a removable block is left out or returns."""

        def is_drawn() -> bool:
            return rng.random() <= self.mutation_rate

        def attempt() -> Architecture:
            child = []
            for stage, genes in zip(self.space, parent, strict=True):
                child.append(
                    Genes(
                        int(rng.choice(stage.dims)) if is_drawn() else genes.dim,
                        tuple(int(rng.choice(stage.heads)) if is_drawn() else old for old in genes.heads),
                        tuple(int(rng.choice(stage.hidden)) if is_drawn() else old for old in genes.hidden),
                        tuple(
                            old ^ (removable and is_drawn())
                            for old, removable in zip(genes.kept, stage.removable, strict=True)
                        ),
                    )
                )
            return tuple(child)

        return self._first_within(attempt)

    def cross(self, one: Architecture, other: Architecture, rng: np.random.Generator) -> Architecture:
        """Take each choice from one of two architectures, which are equally probable."""

        def either(a, b):
            return b if rng.random() <= 0.5 else a

        def attempt() -> Architecture:
            return tuple(
                Genes(
                    either(a.dim, b.dim),
                    tuple(map(either, a.heads, b.heads)),
                    tuple(map(either, a.hidden, b.hidden)),
                    tuple(map(either, a.kept, b.kept)),
                )
                for a, b in zip(one, other, strict=True)
            )

        return self._first_within(attempt)

    def next_generation(
        self, ranked: Sequence[Architecture], size: int, parents: int, rng: np.random.Generator
    ) -> list[Architecture]:
        """Return new architectures: `size` mutations and `size` crossovers of the best, fewer if the space is small.

        Args:
            ranked: All architectures so far, the best first.
            size: Number of mutations, and of crossovers.
            parents: Number of the best that are parents.
            rng: Generator that draws.
        """
        best = ranked[:parents]

        def mutation() -> Architecture:
            return self.mutate(best[int(rng.integers(len(best)))], rng)

        def crossover() -> Architecture:
            one, other = rng.choice(len(best), 2, replace=False)
            return self.cross(best[one], best[other], rng)

        mutations = draw_new(mutation, size, ranked)
        return mutations + draw_new(crossover, size if len(best) > 1 else 0, [*ranked, *mutations])

    def _first_within(self, attempt: Callable[[], Architecture]) -> Architecture:
        for _ in range(MAX_ATTEMPTS):
            architecture = attempt()
            if self.is_within(architecture):
                return architecture
        raise ValueError(
            f"no architecture with {LOWEST_SHARE * self.budget:.0f} to {self.budget} MACs in {MAX_ATTEMPTS} attempts: "
            "choose another budget_macs"
        )

    def _reduce(self, architecture: Architecture, rng: np.random.Generator, all_sizes: bool) -> Architecture:
        """Reduce one size of the architecture, drawn at random, to the next smaller choice.

        Args:
            architecture: The architecture.
            rng: Generator that draws.
            all_sizes: Also reduce channels and leave out blocks, not only heads and hidden channels.
        """
        sizes = [(i, j) for i, stage in enumerate(self.space) for j in range(-all_sizes, len(stage.removable))]
        i, j = sizes[rng.integers(len(sizes))]
        stage, genes = self.space[i], architecture[i]
        if j < 0:
            genes = genes._replace(dim=_next_smaller(stage.dims, genes.dim))
        else:
            kind = rng.integers(3 if all_sizes and stage.removable[j] else 2)
            if kind == 0:
                genes = genes._replace(heads=_replaced(genes.heads, j, _next_smaller(stage.heads, genes.heads[j])))
            elif kind == 1:
                genes = genes._replace(hidden=_replaced(genes.hidden, j, _next_smaller(stage.hidden, genes.hidden[j])))
            else:
                genes = genes._replace(kept=_replaced(genes.kept, j, genes.kept[j] and bool(rng.choice(KEEP))))
        return _replaced(architecture, i, genes)


def draw_new(draw: Callable[[], Architecture], count: int, known: Sequence[Architecture]) -> list[Architecture]:
    """Return `count` architectures that `draw` returns, all different and none of them known.

    After `NARROW_FIRST` repetitions in a row there are fewer.
    """
    seen = {expressed(architecture) for architecture in known}
    drawn: list[Architecture] = []
    repetitions = 0
    while len(drawn) < count and repetitions < NARROW_FIRST:
        architecture = draw()
        if expressed(architecture) in seen:
            repetitions += 1
            continue
        seen.add(expressed(architecture))
        drawn.append(architecture)
        repetitions = 0
    return drawn


def _draw_kept(removable: Sequence[bool], rng: np.random.Generator) -> tuple[bool, ...]:
    return tuple(not may_go or bool(rng.choice(KEEP)) for may_go in removable)


def _next_smaller(choices: Sequence[int], value: int) -> int:
    return next((choice for choice in choices if choice < value), value)


def _replaced(values: tuple, index: int, value: Any) -> tuple:
    return (*values[:index], value, *values[index + 1 :])
