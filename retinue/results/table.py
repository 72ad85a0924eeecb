"""One table of many runs: mean and spread over seeds, as Markdown, LaTeX or CSV."""

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from retinue.evaluation.statistics import Difference, Summary
from retinue.results.baseline import Differences
from retinue.results.collection import Group, Run, distinguishing_names
from retinue.results.figures import display_unit
from retinue.utils.command_line import to_text
from retinue.utils.files import replacing, write_text

Cell = str | Summary | Difference | None
CsvRow = dict[str, str | float | None]
SUFFIXES = (".csv", ".md", ".tex")
# Columns of a CSV file beside each mean.
SPREAD_COLUMNS = ("std", "ci95", "n")

MARKDOWN_ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": r"\|", "*": r"\*", "`": r"\`"}
LATEX_ESCAPES = {character: rf"\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
}  # fmt: skip


def make_table(
    groups: Sequence[Group], columns: Sequence[str], pivot: str | None = None, differences: Differences | None = None
) -> list[dict[str, Cell]]:
    """Return a row for each group: its key, the number of its runs, and a cell for each column.

    Args:
        groups: Groups with the same names in their keys.
        columns: Names of the values to show; numbers are summarised, other values are listed.
        pivot: A name in the keys. Groups that differ in this name only share a row, which has the columns once for
            each value of the name. Default: no pivot.
        differences: Differences to a baseline, which get a column for each of their figures. Default: none.
    """
    rows: dict[tuple[str, ...], dict[str, Cell]] = {}
    counts: dict[tuple[str, ...], Counter[str]] = {}
    for i, group in enumerate(groups):
        shown = {name: value for name, value in group.key.items() if name != pivot}
        key = tuple(shown.values())
        row = rows.setdefault(key, {**shown, "runs": None})
        counts.setdefault(key, Counter()).update(group.count_by_status())
        prefix = f"{group.key[pivot]} " if pivot else ""
        for column in columns:
            summary = group.summary(column)
            row[prefix + column] = _list_values(group, column) if summary is None else summary
        if differences and i in differences.values:
            row[f"{prefix}difference {differences.figures[i]}"] = differences.values[i]
    for key, row in rows.items():
        row["runs"] = _describe_counts(counts[key])
    headings = dict.fromkeys(heading for row in rows.values() for heading in row)
    return [{heading: row.get(heading) for heading in headings} for row in rows.values()]


def _list_values(group: Group, column: str) -> str | None:
    """Return the different values of a column that holds no numbers; None if no run has a value."""
    values = [run.values[column] for run in group.runs if run.values.get(column) is not None]
    return ", ".join(dict.fromkeys(map(to_text, values))) or None


def _describe_counts(counts: Mapping[str, int]) -> str:
    """Return the number of finished runs, and of the others by status: `3 (1 failed)`."""
    others = ", ".join(f"{count} {status}" for status, count in counts.items() if status != "finished")
    finished = counts.get("finished", 0)
    return f"{finished} ({others})" if others else str(finished)


def format_table(rows: Sequence[Mapping[str, Cell]], spread: str) -> list[list[str]]:
    """Return the table as text, its headings first: fractions in %, counts in M or G, `mean ± spread`.

    Args:
        rows: Rows of `make_table`.
        spread: `std` or `ci95`; it is shown where a cell has two or more values.
    """
    units = {heading: _column_unit(heading, [row[heading] for row in rows]) for heading in rows[0]}
    headings = [f"{heading} ({symbol})" if symbol else heading for heading, (symbol, _) in units.items()]
    return [headings] + [[_format_cell(row[heading], *units[heading], spread) for heading in units] for row in rows]


def _column_unit(heading: str, cells: Sequence[Cell]) -> tuple[str, float]:
    means = [cell.mean for cell in cells if isinstance(cell, Summary | Difference)]
    return display_unit(heading.split()[-1], max(means)) if means else ("", 1.0)


def _format_cell(cell: Cell, symbol: str, scale: float, spread: str) -> str:
    if cell is None:
        return ""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Difference):
        return describe_difference(cell, scale)
    half_width = cell.std if spread == "std" else cell.ci95
    if cell.mean.is_integer() and not symbol:
        mean, digits = str(int(cell.mean)), ".4g"
    else:
        digits = ".2f" if symbol else ".0f" if abs(cell.mean) >= 1000 else ".4g"
        mean = format(cell.mean / scale, digits)
    # Counts, such as the number of parameters, do not vary over seeds; `± 0` would tell nothing.
    is_constant = half_width == 0 and symbol != "%"
    return mean if math.isnan(half_width) or is_constant else f"{mean} ± {format(half_width / scale, digits)}"


def describe_difference(difference: Difference, scale: float) -> str:
    """Return a difference in words, such as `+1.20 (+0.31 to +2.09), p 0.011, same within 1.95`."""
    digits = ".2f" if scale != 1 else ".4f"
    mean, low, high = (format(value / scale, f"+{digits}") for value in difference[:3])
    same_within = format(difference.same_within / scale, digits)
    return f"{mean} ({low} to {high}), p {difference.p:.2g}, same within {same_within}"


def in_words(differences: Differences) -> dict[int, str]:
    """Return the differences of groups in words with their figure, by the group's position."""
    words = {}
    for i, value in differences.values.items():
        symbol, scale = display_unit(differences.figures[i], 1)
        unit = f" ({symbol})" if symbol else ""
        words[i] = (
            value if isinstance(value, str) else f"{differences.figures[i]}{unit} {describe_difference(value, scale)}"
        )
    return words


def count_text_columns(lines: Sequence[Sequence[str]]) -> int:
    """Return how many columns of a formatted table hold text: the key and `runs`, which come first."""
    return lines[0].index("runs") + 1


def to_markdown(lines: Sequence[Sequence[str]], text_columns: int) -> str:
    """Return a Markdown table, with characters escaped that Markdown or HTML would interpret.

    Args:
        lines: Cells, the headings first.
        text_columns: How many columns from the left are aligned left; the other columns are aligned right.
    """
    cells = [[_escape(cell, MARKDOWN_ESCAPES) for cell in line] for line in lines]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * width if i < text_columns else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    table = ""
    for line in [cells[0], rule, *cells[1:]]:
        padded = [
            cell.ljust(width) if i < text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        table += f"| {' | '.join(padded)} |\n"
    return table


def to_latex(lines: Sequence[Sequence[str]], text_columns: int) -> str:
    """Return a LaTeX `tabular`, which needs the package booktabs.

    Args:
        lines: Cells, the headings first.
        text_columns: How many columns from the left are aligned left; the other columns are aligned right.
    """
    headings, *body = [" & ".join(_escape(cell, LATEX_ESCAPES) for cell in line) + r" \\" for line in lines]
    alignment = "l" * text_columns + "r" * (len(lines[0]) - text_columns)
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            rf"\begin{{tabular}}{{{alignment}}}",
            *[f"  {line}" for line in (r"\toprule", headings, r"\midrule", *body, r"\bottomrule")],
            r"\end{tabular}",
            "",
        ]
    )


def _escape(text: str, escapes: Mapping[str, str]) -> str:
    """Return the text on one line, with the characters in `escapes` replaced."""
    return "".join(escapes.get(character, character) for character in " ".join(text.split()))


def to_csv_rows(rows: Sequence[Mapping[str, Cell]]) -> list[CsvRow]:
    """Return the rows of a CSV file: unrounded numbers in the units of result.json, with `SPREAD_COLUMNS` beside them.

    Args:
        rows: Rows of `make_table`.
    """
    measured = [heading for heading in rows[0] if any(isinstance(row[heading], Summary) for row in rows)]
    compared = [heading for heading in rows[0] if any(isinstance(row[heading], Difference) for row in rows)]
    lines: list[CsvRow] = []
    for row in rows:
        line: CsvRow = {}
        for heading, cell in row.items():
            if isinstance(cell, Summary):
                numbers = {
                    heading: cell.mean,
                    f"{heading}_std": cell.std,
                    f"{heading}_ci95": cell.ci95,
                    f"{heading}_n": cell.n,
                }
                line |= {column: None if math.isnan(number) else number for column, number in numbers.items()}
            elif heading in compared or isinstance(cell, Difference):
                numbers = cell._asdict() if isinstance(cell, Difference) else dict.fromkeys(Difference._fields)
                line |= {f"{heading} {column}": number for column, number in numbers.items()}
            else:
                line[heading] = cell
                if heading in measured:
                    line |= {f"{heading}_{column}": None for column in SPREAD_COLUMNS}
        lines.append(line)
    return lines


def write_table(path: Path, rows: Sequence[Mapping[str, Cell]], spread: str) -> None:
    """Write the table to a file, as LaTeX (.tex), CSV (.csv) or Markdown (any other suffix).

    Args:
        path: The file to write.
        rows: Rows of `make_table`.
        spread: `std` or `ci95`; a CSV file has both.
    """
    if path.suffix == ".csv":
        csv_rows = to_csv_rows(rows)
        with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(csv_rows[0]))
            writer.writeheader()
            writer.writerows(csv_rows)
    else:
        lines = format_table(rows, spread)
        convert = to_latex if path.suffix == ".tex" else to_markdown
        write_text(path, convert(lines, count_text_columns(lines)))


def describe_table(runs: Sequence[Run], groups: Sequence[Group], columns: Sequence[str]) -> list[str]:
    """Return what a reader of the table should know: runs without a result, and means over more than the seeds.

    Args:
        runs: All runs of the table.
        groups: The runs in groups, one for each row.
        columns: Names of the values that the table shows.
    """
    counts = Counter(run.status for run in runs)
    lines = [f"{len(runs)} runs: {', '.join(f'{count} {status}' for status, count in counts.items())}"]
    for run in sorted(runs, key=lambda run: run.status):
        if run.status != "finished":
            lines.append(f"{run.status}: {run.folder}{f': {run.failure}' if run.failure else ''}")
    for group in groups:
        finished = [run for run in group.runs if run.status == "finished"]
        name = ", ".join(f"{key}={value}" for key, value in group.key.items())
        different = [
            key for key in distinguishing_names(finished) if len({to_text(run.values.get(key)) for run in finished}) > 1
        ]
        seeds = Counter(to_text(run.values.get("seed")) for run in finished)
        repeated = [seed for seed, count in seeds.items() if count > 1]
        if different:
            names = ", ".join(different)
            lines.append(f"{name}: a mean over runs that differ in {names}; by=[...] or where.<name>= separates them")
        elif repeated:
            lines.append(f"{name}: seed {', '.join(repeated)} counts more than once")
        for column in columns:
            lacking = sum(run.values.get(column) is None for run in finished)
            if 0 < lacking < len(finished):
                lines.append(f"{name}: {lacking} of {len(finished)} finished runs have no {column}")
    return lines
