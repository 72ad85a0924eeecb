"""Tell whether one net is better than another by their runs: difference, confidence interval and test.

    python scripts/compare.py RUN RUN                          # two folders of runs, or of evaluations by eval.py
    python scripts/compare.py outputs/classification/digits    # all nets below a folder
    python scripts/compare.py RUN RUN RUN baseline=swin_nano figure=top5 out=compare.csv

Runs that differ only in the seed are one net. Nets are compared with the baseline, by default the first net, image by
image and seed by seed. `same within` is the smallest margin within which two nets are equal by two one-sided tests;
p-values are corrected for the number of nets by Holm's method. docs/evaluation.md describes the methods.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from retinue.benchmarks.timing import write_csv
from retinue.results.compare import check_nets, compare_nets, read_nets
from retinue.results.figures import display_unit
from retinue.results.table import to_markdown
from retinue.utils import command_line
from retinue.utils.errors import user_errors
from retinue.utils.suggestions import nearest


class Options(command_line.Options):
    runs: list[Path] = Field(description="folders of runs, also without runs=", min_length=1)
    figure: str | None = Field(None, description="figure to compare; null: the first of the task, such as top1")
    baseline: str | None = Field(None, description="net with which the others are compared; null: the first")
    resamples: int = Field(1000, ge=100, description="number of resamples of the bootstrap over images")
    out: Path | None = Field(None, description="CSV file to write")


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    folders = [argument for argument in arguments if "=" not in argument and not argument.startswith("-")]
    others = [argument for argument in arguments if argument not in folders]
    options = Options.parse([f"runs=[{','.join(folders)}]", *others] if folders else others)
    if options.out:
        command_line.check_suffixes("out", [options.out], [".csv"])
    nets = read_nets(options.runs, options.resamples)
    figure = check_nets(nets, options.figure)
    names = [net.name for net in nets]
    baseline = names[0] if options.baseline is None else options.baseline
    if baseline not in names:
        raise ValueError(f"there is no net {baseline!r}.{nearest(baseline, names)} There are: {', '.join(names)}")
    nets.sort(key=lambda net: net.name != baseline)
    differences = compare_nets(nets, nets[0], figure)

    symbol, scale = display_unit(figure.removeprefix("test/"), 1)
    headings = ["net", "seeds", figure, "95 % interval", "difference", "95 % interval", "p", "same within"]
    rows, lines = [], [[f"{heading} ({symbol})" if symbol and heading == figure else heading for heading in headings]]
    for net in nets:
        value, difference = net.value(figure), differences.get(net.name)
        row = {"what": net.name, "seeds": len(net.tests), figure: value.mean}
        row |= {f"{figure}_low": value.low, f"{figure}_high": value.high}
        line = [net.name, str(len(net.tests)), _number(value.mean, scale), _interval(value, scale)]
        if difference is None:
            line += ["baseline", "", "", ""]
        else:
            row |= {"diff": difference.mean, "diff_low": difference.low, "diff_high": difference.high}
            row |= {"p": difference.p, "same_within": difference.same_within}
            line += [_number(difference.mean, scale, "+"), _interval(difference, scale, "+")]
            line += [f"{difference.p:.2g}", _number(difference.same_within, scale)]
        rows.append(row)
        lines.append(line)
    print(to_markdown(lines, 1), end="")
    if options.out:
        write_csv(options.out, rows)
        print(options.out, file=sys.stderr)


def _number(value: float, scale: float, sign: str = "") -> str:
    return f"{value / scale:{sign}.{2 if scale != 1 else 4}f}"


def _interval(difference, scale: float, sign: str = "") -> str:
    return f"{_number(difference.low, scale, sign)} to {_number(difference.high, scale, sign)}"


if __name__ == "__main__":
    with user_errors():
        main()
