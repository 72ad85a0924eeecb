"""A trained run tested with token reductions, without training: quality against MACs and measured speed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from timm.layers import to_2tuple

from models.reduction.registry import NONE, find_reduction
from retinue.benchmarks.timing import Row, Timing, autocast, describe_device, interleave
from retinue.runs.evaluation import load_task, prepare
from retinue.runs.many import compose_evaluation, evaluate_run
from retinue.runs.result_file import read_result
from retinue.runs.training import build_data
from retinue.utils.command_line import to_text
from retinue.utils.files import replacing

# Colours of the lines, which can be told apart by colour-blind readers too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# Least time in seconds for which a net is called in each round, so that short calls are timed well.
MIN_SECONDS = 0.2


@dataclass(frozen=True)
class Candidate:
    """A reduction at one amount.

    Attributes:
        name: Name of the reduction, or "none".
        left: Share of the map's tokens that is left after the last block, about; 1 for "none".
        arguments: Arguments of the reduction that leave this share.
    """

    name: str
    left: float
    arguments: Mapping[str, Any]

    @property
    def overrides(self) -> list[str]:
        """Overrides of eval.py that choose the reduction."""
        return [f"model.reduction={to_text({'name': self.name, **self.arguments}) if self.arguments else self.name}"]


def list_candidates(names: Sequence[str], amounts: Sequence[float]) -> list[Candidate]:
    """Return the net as it is, and each reduction at each amount.

    Args:
        names: Names of reductions; "none" may be among them.
        amounts: Shares of the map's tokens that are left.

    Raises:
        ValueError: A name is unknown, or an amount is out of its range.
    """
    for amount in amounts:
        if not 0 < amount <= 1:
            raise ValueError(f"amounts must be shares of the tokens above 0 and at most 1, not {amount}")
    classes = {name: find_reduction(name) for name in dict.fromkeys(names) if name != NONE}
    shares = sorted(set(amounts), reverse=True)
    reduced = [Candidate(name, left, cls.arguments_for(left)) for name, cls in classes.items() for left in shares]
    return [Candidate(NONE, 1.0, {}), *reduced]


def test(run: Path, candidates: Sequence[Candidate], overrides: Sequence[str]) -> list[Row]:
    """Test the run's best weights with each candidate, unless that is done, and return a row for each.

    Args:
        run: Folder of the run.
        candidates: The candidates.
        overrides: Further overrides of eval.py.

    Raises:
        ValueError: An override is wrong, or the run's net takes no reduction.
    """
    rows, figure = [], main_figure(compose_evaluation(run, overrides))
    for candidate in candidates:
        result = read_result(evaluate_run(run, [*candidate.overrides, *overrides])) or {}
        low, high = result["metrics"].get(f"test/{figure}_ci95", (None, None))
        row: Row = {"what": candidate.name, "left": candidate.left, "arguments": describe(candidate)}
        row |= {figure: result["metrics"][f"test/{figure}"], f"{figure}_low": low, f"{figure}_high": high}
        rows.append(row | {"macs_g": result["macs"] / 1e9})
    return rows


def main_figure(cfg: DictConfig) -> str:
    """Return the name of the main figure of a run's task, such as `top1`."""
    return str(cfg.task.figure)


def describe(candidate: Candidate) -> str:
    """Return the arguments of a candidate, such as `keep=0.5`."""
    return " ".join(f"{name}={to_text(value)}" for name, value in candidate.arguments.items())


def measure(
    run: Path,
    candidates: Sequence[Candidate],
    overrides: Sequence[str],
    device: torch.device,
    batch_size: int,
    dtype: str,
    rounds: int,
) -> list[Row]:
    """Time inference with each candidate, all in turn in one process, and return the columns of each row.

    Args:
        run: Folder of the run.
        candidates: The candidates; speed-ups are relative to the first one.
        overrides: Further overrides of eval.py.
        device: Device of the measurement.
        batch_size: Number of images in a batch.
        dtype: "float32", or the type of autocast.
        rounds: How often each net is timed.
    """
    cfg = compose_evaluation(run, overrides)
    prepare(cfg)
    datamodule = build_data(cfg)
    height, width = map(int, to_2tuple(datamodule.image_size))
    images = torch.randn(batch_size, datamodule.in_chans, height, width, device=device)
    nets = {}
    for i, candidate in enumerate(candidates):
        task = load_task(compose_evaluation(run, [*candidate.overrides, *overrides]), datamodule)
        nets[str(i)] = task.model.to(device).eval()

    @torch.inference_mode()
    def infer(net: torch.nn.Module) -> None:
        with autocast(device, dtype):
            net(images)

    calls = {name: partial(infer, net) for name, net in nets.items()}
    timings: list[Timing] = [*interleave(calls, rounds, min_seconds=MIN_SECONDS).values()]
    shared: Row = {"image_size": f"{height}x{width}", "batch_size": batch_size, "dtype": dtype}
    shared["device"] = describe_device(device)
    return [
        {"images_per_s": batch_size / timing.median, "speedup": timing.speedup(timings[0]), **shared}
        for timing in timings
    ]


def plot(path: Path, rows: Sequence[Mapping[str, Any]], figure: str, title: str) -> None:
    """Plot the figure with its 95 % interval against MACs and against images/s, a line for each reduction.

    Args:
        path: The picture to write.
        rows: Rows of the table, the net without a reduction first.
        figure: Name of the figure, such as `top1`.
        title: Title of the picture.
    """
    from matplotlib.figure import Figure

    picture = Figure((11, 4.5), dpi=150, layout="constrained")
    columns = {"macs_g": "MACs of one image, G", "images_per_s": "images/s (inference)"}
    for axes, (column, label) in zip(picture.subplots(1, 2), columns.items(), strict=True):
        names = dict.fromkeys(str(row["what"]) for row in rows[1:])
        for name, colour in zip(names, COLOURS * len(names), strict=False):
            own = [rows[0], *(row for row in rows if row["what"] == name)]
            bars = None
            if all(row[f"{figure}_low"] is not None for row in own):
                bars = [
                    [row[figure] - row[f"{figure}_low"] for row in own],
                    [row[f"{figure}_high"] - row[figure] for row in own],
                ]
            x, y = [row[column] for row in own], [row[figure] for row in own]
            axes.errorbar(x, y, yerr=bars, marker="o", capsize=3, color=colour, label=name)
        axes.plot(rows[0][column], rows[0][figure], "k*", markersize=12, label=NONE, zorder=3)
        axes.set(xlabel=label, ylabel=f"test {figure} (bar: 95 % confidence interval over images)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    picture.suptitle(title, fontsize="small")
    with replacing(path) as temporary:
        picture.savefig(temporary)
