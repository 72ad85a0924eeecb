"""Rows of measurements and of the targets that they decide."""

from collections.abc import Sequence
from typing import Any

from retinue.benchmarks.timing import Row


def find(rows: Sequence[Row], **columns: Any) -> Row | None:
    """Return the first row with these values, or None."""
    return next((row for row in rows if all(row.get(name) == value for name, value in columns.items())), None)


def make_target(name: str, limit: float, measured: float | None, at_most: bool = False) -> Row:
    """Return the row of a target; `reached` is empty if nothing was measured. True and False count as 1 and 0."""
    measured = None if measured is None else float(measured)
    reached = None if measured is None else str(measured <= limit if at_most else measured >= limit)
    return {"target": name, "bound": "at most" if at_most else "at least", "limit": limit, "measured": measured,
            "reached": reached}  # fmt: skip


def milliseconds(row: Row | None) -> float | None:
    """Return the median time of a row, or None without a row."""
    return None if row is None else float(row["median_ms"] or 0)


def quotient(numerator: Row | None, denominator: Row | None, column: str) -> float | None:
    """Return the quotient of two rows' values, or None if one of the rows is missing."""
    if numerator is None or denominator is None:
        return None
    return float(numerator[column] or 0) / float(denominator[column] or 1)
