"""A run as a Slurm job: what the job executes, and how it returns to the queue.

A job keeps the folder and the config of its submission, even if conf/ changes while it waits. Before the time limit
Slurm sends SIGUSR2: the run saves and puts its job back in the queue, for at most `max_num_timeout` restarts. Before a
preemption or a requeue Slurm sends SIGTERM: the run saves and ends, and Slurm itself queues the job again. In both
cases the next start goes on from the checkpoint. Only `result.json` says whether a run is finished.
"""

import getpass
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobStatus, run_job, setup_globals
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from retinue.runs.config import register_resolvers
from retinue.runs.launch import rank
from retinue.runs.result_file import git_commit
from retinue.runs.status import record_failure
from retinue.utils.errors import Stopped
from retinue.utils.paths import PROJECT, own_packages

log = logging.getLogger(__name__)


class Submission(NamedTuple):
    """State at the time of submission that a job needs.

    Attributes:
        config: config of this run, Hydra's own section included.
        sweep_config: config of the sweep, from which Hydra composes each run's config.
        overrides: this run's overrides.
        context: Hydra's context.
        task: function that the job calls with the config.
        singletons: state of Hydra's singletons.
        time: seconds since the epoch.
        git_commit: commit of the project; None outside a git checkout.
    """

    config: DictConfig
    sweep_config: DictConfig
    overrides: Sequence[str]
    context: HydraContext
    task: Callable[[DictConfig], Any]
    singletons: dict[type, Any]
    time: float
    git_commit: str | None


def refuse_without_multirun() -> None:
    """Refuse `hydra/launcher=slurm` without `--multirun`, since Hydra ignores the launcher in a single run.

    Raises:
        ValueError: the command line asks for the launcher without `--multirun`.
    """
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.RUN and "max_num_timeout" in hydra.launcher:
        launcher = hydra.runtime.choices["hydra/launcher"]
        raise ValueError(f"hydra/launcher={launcher} needs -m, also for a single run: python train.py -m ...")


def run_submitted(submission: Submission) -> None:
    """Train the submitted run; the job executes this, and exits with a nonzero code if the run did not finish."""
    Singleton.set_state(submission.singletons)
    setup_globals()
    register_resolvers()
    # While the run trains, `Checkpoints` handles these signals.
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, _stop)
    config = submission.config
    if int(os.environ.get("SLURM_RESTART_COUNT", 0)) and "rerun" in config:
        # The job's first start has set the old run aside; a later one goes on with the new run.
        config.rerun = False
    config.hydra.job.id = os.environ["SLURM_JOB_ID"]
    # Keep submitit's own lines out of train.log.
    logging.getLogger("submitit").propagate = False

    def task(cfg: DictConfig) -> Any:
        if rank() == 0:
            for change in changes_since(submission):
                log.warning(change)
        return submission.task(cfg)

    try:
        done = run_job(
            task, config, "hydra.sweep.dir", "hydra.sweep.subdir", submission.context, configure_logging=rank() == 0
        )
    except Stopped as stop:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        print(stop, file=sys.stderr, flush=True)
        if stop.signum == signal.SIGUSR2 and rank() == 0:
            requeue(Path(config.hydra.sweep.dir, config.hydra.sweep.subdir), config.hydra.launcher.max_num_timeout)
        sys.exit(128 + stop.signum)
    if done.status == JobStatus.FAILED:
        # The public property `return_value` would raise the exception.
        traceback.print_exception(done._return_value)
        sys.exit(1)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number, f"stopped by {signal.Signals(number).name}; the same command goes on from there")


def requeue(folder: Path, max_restarts: int) -> None:
    """Put this job back in the queue, unless it has been restarted `max_restarts` times already, for any reason."""
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if restarts >= max_restarts:
        record_failure(folder, f"out of time after {restarts} restarts (hydra.launcher.max_num_timeout={max_restarts})")
        return
    print(f"back in the queue: restart {restarts + 1} of at most {max_restarts}", file=sys.stderr, flush=True)
    subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True, timeout=60)


def changes_since(submission: Submission) -> list[str]:
    """Return a sentence for each difference of conf/ and of the code from their state at the submission."""
    from retinue.runs.training import difference

    changes: list[str] = []
    try:
        now = submission.context.config_loader.load_sweep_config(submission.sweep_config, list(submission.overrides))
        changed = difference(now, submission.config)
    except Exception as error:
        # This run does not need the conf/ of today, so an error in it must not end the run.
        changed = f"an error: {str(error).splitlines()[0]}"
    if changed:
        changes.append(f"since the submission conf/ has changed to {changed}; the run is trained as submitted")
    if files := code_newer_than(submission.time):
        commit = git_commit()
        moved = "" if commit == submission.git_commit else f", from commit {submission.git_commit} to {commit}"
        listed = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
        changes.append(f"since the submission the code has changed{moved}, and is taken as it is now: {listed}")
    return changes


def code_newer_than(time: float) -> list[str]:
    """Return the project's Python files that were written after `time`, including files that git does not track."""
    patterns = [f"{package}/*.py" for package in sorted(own_packages())]
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *patterns], cwd=PROJECT, capture_output=True, text=True
    )
    paths = [PROJECT / name for name in listed.stdout.splitlines()] if listed.returncode == 0 else []
    return [str(path.relative_to(PROJECT)) for path in paths if path.exists() and path.stat().st_mtime > time]


def list_jobs() -> frozenset[str] | None:
    """Return the ids of this user's pending and running jobs, or None if Slurm does not answer.

    The jobs of an array have ids such as `12_3`.
    """
    command = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%i"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return frozenset(listed.stdout.split()) if listed.returncode == 0 else None
