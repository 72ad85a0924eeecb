"""Search hyper-parameters: each trial is a run of train.py, bad trials end early, a stopped search can be resumed.

    python scripts/search.py space=lr_wd trials=20                           # conf/search/lr_wd.yaml, on the digits
    python scripts/search.py space=my_space.yaml name=swin trials=50 model=swin data=cifar10

All other keys are for train.py. Optuna proposes the trials (TPE, after ten random ones), and each is judged by its best
validation, never by the test split. A trial below the median of the others at its epoch is ended early (not in the
first five trials, nor while the learning rate is warming up). <folder>/<name>/ holds the journal, trials.csv and a
folder for each trial's run. The same command resumes the search: first the trials that were stopped, then new ones up
to `trials`. A second process with the same command shares the work.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

import optuna
from pydantic import Field

from retinue.benchmarks.timing import print_rows, write_csv
from retinue.results.search import Search, read_space, to_overrides
from retinue.runs.config import register_resolvers
from retinue.utils import command_line
from retinue.utils.errors import user_errors
from retinue.utils.paths import CONF


class Options(command_line.Options):
    space: str = Field(description="search space: a name in conf/search, or a .yaml file of your own")
    trials: int = Field(20, ge=1, description="number of trials, with those of earlier starts")
    name: str | None = Field(None, description="name of the search's folder; null: the space's name")
    sampler_seed: int = Field(0, ge=0, description="seed of the choice of trials; seed=N is the seed of the runs")
    folder: Path = Field(Path("outputs/search"), description="folder of the searches")


def main(arguments: Sequence[str] | None = None) -> None:
    options, overrides = Options.parse_some(arguments)
    register_resolvers()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name = Path(options.space).stem if options.name is None else options.name
    folder = (options.folder / name).absolute()
    search = Search(folder, read_space(options.space), overrides, options.sampler_seed)
    try:
        search.run(options.trials)
    finally:
        rows = search.rows()
        if rows:
            write_csv(folder / "trials.csv", rows)
    print_rows(rows, f"{options.space}: best validation of each trial")
    best = search.best_params()
    if best is not None:
        print(f"best: python train.py {shlex.join([*overrides, *to_overrides(best)])}")
    print(folder)


if __name__ == "__main__":
    with user_errors(CONF, "train"):
        main()
