"""How the runs of a sweep stand: finished, running, queued, failed, stopped or missing.

    python scripts/sweep_status.py model=swin,biformer seed=0,1,2 recipe.epochs=50

The arguments are those of `train.py -m`. They are composed to the same grid, and the folders are looked at; Slurm is
asked only for what waits in its queue, where it is there. The same sweep again runs what is not finished: a stopped run
goes on, a failed one is tried again.
"""

import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from rich.console import Console
from rich.table import Column, Table

from retinue.runs.config import register_resolvers
from retinue.runs.slurm import queue
from retinue.runs.status import Status, status
from retinue.utils.errors import user_errors
from retinue.utils.paths import CONF

STYLES = {"finished": "green", "running": "cyan", "queued": "cyan", "failed": "red", "stopped": "yellow"}


class Run(NamedTuple):
    overrides: list[str]  # those that vary in the sweep
    folder: Path
    status: Status


def look(overrides: Sequence[str]) -> list[Run]:
    """Each run of the sweep `train.py -m <overrides>`, in the sweep's order."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        grid = list(itertools.chain(*BasicSweeper.split_arguments(parser.parse_overrides(list(overrides)), None)))
        configs = [compose("train", job, return_hydra_config=True).hydra.sweep for job in grid]
        folders = [Path(sweep.dir, sweep.subdir) for sweep in configs]
    varies = [len(set(values)) > 1 for values in zip(*grid, strict=True)]
    listed = queue()
    return [
        Run(list(itertools.compress(job, varies)), folder, status(folder, listed))
        for job, folder in zip(grid, folders, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return
    register_resolvers()
    runs = look([argument for argument in argv if argument not in ("-m", "--multirun")])
    table = Table("run", "state", Column("", max_width=100), "folder", box=None, header_style="")
    for run in runs:
        state, detail = run.status
        style = STYLES.get(state, "")
        table.add_row(" ".join(run.overrides), f"[{style}]{state}[/]" if style else state, detail, str(run.folder))
    Console(width=None if sys.stdout.isatty() else 300).print(table)
    counts = Counter(run.status.state for run in runs)
    print(", ".join(f"{number} {state}" for state, number in counts.items()))


if __name__ == "__main__":
    with user_errors(CONF, "train"):
        main()
