"""Many runs that are no grid: trained here one after the other or as Slurm jobs, and evaluated."""

import contextlib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from retinue.runs.config import allow_run_keys, with_run
from retinue.runs.evaluation import evaluate
from retinue.runs.result_file import RESULT, read_result
from retinue.runs.slurm_sweep import NotFinishedError
from retinue.runs.status import status
from retinue.runs.training import train
from retinue.utils.paths import CONF

Key = TypeVar("Key", bound=Hashable)

# Maximum length of a reason for which a run failed, in characters.
MAX_REASON_LENGTH = 200


def compose_runs(runs: Mapping[Key, Sequence[str]], folder: Path) -> dict[Key, DictConfig]:
    """Compose the configs of runs of train.py.

    Args:
        runs: Overrides of each run.
        folder: Folder of the runs.
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        run_dir = f"run_dir={folder}/${{run_folder:}}"
        return {key: compose("train", [*_without_hydra(overrides), run_dir]) for key, overrides in runs.items()}


def _without_hydra(overrides: Sequence[str]) -> list[str]:
    return [override for override in overrides if not _is_for_hydra(override)]


def _is_for_hydra(override: str) -> bool:
    """Tell whether an override is of Hydra's own section, which only a launcher reads."""
    return override.lstrip("+").startswith("hydra.")


def train_all(runs: Mapping[Key, Sequence[str]], folder: Path, launcher: str | None = None) -> dict[Key, Path | str]:
    """Train all runs except for those that are finished.

    Args:
        runs: Overrides of each run; those of Hydra's own section (`hydra.launcher.partition=gpu`) go to the launcher.
        folder: Folder of the runs.
        launcher: Name in conf/hydra/launcher, such as `slurm`; None trains in this process, one run after the other.

    Returns:
        The folder of each run that is finished, or the reason in one line why it is not.

    Raises:
        ValueError: An override is wrong, or Slurm is not there.
    """
    # Compose all configs first, so that a mistake in the overrides is an error before anything runs.
    configs = compose_runs(runs, folder)
    if launcher is not None:
        _train_as_jobs(runs, folder, launcher)
    ended: dict[Key, Path | str] = {}
    for key, cfg in configs.items():
        path = Path(cfg.run_dir)
        try:
            if launcher is None:
                train(cfg)
            elif read_result(path) is None:
                state = status(path)
                raise RuntimeError(state.detail or state.state)
        except Exception as error:
            # Whatever is wrong with one run must not stop the others.
            ended[key] = one_line(error)
        else:
            ended[key] = path
    return ended


def _train_as_jobs(runs: Mapping[Any, Sequence[str]], folder: Path, launcher: str) -> None:
    """Submit the runs that are not finished as jobs, and wait for all; runs that fail have their reason in a file."""
    settings = dict.fromkeys(text for overrides in runs.values() for text in overrides if _is_for_hydra(text))
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="train"):
        loader = GlobalHydra.instance().config_loader()
        choices = [f"hydra/launcher={launcher}", f"hydra.sweep.dir={folder}", *settings]
        config = loader.load_configuration("train", choices, RunMode.MULTIRUN)
        HydraConfig.instance().set_config(config)
        context = HydraContext(config_loader=loader, callbacks=Callbacks())
        jobs = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=_train_job, config=config)
        # The caller reads in its folder why a run did not finish.
        with contextlib.suppress(NotFinishedError):
            jobs.launch([_without_hydra(overrides) for overrides in runs.values()], 0)


def one_line(error: Exception) -> str:
    """Return an exception's type and message as one line of limited length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:MAX_REASON_LENGTH]


def _train_job(cfg: DictConfig) -> float:
    return train(cfg)[f"test/{cfg.task.figure}"]


def compose_evaluation(run: Path, overrides: Sequence[str]) -> DictConfig:
    """Compose the config of an evaluation of a run, as eval.py does.

    Args:
        run: Folder of the run.
        overrides: Overrides of eval.py, such as `data.image_size=32`.

    Raises:
        ValueError: There is no such run, or an override is wrong.
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        choices = allow_run_keys([f"run={run}", *overrides])
        cfg = compose("eval", [*choices, "run_dir=${evaluation_folder:}"])
        # The folder follows from the config as composed, before the run's own values are filled in.
        cfg.run_dir = str(cfg.run_dir)
    return with_run(cfg, choices, ())


def evaluate_run(run: Path, overrides: Sequence[str]) -> Path:
    """Evaluate a finished run with some keys changed, unless that is done, and return the evaluation's folder.

    Args:
        run: Folder of the run.
        overrides: As in `compose_evaluation`.

    Raises:
        ValueError: An override is wrong, or the net does not take such images.
    """
    cfg = compose_evaluation(run, overrides)
    folder = Path(cfg.run_dir)
    # A run that was trained anew has another result than the one that was evaluated.
    is_done = read_result(folder) is not None and _modified(folder) > _modified(run)
    if not is_done:
        evaluate(cfg)
    return folder


def _modified(folder: Path) -> float:
    return (folder / RESULT).stat().st_mtime
