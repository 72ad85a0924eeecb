"""See what a net looks at: each kind as a picture (PNG) and as data (CSV or npz).

    python scripts/see.py kind=erf model=swin                                # an untrained net, on the digits
    python scripts/see.py kind=attention run=outputs/classification/digits/deit_tiny/0a1b2c3d-s0 query=class
    python scripts/see.py kind=routes run=RUN query=[0.3,0.6] blocks=[stages.2.blocks.5.mixer]
    python scripts/see.py kind=cka run=RUN other=RUN
    python scripts/see.py kind=similarity run=RUN sizes=[64,128]

The files go to RUN/sight, where report.py finds the pictures, or without a run to sight in the current folder.
All other keys are for eval.py: `model=`, `weights=`, `data=`, `data.image_size=`, ... Kinds:
  erf         effective receptive field, and the area that holds 20 to 99 % of the contribution
  attention   attention of a query in each head     routes      tokens that sparse ops choose for a query
  distance    attention against distance            gradcam     class activation of the predicted class
  cka         similarity of blocks or nets          pca         principal components of tokens as colours
  frequency   high frequencies by depth             similarity  similarity and effective rank of tokens by depth
  influence   span that each head needs             heads       loss without each head
  sinks       massive activations and the tokens that receive most attention
  paths       loss without each path to the classifier of a ViT-shaped net
docs/sight.md describes them.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from retinue.benchmarks.timing import pick_device
from retinue.results.run_pictures import FOLDER, write_caption
from retinue.results.sight import WITH_QUERY, see
from retinue.results.sight.subject import Choices, load, read_query
from retinue.runs.config import register_resolvers
from retinue.utils import command_line
from retinue.utils.errors import user_errors
from retinue.utils.paths import CONF

Kind = Literal[
    "erf", "attention", "routes", "distance", "gradcam", "cka", "pca", "frequency", "similarity", "influence", "heads",
    "sinks", "paths",
]  # fmt: skip


class Options(command_line.Options):
    kind: Kind = Field(description="what is shown")
    run: Path | None = Field(None, description="folder of a trained run; null: the net that model= names")
    other: Path | None = Field(None, description="cka: folder of a second run; null: the same net")
    images: int = Field(64, ge=1, description="number of test images")
    pictures: int = Field(4, ge=1, description="number of images that are drawn, and of which attention is computed")
    query: list[str] = Field(
        ["0.5", "0.5"], description="attention, routes: [y,x] as shares of the height and width, or class"
    )
    blocks: list[str] | None = Field(None, min_length=1, description="names of blocks or attention modules; null: some")
    method: str = Field("gradcam", description="gradcam: gradcam, gradcampp, xgradcam or layercam")
    sizes: list[int] = Field([], description="frequency, similarity: further sizes of the images, px")
    device: str = Field("auto", description="device that computes: auto, cpu, cuda or cuda:N")
    out: Path | None = Field(
        None, description="folder of the pictures and data; null: sight in the run's folder, or here without a run"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options, overrides = Options.parse_some(arguments)
    query, device = read_query(options.query), pick_device(options.device)
    if options.other is not None and options.kind != "cka":
        raise ValueError(f"other=RUN is for kind=cka, not kind={options.kind}")
    if options.sizes and options.kind not in ("frequency", "similarity"):
        raise ValueError(f"sizes is for kind=frequency or similarity, not kind={options.kind}")
    register_resolvers()
    subject = load(options.run, overrides, options.images, device)
    other = None if options.other is None else load(options.other, overrides, options.images, device)
    resized = {
        size: load(options.run, [*overrides, f"data.image_size={size}"], options.images, device)
        for size in options.sizes
    }
    choices = Choices(options.pictures, query, options.blocks, options.method, other, resized)
    out = options.out or (options.run or Path()) / FOLDER
    out.mkdir(parents=True, exist_ok=True)
    see(options.kind, subject, choices, out)
    words = sys.argv[1:] if arguments is None else arguments
    shown = ",".join(options.query) if options.kind in WITH_QUERY else None
    write_caption(out, options.kind, shown, shlex.join(["python", "scripts/see.py", *words]))
    print(out)


if __name__ == "__main__":
    with user_errors(CONF, "eval"):
        main()
