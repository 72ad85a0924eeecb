"""Keep a run that `rerun=true` replaces until the new run has its first checkpoint.

The old run's files are moved to `.replaced` in its folder. The new run's first checkpoint removes them; if the new run
ends without one, in whatever way, they are moved back. The steps and their order are such that a kill at any moment
loses neither run:

- `.replacing` holds a part of the old run: the files were being moved there or back, and the new run has written
  nothing. They are moved back.
- `.replaced` holds the whole old run. If there is a new checkpoint, it is removed; otherwise the new run's files are
  removed, and the old ones are moved back.
"""

import os
import shutil
from pathlib import Path

from retinue.evaluation.contributions import FILE as TEST_IMAGES
from retinue.runs.folders import EVALUATIONS, PREDICTIONS, PROBINGS
from retinue.runs.result_file import CLASSES, CONFIG, FAILED, RESULT
from retinue.tasks.not_finite import FOLDER as NOT_FINITE

MOVING, REPLACED = ".replacing", ".replaced"
# Files and folders that a run leaves, with its evaluations and predictions; a run without its result is not finished.
MADE_BY_A_RUN = (
    RESULT, FAILED, CONFIG, CLASSES, TEST_IMAGES, "metrics.csv", "curves.png", "checkpoints", "tensorboard", "wandb",
    NOT_FINITE, EVALUATIONS, PREDICTIONS, PROBINGS,
)  # fmt: skip


def set_aside(folder: Path) -> None:
    """Move what a run has left in its folder to `.replaced`."""
    moving = folder / MOVING
    moving.mkdir()
    for name in MADE_BY_A_RUN:
        if (folder / name).exists():
            os.replace(folder / name, moving / name)
    os.replace(moving, folder / REPLACED)


def is_undecided(folder: Path) -> bool:
    """Tell whether the folder holds a run that was set aside."""
    return (folder / MOVING).exists() or (folder / REPLACED).exists()


def recover(folder: Path) -> None:
    """Bring back the run that was set aside, unless the new run has a checkpoint; the run must be locked."""
    replaced, moving = folder / REPLACED, folder / MOVING
    if replaced.exists() and any((folder / "checkpoints").glob("*.ckpt")):
        discard(folder)
    elif replaced.exists():
        for name in MADE_BY_A_RUN:
            remove(folder / name)
        os.replace(replaced, moving)
    if moving.exists():
        # The result comes last: a run that has it is finished.
        for name in sorted(os.listdir(moving), key=lambda name: name == RESULT):
            os.replace(moving / name, folder / name)
        moving.rmdir()


def discard(folder: Path) -> None:
    """Remove the run that was set aside, if any."""
    if (folder / REPLACED).exists():
        shutil.rmtree(folder / REPLACED)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
