"""Compare the nets that an architecture search finds with random nets of the same budget, on the digits.

    python scripts/compare_architectures.py                     # three seeds, 20 random nets each: about 20 CPU minutes
    python scripts/compare_architectures.py seeds=0 random=4 epochs=3 supernet_epochs=10

For each seed a supernet is trained and searched, and then the net that was found and random nets of the same budget are
trained from scratch alike. <folder>/nets.csv has a row for each net. The same command resumes the comparison.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from retinue.benchmarks.timing import pick_device, print_rows, write_csv
from retinue.results.architecture_comparison import compare, summarise
from retinue.runs.config import register_resolvers
from retinue.utils import command_line
from retinue.utils.errors import user_errors
from retinue.utils.paths import CONF


class Options(command_line.Options):
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="seeds of the searches and of the trainings")
    random: int = Field(20, ge=2, description="random nets for each seed")
    budget_macs: float = Field(3.5e6, gt=0, description="maximum MACs for one image")
    supernet_epochs: int = Field(40, ge=1, description="epochs of the supernet")
    epochs: int = Field(6, ge=1, description="epochs of the nets; short trainings tell nets apart on the digits")
    folder: Path = Field(Path("outputs/architecture_comparison"), description="folder of the comparison")
    device: str = Field("auto", description="device that judges candidates: auto, cpu or cuda")


def main(arguments: Sequence[str] | None = None) -> None:
    options, overrides = Options.parse_some(arguments)
    register_resolvers()
    folder, rows = options.folder.absolute(), []
    common = ["logger=none", *overrides]
    for seed in options.seeds:
        rows += compare(
            folder, seed, round(options.budget_macs), options.random,
            [f"recipe.epochs={options.supernet_epochs}", *common], [f"recipe.epochs={options.epochs}", *common],
            pick_device(options.device),
        )  # fmt: skip
        write_csv(folder / "nets.csv", rows)
    print_rows(summarise(rows), "Accuracy on the test split of the net that was found and of random nets")
    print(folder / "nets.csv")


if __name__ == "__main__":
    with user_errors(CONF, "train"):
        main()
