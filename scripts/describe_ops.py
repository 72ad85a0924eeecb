"""Generate docs/ops.md, the table of all ops with their mechanism, source and costs, and docs/gates.md, that of gates.

python scripts/describe_ops.py                               # after a change of an op or gate
python scripts/describe_ops.py measure=[agent,window]      # time these ops first, on the CPU of this machine
"""

from collections.abc import Sequence

from pydantic import Field

from retinue.results.compare_ops import check_ops
from retinue.results.ops_overview import GATES_OVERVIEW, OVERVIEW, gates_overview, measure_times, overview
from retinue.utils import command_line
from retinue.utils.errors import user_errors
from retinue.utils.files import write_text


class Options(command_line.Options):
    measure: list[str] = Field([], description="ops to time before the page is written")
    rounds: int = Field(7, ge=1, description="how often each op is timed")


def main(arguments: Sequence[str] | None = None) -> None:
    options = Options.parse(arguments)
    check_ops(options.measure)
    if options.measure:
        measure_times(options.measure, options.rounds)
    write_text(OVERVIEW, overview())
    write_text(GATES_OVERVIEW, gates_overview())


if __name__ == "__main__":
    with user_errors():
        main()
