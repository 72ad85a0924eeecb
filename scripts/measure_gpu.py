"""Measure the targets of speed on a GPU, the most important ones first, until a time limit.

    python scripts/measure_gpu.py out=measured
    python scripts/measure_gpu.py out=measured sections=[routed_attention,swin_tiny] seconds=200
    python scripts/measure_gpu.py out=/tmp/dry dry=true

After each section, `<out>/rows.csv` has all rows that were measured so far, and `<out>/targets.csv` says which targets
are reached. Ratios of nets are of compiled against compiled nets. The tests that need a GPU and compute-sanitizer are
sections, too. With dry=true the same code runs on the CPU with the smallest sizes, and the figures mean nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from retinue.benchmarks.ops import MeasuringSetting, make_setting
from retinue.benchmarks.targets import SECTIONS, dry_scale, full_scale, measure_all
from retinue.benchmarks.timing import Row, pick_device, print_rows, write_csv
from retinue.utils import command_line
from retinue.utils.errors import user_errors
from retinue.utils.suggestions import nearest


class Options(command_line.Options):
    """Options of this command."""

    out: Path = Field(description="folder for the CSV files")
    sections: list[str] = Field(list(SECTIONS), min_length=1, description="what is measured, in this order")
    seconds: float = Field(450, gt=0, description="time after which no further section begins")
    rounds: int = Field(7, ge=1, description="how often each candidate is timed")
    device: str = Field("auto", description="auto, cuda or cuda:N")
    dry: bool = Field(False, description="run everything once on the CPU with the smallest sizes")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the process."""
    options = Options.parse(arguments)
    for name in options.sections:
        if name not in SECTIONS:
            raise ValueError(f"there is no section {name!r}.{nearest(name, SECTIONS)} There are: {', '.join(SECTIONS)}")
    device = pick_device("cpu" if options.dry else options.device)
    if device.type != "cuda" and not options.dry:
        raise ValueError("the targets are for a CUDA device: dry=true runs the same code on the CPU")
    if options.dry:
        scale = dry_scale(MeasuringSetting(device, "float32", 1))
    else:
        scale = full_scale(make_setting(device, "bfloat16", options.rounds))
    options.out.mkdir(parents=True, exist_ok=True)
    all_rows: list[Row] = []
    all_targets: list[Row] = []
    for rows, targets in measure_all(scale, options.seconds, options.sections):
        all_rows += rows
        all_targets += targets
        write_csv(options.out / "rows.csv", all_rows)
        write_csv(options.out / "targets.csv", all_targets)
    print_rows(all_targets, "Targets")


if __name__ == "__main__":
    with user_errors():
        main()
