"""Draw batches as a net receives them, with their truth, and plot the learning rate of a recipe.

    python scripts/browse.py data=image_folder data.root=DIR recipe=deit out=browse
    python scripts/browse.py task=detection epoch=3 batches=1 images=8

All other keys are those of `train.py`. `train-<n>.png` shows the batches that a run with the same keys trains on in
that epoch, augmented and mixed; `val-<n>.png` those of its validation; `schedule.png` the learning rate over the
training.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from retinue.runs.arguments import choose_for_few_images, quote_brackets
from retinue.runs.browse import browse
from retinue.runs.config import register_resolvers
from retinue.runs.many import compose_runs
from retinue.utils import command_line
from retinue.utils.errors import user_errors
from retinue.utils.paths import CONF


class Options(command_line.Options):
    batches: int = Field(2, ge=1, description="batches of training and of validation")
    images: int = Field(32, ge=1, description="largest number of images of a batch that are drawn")
    epoch: int = Field(0, ge=0, description="epoch of the training batches")
    out: Path = Field(Path("browse"), description="folder of the pictures")


def main(arguments: Sequence[str] | None = None) -> None:
    options, overrides = Options.parse_some(arguments)
    register_resolvers()
    overrides = choose_for_few_images(quote_brackets(overrides))
    [cfg] = compose_runs({None: overrides}, Path("outputs")).values()
    for path in browse(cfg, options.batches, options.images, options.epoch, options.out):
        print(path)


if __name__ == "__main__":
    with user_errors(CONF, "train"):
        main()
