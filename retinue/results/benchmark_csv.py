"""Speed and memory that `scripts/benchmark_models.py` measured: for the runs of the same nets, and by themselves."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retinue.results.collection import Run

# Columns that tell the conditions of a measurement, in the order of the page.
CONDITIONS = ("machine", "dtype", "form")
# Parts of a training step, as the column `mode` names them.
PARTS = ("forward", "backward", "optimizer")


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file that `benchmark_models.py` wrote.

    Raises:
        ValueError: The file cannot be read, or has other columns.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"benchmarks={path}: {error.strerror}") from None
    for name in ("what", "images_per_s", "peak_mb"):
        if rows and name not in rows[0]:
            raise ValueError(f"benchmarks={path} has no column {name!r}; benchmark_models.py writes the file")
    return rows


def join_benchmarks(runs: Sequence[Run], path: str | Path) -> None:
    """Add the measured inference of each run's net to the run's `values`.

    The names are `inference_ms_per_image`, `inference_images_per_s`, `inference_peak_mb` (MB, 10^6 bytes) and, where
    they were measured, `inference_joules_per_image`, `latency_ms` and `latency_p99_ms`. A run whose net is not in the
    file stays as it is.

    Args:
        runs: Runs, which are changed.
        path: CSV file that `benchmark_models.py` wrote.

    Raises:
        ValueError: The file cannot be read, has other columns, has no row of inference, or has two rows for a net.
    """
    measured: dict[str, dict[str, float]] = {}
    rows = read_rows(path)
    inference = [row for row in rows if row.get("mode", "inference") == "inference"]
    for row in inference:
        if row["what"] in measured:
            raise ValueError(f"{row['what']} has more than one row: benchmarks takes one shape, dtype and device")
        speed = float(row["images_per_s"])
        figures = {"inference_peak_mb": row["peak_mb"], "inference_joules_per_image": row.get("joules_per_image")}
        measured[row["what"]] = {"inference_ms_per_image": 1000 / speed, "inference_images_per_s": speed}
        measured[row["what"]] |= _numbers(figures)
    if not measured:
        raise ValueError(f"benchmarks={path} has no row of inference")
    for row in rows:
        if row.get("mode") == "latency" and row["what"] in measured:
            measured[row["what"]] |= _numbers({"latency_ms": row["median_ms"], "latency_p99_ms": row["p99_ms"]})
    for run in runs:
        run.values.update(measured.get(str(run.values.get("model")), {}))


def read_speed(path: str | Path) -> list[dict[str, Any]]:
    """Return what the page shows of each model in each condition, in the order of the file.

    Each entry has `name` and `conditions`, and where they were measured `throughput` and `training_throughput`, lists
    of [batch size, images/s], `latency_ms`, `latency_p99_ms`, `parts`, milliseconds of the parts of a training step,
    `images_per_s` and `training_images_per_s`, `joules_per_image` and `peak_mb` of inference.

    Raises:
        ValueError: The file cannot be read, or has other columns.
    """
    models: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in read_rows(path):
        conditions = ", ".join(row[name] for name in CONDITIONS if row.get(name))
        entry = models.setdefault((row["what"], conditions), {"name": row["what"], "conditions": conditions})
        mode = row.get("mode", "inference")
        if mode in ("throughput", "training throughput"):
            point = [int(row["batch_size"]), float(row["images_per_s"])]
            entry.setdefault(mode.replace(" ", "_"), []).append(point)
        elif mode == "latency":
            entry |= _numbers({"latency_ms": row["median_ms"], "latency_p99_ms": row["p99_ms"]})
        elif mode in PARTS:
            entry.setdefault("parts", {})[mode] = float(row["median_ms"])
        elif mode == "training":
            entry |= _numbers({"training_images_per_s": row["images_per_s"]})
        else:
            names = ("images_per_s", "joules_per_image", "peak_mb")
            entry |= _numbers({name: row.get(name) for name in names})
    return list(models.values())


def _numbers(cells: Mapping[str, str | None]) -> dict[str, float]:
    """Return the cells that are not empty as numbers."""
    return {name: float(cell) for name, cell in cells.items() if cell}
