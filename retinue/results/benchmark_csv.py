"""Speed and memory that `scripts/benchmark_models.py` measured, joined to the runs of the same nets."""

import csv
from collections.abc import Sequence
from pathlib import Path

from retinue.results.collection import Run


def join_benchmarks(runs: Sequence[Run], path: str | Path) -> None:
    """Add the measured inference of each run's net to the run's `values`.

    The names are `inference_ms_per_image`, `inference_images_per_s` and `inference_peak_mb` (MB, 10^6 bytes). A run
    whose net is not in the file stays as it is.

    Args:
        runs: Runs, which are changed.
        path: CSV file that `benchmark_models.py` wrote.

    Raises:
        ValueError: The file cannot be read, has other columns, has no row of inference, or has two rows for a net.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("mode", "inference") == "inference"]
        measured: dict[str, dict[str, float | None]] = {}
        for row in rows:
            if row["what"] in measured:
                raise ValueError(f"{row['what']} has more than one row: benchmarks takes one shape, dtype and device")
            speed = float(row["images_per_s"])
            measured[row["what"]] = {
                "inference_ms_per_image": 1000 / speed,
                "inference_images_per_s": speed,
                "inference_peak_mb": float(row["peak_mb"]) if row["peak_mb"] else None,
            }
    except OSError as error:
        raise ValueError(f"benchmarks={path}: {error.strerror}") from None
    except KeyError as error:
        raise ValueError(f"benchmarks={path} has no column {error}; benchmark_models.py writes the file") from None
    if not measured:
        raise ValueError(f"benchmarks={path} has no row of inference")
    for run in runs:
        run.values.update(measured.get(str(run.values.get("model")), {}))
