"""Test a trained run with token reductions, without training: a curve of accuracy against MACs and images/s.

    python scripts/compare_reduction.py run=outputs/classification/digits/deit_tiny/0a1b2c3d-s0
    python scripts/compare_reduction.py run=RUN reductions=[tome,evit] amounts=[0.9,0.7,0.5,0.3]
    python scripts/compare_reduction.py run=RUN device=cuda dtype=bfloat16 batch_size=256 trainer.precision=bf16-mixed

An amount is the share of the map's tokens that is left after the last block, about. All other keys are for eval.py,
whose evaluations these are: `eval.py run=RUN model.reduction=...`. A finished evaluation is not repeated. The net
without a reduction is always there, and speed-ups are relative to it. Speed is that of inference, all nets in turn in
one process. The net must be ViT-shaped; docs/reduction.md describes the reductions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from models.reduction import list_reductions
from retinue.benchmarks.timing import pick_device, print_rows, write_csv
from retinue.results.compare_reduction import list_candidates, main_figure, measure, plot, test
from retinue.runs.config import register_resolvers
from retinue.runs.many import compose_evaluation
from retinue.utils import command_line
from retinue.utils.errors import user_errors
from retinue.utils.paths import CONF


class Options(command_line.Options):
    run: Path = Field(description="folder of a trained run")
    reductions: list[str] | None = Field(None, min_length=1, description="reductions to compare; null: all")
    amounts: list[float] = Field(
        [0.75, 0.5, 0.25], min_length=1, description="shares of the map's tokens that are left after the last block"
    )
    batch_size: int = Field(32, ge=1, description="images in a batch of the measurement of speed")
    rounds: int = Field(5, ge=1, description="how often each net is timed")
    device: str = Field("auto", description="device of the measurement of speed: auto, cpu, cuda or cuda:N")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="type of that measurement")
    out: Path = Field(Path("compare_reduction"), description="folder of the table and the plot")


def main(arguments: Sequence[str] | None = None) -> None:
    options, overrides = Options.parse_some(arguments)
    candidates = list_candidates(options.reductions or list_reductions(), options.amounts)
    device = pick_device(options.device)
    register_resolvers()
    cfg = compose_evaluation(options.run, overrides)
    rows = test(options.run, candidates, overrides)
    speeds = measure(
        options.run, candidates, overrides, device, options.batch_size, options.dtype, options.rounds
    )  # fmt: skip
    rows = [row | speed for row, speed in zip(rows, speeds, strict=True)]
    title = f"{options.run}; speed on {rows[0]['device']}"
    print_rows(rows, title)
    table, picture = (options.out / f"reduction.{ending}" for ending in ("csv", "png"))
    write_csv(table, rows)
    plot(picture, rows, main_figure(cfg), title)
    print(table, picture)


if __name__ == "__main__":
    with user_errors(CONF, "eval"):
        main()
