"""A run's one result, `result.json`, and how a person reads it."""

import json
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from retinue.utils.files import write_text
from retinue.utils.paths import PROJECT

CONFIG, RESULT, FAILED = "config.yaml", "result.json", "failed.json"  # of a run: as it was composed, how it ended
PACKAGES = ("torch", "torchvision", "timm", "pytorch-lightning", "numpy")


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run; None where there is none (yet)."""
    path = folder / RESULT
    return json.loads(path.read_text()) if path.exists() else None


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write `result.json` atomically; the last thing that a run does."""
    write_text(folder / RESULT, json.dumps(result, indent=2) + "\n")


def provenance() -> dict[str, Any]:
    """Versions, commit, device name and peak memory (MiB: of the GPU, or the process's resident set on a CPU)."""
    import torch

    cuda = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
    unit = 2**20 if sys.platform == "darwin" else 2**10  # getrusage: bytes on macOS, KiB elsewhere
    peak = (
        torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    )
    return {
        "peak_memory_mb": round(peak, 1),
        "device": torch.cuda.get_device_name()
        if cuda
        else f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """The project's commit, with `+changes` where files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=PROJECT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def show_result(result: dict[str, Any], folder: Path) -> None:
    """One table, and the path of the run folder."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['model']} on {result['data']}", show_header=False, title_justify="left")
    figures = result["metrics"]
    for name, value in figures.items():
        if isinstance(value, float | int):
            low_high = figures.get(f"{name}_ci95")
            text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            table.add_row(name, text + (f"  ({low_high[0]:.4f} to {low_high[1]:.4f})" if low_high else ""))
    for name in ("params", "macs"):
        if result.get(name):
            table.add_row(name, f"{result[name] / 1e6:,.2f} M")
    for name in ("epochs", "seconds", "images_per_second", "peak_memory_mb"):
        if result.get(name) is not None:
            table.add_row(name, f"{result[name]:,.0f}")
    console = Console()
    console.print(table)
    console.print(str(folder), soft_wrap=True, highlight=False)
