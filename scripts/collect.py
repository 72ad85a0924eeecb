"""All runs below a folder as one table: mean and spread over seeds.

    python scripts/collect.py                                             # of outputs, on the terminal
    python scripts/collect.py --where data=cifar10 model=swin_*,biformer_* --out paper.tex
    python scripts/collect.py --by model --pivot data --out table.csv table.md

A row stands for the runs that differ in nothing but the seed, or, with `--by`, for those with the same values of these
names. Names are those of a run's config (`recipe.epochs`, `model.mixers`), of its result (`params`, `seconds`) and of
its metrics (`test/top1`), and `model`, `data`, `task`, `seed`, `kind` (training, evaluation) and `status`. What is not
finished is counted in the column `runs` and listed, with the reason, below the table.
"""

import argparse
import csv
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from retinue.evaluation.statistics import Summary
from retinue.results.collection import (
    Group,
    Run,
    check_name,
    choose,
    distinguishing,
    figures,
    find_runs,
    group,
    join_benchmarks,
    show,
    unit,
)
from retinue.utils.errors import user_errors
from retinue.utils.files import replacing

Cell = str | Summary | None
FORMATS = (".csv", ".md", ".tex")


def make_table(groups: Sequence[Group], columns: Sequence[str], pivot: str | None = None) -> list[dict[str, Cell]]:
    """A row for each group: its key, how many runs it has, and what they measured.

    With `pivot`, one of the keys, groups that differ in it alone share a row, and its values are in the columns' heads.
    """
    rows: dict[tuple[str, ...], dict[str, Cell]] = {}
    counts: dict[tuple[str, ...], Counter[str]] = {}
    for each in groups:
        key = {name: value for name, value in each.key.items() if name != pivot}
        row = rows.setdefault(tuple(key.values()), {**key, "runs": None})
        counts.setdefault(tuple(key.values()), Counter()).update(each.count())
        for column in columns:
            row[f"{each.key[pivot]} {column}" if pivot else column] = each.summary(column) or _words(each, column)
    for key, row in rows.items():
        rest = ", ".join(f"{n} {status}" for status, n in counts[key].items() if status != "finished")
        row["runs"] = f"{counts[key]['finished']}{f' ({rest})' if rest else ''}"
    heads = dict.fromkeys(head for row in rows.values() for head in row)
    return [{head: row.get(head) for head in heads} for row in rows.values()]


def _words(each: Group, column: str) -> str | None:
    words = dict.fromkeys(show(run.values[column]) for run in each.runs if run.values.get(column) is not None)
    return ", ".join(words) or None


def format_cells(rows: Sequence[Mapping[str, Cell]], spread: str) -> list[list[str]]:
    """The table as words, its head first: rates in %, counts in M or G, `mean ± spread` where there are two values."""
    units = {head: _unit(head, [row[head] for row in rows]) for head in rows[0]}
    lines = [[f"{head} ({symbol})" if symbol else head for head, (symbol, _) in units.items()]]
    return lines + [[_format(row[head], *units[head], spread) for head in units] for row in rows]


def _unit(head: str, cells: Sequence[Cell]) -> tuple[str, float]:
    means = [cell.mean for cell in cells if isinstance(cell, Summary)]
    return unit(head.split()[-1], max(means)) if means else ("", 1.0)


def _format(cell: Cell, symbol: str, scale: float, spread: str) -> str:
    if not isinstance(cell, Summary):
        return cell or ""
    half = cell.std if spread == "std" else cell.ci95
    if cell.mean.is_integer() and not symbol:
        mean, digits = str(int(cell.mean)), ".4g"
    else:
        digits = ".2f" if symbol else ".0f" if abs(cell.mean) >= 1000 else ".4g"
        mean = format(cell.mean / scale, digits)
    same = half == 0 and symbol != "%"  # counts, such as of parameters, have no spread to tell of
    return mean if math.isnan(half) or same else f"{mean} ± {format(half / scale, digits)}"


def to_markdown(lines: Sequence[Sequence[str]]) -> str:
    """Numbers to the right; what Markdown or HTML would take for its own is escaped."""
    names = lines[0].index("runs") + 1  # columns of words; the others are figures
    cells = [[_escape(cell, MARKDOWN) for cell in line] for line in lines]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * width if i < names else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    table = ""
    for line in [cells[0], rule, *cells[1:]]:
        left = [cell.ljust(width) for cell, width in zip(line[:names], widths[:names], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[names:], widths[names:], strict=True)]
        table += f"| {' | '.join([*left, *right])} |\n"
    return table


def to_latex(lines: Sequence[Sequence[str]]) -> str:
    """A `tabular` that takes the package booktabs."""
    names = lines[0].index("runs") + 1
    head, *body = [" & ".join(_escape(cell, LATEX) for cell in line) + r" \\" for line in lines]
    alignment = "l" * names + "r" * (len(lines[0]) - names)
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            rf"\begin{{tabular}}{{{alignment}}}",
            *[f"  {line}" for line in (r"\toprule", head, r"\midrule", *body, r"\bottomrule")],
            r"\end{tabular}",
            "",
        ]
    )


