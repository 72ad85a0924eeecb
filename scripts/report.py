"""Write all runs below a folder to one HTML page: table, quality against cost, curves, and each run's config.

    python scripts/report.py                                              # outputs -> report.html
    python scripts/report.py folder=outputs where.data=cifar10 out=cifar10.html title="CIFAR-10"
    python scripts/report.py baseline=swin_nano                           # with the difference of each net to this one
    python scripts/report.py benchmarks=models.csv                        # with speed and memory of the nets
    python scripts/report.py watch=true                                   # running sweeps, until Ctrl-C

The page is one file that loads nothing: it can be sent by mail and opens without a network. `where` is the same as for
collect.py; `benchmarks` takes the CSV file that benchmark_models.py writes.

`watch=true` writes no file: it serves the page at http://localhost:PORT, to this machine only, and the page reads the
runs again every few seconds.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from retinue.results.baseline import compare_groups
from retinue.results.benchmark_csv import join_benchmarks, read_speed
from retinue.results.collection import Run, choose_runs, find_runs, group_runs
from retinue.results.report import make_data, make_page
from retinue.results.table import in_words
from retinue.results.watch import find_live_runs, make_server
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
    watch: bool = Field(False, description="serve a page that follows the runs, until Ctrl-C")
    port: int = Field(8000, ge=0, le=65535, description="port of the page that watch=true serves; 0: a free one")


def main(arguments: Sequence[str] | None = None) -> None:
    options = Options.parse(arguments)
    if options.watch:
        watch(options)
        return
    data = read(options, find_runs(options.folder))
    write_text(options.out, make_page(data, options.title))
    print(options.out)


def read(options: Options, runs: Sequence[Run]) -> dict[str, Any]:
    """Return what the page shows of these runs."""
    if options.benchmarks:
        join_benchmarks(runs, options.benchmarks)
    speed = read_speed(options.benchmarks) if options.benchmarks else []
    runs = choose_runs(runs, options.where)
    words: dict[int, str] = {}
    if options.baseline:
        differences = compare_groups(group_runs(runs), options.baseline)
        words = in_words(differences)
        for note in differences.notes:
            print(note, file=sys.stderr)
    # A page that is read again every few seconds does not carry the pictures.
    return make_data(runs, options.folder, speed, options.baseline, words, pictures=not options.watch)


def watch(options: Options) -> None:
    """Serve the page until Ctrl-C."""
    if not options.folder.is_dir():
        raise ValueError(f"there is no folder {options.folder}")
    if options.baseline:
        raise ValueError("baseline compares runs that have ended: leave it out with watch=true")
    server = make_server(
        lambda: read(options, find_live_runs(options.folder)), options.folder, options.title, options.port
    )
    print(f"http://localhost:{server.server_port} follows the runs below {options.folder}; Ctrl-C ends it", flush=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")


if __name__ == "__main__":
    with user_errors():
        main()
