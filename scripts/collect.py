"""Print all runs below a folder as one table: mean and spread over seeds.

    python scripts/collect.py                                             # runs below outputs, on the terminal
    python scripts/collect.py where.data=cifar10 where.model=swin_*,biformer_* out=paper.tex
    python scripts/collect.py baseline=swin_nano                          # with the difference to a net
    python scripts/collect.py by=[model] pivot=data columns=[test/top1] spread=std out=[table.csv,table.md]

A row stands for the runs that differ in nothing but the seed, or, with `by`, for the runs with the same values of these
names. The names are those of a run's config (`recipe.epochs`, `model.mixers`), of its result (`params`, `seconds`) and
of its metrics (`test/top1`), and `model`, `data`, `task`, `seed`, `kind` (training, evaluation) and `status`. Runs that
are not finished are counted in the column `runs`, and listed below the table with the reason.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from retinue.results.baseline import compare_groups
from retinue.results.benchmark_csv import join_benchmarks
from retinue.results.collection import check_name, choose_runs, distinguishing_names, find_runs, group_runs
from retinue.results.figures import COUNTS, main_figures
from retinue.results.table import (
    SUFFIXES,
    count_text_columns,
    describe_table,
    format_table,
    make_table,
    to_markdown,
    write_table,
)
from retinue.utils import command_line
from retinue.utils.errors import user_errors


class Options(command_line.Options):
    folder: Path = Field(Path("outputs"), description="folder of the runs")
    where: dict[str, str] = Field({}, description="only runs with this value; a,b and swin_* work")
    by: list[str] | None = Field(None, description="names whose values make a row; null: all that differs but the seed")
    columns: list[str] | None = Field(None, description="names to show; null: the tasks' main metrics, params and macs")
    pivot: str | None = Field(None, description="name whose values each get columns of their own")
    spread: Literal["ci95", "std"] = Field("ci95", description="what stands after ±; a CSV file has both")
    baseline: str | None = Field(
        None, description="net to which each other gets its difference, as compare.py computes it"
    )
    benchmarks: Path | None = Field(None, description="CSV of benchmark_models.py; adds the names inference_...")
    out: list[Path] = Field([], description=f"files to write, which end in {', '.join(SUFFIXES)}")


def main(arguments: Sequence[str] | None = None) -> None:
    options = Options.parse(arguments)
    command_line.check_suffixes("out", options.out, SUFFIXES)
    runs = find_runs(options.folder)
    if options.benchmarks:
        join_benchmarks(runs, options.benchmarks)
    runs = choose_runs(runs, options.where)
    if options.columns is None:
        columns = [*main_figures(runs), *COUNTS]
    else:
        columns = options.columns
        for name in columns:
            check_name(name, runs)
    by = distinguishing_names(runs) if options.by is None else options.by
    if options.pivot and options.pivot not in by:
        by = [*by, options.pivot]
    groups = group_runs(runs, by)
    differences = compare_groups(groups, options.baseline) if options.baseline else None
    rows = make_table(groups, columns, options.pivot, differences)
    lines = format_table(rows, options.spread)
    print(to_markdown(lines, count_text_columns(lines)), end="")
    for path in options.out:
        write_table(path, rows, options.spread)
    notes = differences.notes if differences else []
    for line in [*describe_table(runs, groups, columns), *notes, *map(str, options.out)]:
        print(line, file=sys.stderr)


if __name__ == "__main__":
    with user_errors():
        main()
