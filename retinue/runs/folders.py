"""Folders of runs and evaluations: which a command may use, and which empty ones it leaves behind after an error."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from retinue.runs.result_file import CONFIG, FAILED, RESULT, read_result

# Folders in the folder of a run, and in `outputs`, for the evaluations, the predictions and the probings of nets.
EVALUATIONS, PREDICTIONS, PROBINGS = "evaluation", "predictions", "probing"
# Beside config.yaml one of these shows that a folder is a run's; other projects have a config.yaml, too.
SIGNS_OF_A_RUN = (RESULT, FAILED, "metrics.csv", "checkpoints")


class MissingFolders(Callback):
    """Hydra callback that remembers which folders are not there before the command makes them (conf/train.yaml).

    Attributes:
        found: The folders that were missing when the command began; None if no command has begun.
    """

    found: frozenset[Path] | None = None

    def on_run_start(self, config: DictConfig, **kwargs: object) -> None:
        """Remember the missing folders of a single run."""
        MissingFolders.found = None
        # A folder that cannot be told is the error that the run itself reports.
        with contextlib.suppress(OmegaConfBaseException):
            MissingFolders.found = missing_folders(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        """Remember the missing folders of a sweep; those below the sweep's own folder are made by runs."""
        MissingFolders.found = missing_folders(Path(config.hydra.sweep.dir))


def missing_folders(folder: Path) -> frozenset[Path]:
    """Return the folder and the folders above it that do not exist."""
    path = folder.absolute()
    return frozenset(part for part in (path, *path.parents) if not part.exists())


# Files that Hydra's logging writes into the folder of a run or an evaluation.
LOGS = {"train.log", "eval.log", "predict.log", "probe.log"}


@contextlib.contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """Remove the run's folder, and the empty folders above it, if the block fails before anything is written there.

    A log alone is removed too: what it says stands on the screen.

    Above the working folder, only folders that the command has made are removed.
    """
    try:
        yield
    except BaseException:
        path, here, made = folder.absolute(), Path.cwd(), MissingFolders.found or frozenset()
        # listdir raises an OSError if there is no folder, and rmdir if it is not empty.
        with contextlib.suppress(OSError):
            if set(os.listdir(path)) <= LOGS:
                for name in LOGS:
                    (path / name).unlink(missing_ok=True)
            while path in made or (path != here and path.is_relative_to(here)):
                path.rmdir()
                path = path.parent
        raise


def is_run(folder: Path) -> bool:
    """Tell whether a folder is that of a training run, not of an evaluation."""
    return (folder / CONFIG).is_file() and any((folder / name).exists() for name in SIGNS_OF_A_RUN)


def refuse_inside_a_run(folder: Path) -> None:
    """Refuse a folder inside the folder of a run, except for a run's own evaluations, predictions and probings.

    Raises:
        ValueError: The folder lies inside a run.
    """
    path = folder.absolute()
    for above in path.parents:
        if is_run(above) and path.parent not in (above / EVALUATIONS, above / PREDICTIONS, above / PROBINGS):
            raise ValueError(
                f"{folder} lies inside the run {above}, which rerun=true would move away: choose another hydra.run.dir"
            )


def refuse_over_a_run(folder: Path) -> None:
    """Refuse an evaluation or predictions in the folder of a training run.

    Raises:
        ValueError: The folder holds a run, or checkpoints.
    """
    if is_run(folder) or (folder / "checkpoints").exists():
        raise ValueError(f"{folder} holds a run, whose files could be replaced: choose another folder")


def foreign_content(folder: Path, digest: str) -> str | None:
    """Return what a folder without a config.yaml holds that is not of the run with this fingerprint, or None.

    Args:
        folder: Folder for a training run.
        digest: Fingerprint of the run's config.

    Raises:
        ValueError: The folder's result is damaged.
    """
    result = read_result(folder)
    if result is not None and "weights" in result:
        return "an evaluation"
    if result is not None and result.get("config_sha256") != digest:
        return f"a {RESULT} without its {CONFIG}"
    if result is None and any((folder / "checkpoints").glob("*.ckpt")):
        return f"checkpoints without their {CONFIG}"
    return None
