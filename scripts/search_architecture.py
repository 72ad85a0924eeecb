"""Search the best architecture of a trained supernet within a budget of multiply-accumulates (MACs).

    python train.py task=supernet model=vit_resnas_supernet                      # a supernet, on the digits
    python scripts/search_architecture.py run=RUN budget_macs=3.5e6 population=60 parents=15 children=15 generations=8

The first generation is random, the others are mutations and crossovers of the best candidates (ViT-ResNAS,
arXiv:2109.00642; the defaults are the paper's). Candidates are judged with the supernet's weights by the training
images that the supernet's run has held out. <run>/architectures/<budget>-s<seed>/ gets candidates.csv with each
candidate, and best.yaml. The same command resumes a search, and more generations extend it. docs/architecture_search.md
explains the whole way. Hyper-parameters are searched by scripts/search.py.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from retinue.benchmarks.timing import pick_device
from retinue.results.architecture_search import ArchitectureSearch, SupernetRun
from retinue.results.evolution import Evolution
from retinue.runs.config import register_resolvers
from retinue.utils import command_line
from retinue.utils.errors import user_errors
from retinue.utils.paths import CONF


class Options(command_line.Options):
    run: Path = Field(description="folder of a finished run of task=supernet")
    budget_macs: float = Field(gt=0, description="maximum MACs for one image; candidates have at least 97.5 % of it")
    generations: int = Field(20, ge=1, description="number of generations; the first is random")
    population: int = Field(500, ge=1, description="architectures in the first generation")
    parents: int = Field(75, ge=1, description="best candidates that the next generation descends from")
    children: int = Field(75, ge=1, description="mutations, and crossovers, in each further generation")
    mutation_rate: float = Field(0.3, gt=0, le=1, description="probability that a mutation draws a size anew")
    seed: int = Field(0, ge=0, description="seed of the search")
    folder: Path | None = Field(None, description="folder of the search; null: one in the run's folder")
    device: str = Field("auto", description="auto, cpu or cuda")


def main(arguments: Sequence[str] | None = None) -> None:
    options = Options.parse(arguments)
    register_resolvers()
    run = SupernetRun(options.run, pick_device(options.device))
    budget = round(options.budget_macs)
    evolution = Evolution(run.space, run.macs, budget, options.mutation_rate)
    folder = options.folder or options.run / "architectures" / f"{budget}-s{options.seed}"
    search = ArchitectureSearch(
        run, folder, evolution, generations=options.generations, population=options.population,
        parents=options.parents, children=options.children, seed=options.seed,
    )  # fmt: skip
    best = None
    for generation, ranked in enumerate(search.go()):
        best = ranked[0]
        print(
            f"generation {generation}: {len(ranked)} candidates, best top1 {best.top1:.4f} with {best.macs:,} MACs and "
            f"{best.params:,} parameters", flush=True,
        )  # fmt: skip
    assert best is not None
    print(f"best: python train.py {shlex.join(search.train_overrides(best))}")
    print(folder)


if __name__ == "__main__":
    with user_errors(CONF, "train"):
        main()