MARKDOWN = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": r"\|", "*": r"\*", "`": r"\`"}
LATEX = {character: rf"\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
}  # fmt: skip


def _escape(text: str, names: Mapping[str, str]) -> str:
    """On one line, with characters replaced by their names."""
    return "".join(names.get(character, character) for character in " ".join(text.split()))


def to_csv(rows: Sequence[Mapping[str, Cell]]) -> list[dict[str, str | float]]:
    """Unrounded and in the result's units; beside a figure its standard deviation, interval and number of runs."""
    measured = [head for head in rows[0] if any(isinstance(row[head], Summary) for row in rows)]
    lines = []
    for row in rows:
        line: dict[str, str | float] = {}
        for head, cell in row.items():
            if isinstance(cell, Summary):
                n, *numbers = cell
                mean, std, ci95 = ("" if math.isnan(number) else number for number in numbers)
                line |= {head: mean, f"{head}_std": std, f"{head}_ci95": ci95, f"{head}_n": n}
            else:
                line |= {head: cell or ""} | ({f"{head}_{part}": "" for part in PARTS} if head in measured else {})
        lines.append(line)
    return lines


PARTS = ("std", "ci95", "n")


def write_table(path: Path, rows: Sequence[Mapping[str, Cell]], spread: str) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            lines = to_csv(rows)
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
        else:
            file.write((to_latex if path.suffix == ".tex" else to_markdown)(format_cells(rows, spread)))


def notes(runs: Sequence[Run], groups: Sequence[Group], columns: Sequence[str]) -> list[str]:
    """What a reader of the table should know: runs without a result, and means that are not over seeds alone."""
    counts = Counter(run.status for run in runs)
    lines = [f"{len(runs)} runs: {', '.join(f'{n} {status}' for status, n in counts.items())}"]
    for run in sorted(runs, key=lambda run: run.status):
        if run.status != "finished":
            lines.append(f"{run.status}: {run.folder}{f': {run.failure}' if run.failure else ''}")
    for each in groups:
        finished = [run for run in each.runs if run.status == "finished"]
        name = ", ".join(f"{key}={value}" for key, value in each.key.items())
        mixed = [key for key in distinguishing(finished) if len({show(run.values.get(key)) for run in finished}) > 1]
        seeds = Counter(show(run.values.get("seed")) for run in finished)
        if mixed:
            lines.append(f"{name}: a mean over runs that differ in {', '.join(mixed)}; --by or --where separates them")
        elif twice := [seed for seed, n in seeds.items() if n > 1]:
            lines.append(f"{name}: seed {', '.join(twice)} counts more than once")
        for column in columns:
            lacking = sum(run.values.get(column) is None for run in finished)
            if 0 < lacking < len(finished):
                lines.append(f"{name}: {lacking} of {len(finished)} finished runs have no {column}")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Collect runs to one table: mean and spread over seeds.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("outputs"), help="of runs; outputs, if not given")
    parser.add_argument("--where", nargs="+", default=[], metavar="NAME=VALUE", help="only these; a,b and swin_* work")
    parser.add_argument("--by", nargs="+", metavar="NAME", help="what makes a row; all but the seed, if not given")
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="the tasks' figures, params, macs, if not given")
    parser.add_argument("--pivot", metavar="NAME", help="columns for each value of this")
    parser.add_argument("--spread", choices=["ci95", "std"], default="ci95", help="after ±; a CSV has both")
    parser.add_argument("--benchmarks", type=Path, metavar="CSV", help="of benchmark_models.py: names inference_...")
    parser.add_argument("--out", type=Path, nargs="+", default=[], metavar="FILE", help=f"ends in {', '.join(FORMATS)}")
    args = parser.parse_args(argv)
    for path in args.out:
        if path.suffix not in FORMATS:
            raise ValueError(f"--out takes files that end in {', '.join(FORMATS)}, not {path}")

    runs = find_runs(args.folder)
    if args.benchmarks:
        join_benchmarks(runs, args.benchmarks)
    runs = choose(runs, args.where)
    for name in args.columns or ():
        check_name(name, runs)
    columns = args.columns or [*figures(runs), "params", "macs"]
    by = args.by or distinguishing(runs)
    groups = group(runs, [*by, args.pivot] if args.pivot and args.pivot not in by else by)
    rows = make_table(groups, columns, args.pivot)
    print(to_markdown(format_cells(rows, args.spread)), end="")
    for path in args.out:
        write_table(path, rows, args.spread)
    for line in [*notes(runs, groups, columns), *map(str, args.out)]:
        print(line, file=sys.stderr)


if __name__ == "__main__":
    with user_errors():
        main()
