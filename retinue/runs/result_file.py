"""The files in which a run says how it ended, and `result.json` as a person reads it."""

import json
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from retinue.utils.files import write_text
from retinue.utils.paths import PROJECT

# Files of a run's folder: the composed config; the classes that the net predicts; the result of a finished run; the
# reason why a run failed.
CONFIG, CLASSES, RESULT, FAILED = "config.yaml", "classes.json", "result.json", "failed.json"
# Keys that the config of every run has.
SECTIONS = {"task", "data", "model", "head", "recipe", "trainer", "seed"}
PACKAGES = ("torch", "torchvision", "timm", "pytorch-lightning", "numpy")


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return the result of a finished run, or None if the run has none yet.

    Raises:
        ValueError: `result.json` is damaged.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; remove it and start the same command again") from None
    if not isinstance(result, dict) or not isinstance(result.get("metrics"), dict):
        raise ValueError(f"{path} cannot be read: it holds no metrics; remove it and start the same command again")
    return result


def read_config(folder: Path) -> DictConfig | None:
    """Return the config of the run in `folder`, or None if the folder has none.

    Raises:
        ValueError: `config.yaml` is damaged.
    """
    path = folder / CONFIG
    if not path.exists():
        return None
    try:
        config = OmegaConf.load(path)
        if not isinstance(config, DictConfig) or not config.keys() >= SECTIONS:
            raise ValueError("it is no whole config of a run")
        return config
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} cannot be read: {reason}; put a copy of it there, or start the run anew with rerun=true"
        ) from None


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write `result.json`, whole or not at all; a run does this last."""
    write_text(folder / RESULT, json.dumps(result, indent=2) + "\n")


def provenance() -> dict[str, Any]:
    """Return what a result was made with: peak memory, device, versions of packages and the project's commit.

    `peak_memory_mb` is in MiB: memory allocated on the GPU, or the process's resident set if it used no GPU.
    """
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        peak = torch.cuda.max_memory_allocated() / 2**20
        device = torch.cuda.get_device_name()
    else:
        # getrusage counts bytes on macOS, KiB elsewhere.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        device = f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    return {
        "peak_memory_mb": round(peak, 1),
        "device": device,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """Return the project's commit, with `+changes` if files differ from it; None outside a git checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def show_result(result: dict[str, Any], folder: Path) -> None:
    """Print a result as one table, followed by the path of the run's folder."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['model']} on {result['data']}", show_header=False, title_justify="left")
    metrics = result["metrics"]
    for name, value in metrics.items():
        if isinstance(value, float | int):
            interval = metrics.get(f"{name}_ci95")
            text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            table.add_row(name, text + (f"  ({interval[0]:.4f} to {interval[1]:.4f})" if interval else ""))
    for name in ("params", "trainable_params", "macs"):
        if result.get(name):
            table.add_row(name, f"{result[name] / 1e6:,.2f} M")
    for name in ("epochs", "seconds", "images_per_second", "peak_memory_mb"):
        if result.get(name) is not None:
            table.add_row(name, f"{result[name]:,.0f}")
    console = Console()
    console.print(table)
    console.print(str(folder), soft_wrap=True, highlight=False)
