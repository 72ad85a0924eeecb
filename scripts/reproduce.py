"""Print a paper's table with our figures beside the paper's.

    python scripts/reproduce.py paper=biformer
    python scripts/reproduce.py paper=biformer measure=true batch_size=64 out=biformer.md
    python scripts/reproduce.py paper=cswin weights.cswin_tiny=cswin_tiny_224.pth data.root=/data/in1k
    python scripts/reproduce.py paper=cswin table=detection

Parameters and MACs are counted now. Accuracy is that of finished runs of `train.py` below `outputs`, or, if `weights`
and `data` say what to evaluate, of the authors' checkpoints. `measure=true` adds images/s and peak memory of inference.
A figure of ours that differs from the paper's by more than the tolerance is marked ✗, or * if the reason is known.
What is missing is listed below the table, with the command that produces it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from rich.console import Console
from rich.table import Table

from retinue.benchmarks.timing import describe_device, pick_device
from retinue.results.paper_table import SUFFIXES, format_rows, list_missing, list_reasons, write_rows
from retinue.results.papers import read_paper
from retinue.results.reproduce import measure_inference, reproduce
from retinue.utils import command_line
from retinue.utils.errors import user_errors


class Options(command_line.Options):
    paper: str = Field(description="name of a paper, such as biformer; docs/papers.md lists them")
    table: Literal["variants", "detection", "segmentation"] = Field("variants", description="which of its tables")
    weights: dict[str, str] = Field({}, description="the authors' checkpoint (a file) of this net")
    data: dict[str, Any] = Field({}, description="data.root=DIR and other keys of conf/data/imagenet.yaml, for weights")
    measure: bool = Field(False, description="measure images/s and peak memory of inference")
    batch_size: int = Field(32, ge=1, description="images in a batch of the evaluation and the measurement")
    device: str = Field("auto", description="device of the measurement: auto, cpu, cuda or cuda:N")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="type of the measurement")
    folder: Path | None = Field(None, description="folder of the finished runs; null: outputs, if it holds any")
    out: Path | None = Field(None, description=f"file to write, which ends in {' or '.join(SUFFIXES)}")


def main(arguments: Sequence[str] | None = None) -> None:
    options = Options.parse(arguments)
    if options.out:
        command_line.check_suffixes("out", [options.out], SUFFIXES)
    paper, table = options.paper, options.table
    rows = reproduce(paper, table, options.weights, options.data, options.batch_size, options.folder)
    title = f"{read_paper(paper)['title']}: {table}, the paper's / ours"
    remarks = list_reasons(rows)
    if options.measure:
        if table == "variants":
            measure_inference(rows, options.batch_size, options.device, options.dtype)
        device = describe_device(pick_device(options.device))
        remarks.append(f"measured on {device}, batch {options.batch_size}, {options.dtype}")
    remarks += list_missing(paper, table, rows)

    headings, *lines = format_rows(rows, table)
    shown = Table(*headings)
    for line in lines:
        shown.add_row(*line)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(title, soft_wrap=True, highlight=False, markup=False)
    console.print(shown)
    for remark in remarks:
        console.print(remark, soft_wrap=True, highlight=False, markup=False)
    if options.out:
        write_rows(options.out, rows, title, table, remarks)


if __name__ == "__main__":
    with user_errors():
        main()
