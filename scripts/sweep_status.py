"""Show the state of each run of a sweep: finished, running, queued, failed, stopped, missing or unreadable.

    python scripts/sweep_status.py model=swin,biformer seed=0,1,2 recipe.epochs=50

The arguments are those of `train.py -m`: they are composed to the same grid, and the folder of each run tells its
state. Slurm, if it is installed, is asked only which jobs are in its queue. The same sweep started again runs every run
that is not finished: a stopped run goes on from its checkpoint, a failed run is tried again.
"""

import sys
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table

from retinue.runs.config import register_resolvers
from retinue.runs.sweep import list_runs
from retinue.utils.errors import user_errors
from retinue.utils.paths import CONF

STYLES = {"finished": "green", "running": "cyan", "queued": "cyan", "failed": "red", "stopped": "yellow",
          "unreadable": "red"}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    register_resolvers()
    runs = list_runs(arguments)
    table = Table("run", "state", Column("", max_width=100), "folder", box=None, header_style="")
    for run in runs:
        state, detail = run.status
        table.add_row(" ".join(run.overrides), state, detail, str(run.folder), style=STYLES.get(state))
    Console(width=None if sys.stdout.isatty() else 300).print(table)
    counts = Counter(run.status.state for run in runs)
    print(", ".join(f"{number} {state}" for state, number in counts.items()))


if __name__ == "__main__":
    with user_errors(CONF, "train"):
        main()
