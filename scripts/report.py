"""Write all runs below a folder to one HTML page: table, quality against cost, curves, and each run's config.

    python scripts/report.py                                              # outputs -> report.html
    python scripts/report.py folder=outputs where.data=cifar10 out=cifar10.html title="CIFAR-10"
    python scripts/report.py baseline=swin_nano                           # with the difference of each net to this one
    python scripts/report.py benchmarks=models.csv                        # with speed and memory of inference

The page is one file that loads nothing: it can be sent by mail and opens without a network. `where` is the same as for
collect.py; `benchmarks` takes the CSV file that benchmark_models.py writes.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from retinue.results.baseline import compare_groups
from retinue.results.benchmark_csv import join_benchmarks
from retinue.results.collection import choose_runs, find_runs, group_runs
from retinue.results.report import make_data, make_page
from retinue.results.table import in_words
from retinue.utils import command_line
from retinue.utils.errors import user_errors
from retinue.utils.files import write_text


class Options(command_line.Options):
    folder: Path = Field(Path("outputs"), description="folder of the runs")
    where: dict[str, str] = Field({}, description="only runs with this value; a,b and swin_* work")
    baseline: str | None = Field(
        None, description="net to which each other gets its difference, as compare.py computes it"
    )
    benchmarks: Path | None = Field(None, description="CSV of benchmark_models.py")
    title: str = Field("Results", description="heading of the page")
    out: Path = Field(Path("report.html"), description="the page")


def main(arguments: Sequence[str] | None = None) -> None:
    options = Options.parse(arguments)
    runs = find_runs(options.folder)
    if options.benchmarks:
        join_benchmarks(runs, options.benchmarks)
    runs = choose_runs(runs, options.where)
    words: dict[int, str] = {}
    if options.baseline:
        differences = compare_groups(group_runs(runs), options.baseline)
        words = in_words(differences)
        for note in differences.notes:
            print(note, file=sys.stderr)
    data = make_data(runs, options.folder, options.baseline, words)
    write_text(options.out, make_page(data, options.title))
    print(options.out)


if __name__ == "__main__":
    with user_errors():
        main()
