"""A run as a job of Slurm: what the job does with it, and how it comes back to the queue.

Each run keeps the folder and the config of its submission, whatever becomes of conf/ while it waits. Before the time
limit Slurm sends SIGUSR2: the run saves and puts its job back in the queue, up to `max_num_timeout` restarts. Before a
preemption or a requeue it sends SIGTERM: the run saves and ends, and Slurm queues it by itself. Either way the next
start goes on from the checkpoint. Whether a run is finished, only its `result.json` says.
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
from retinue.runs.result import git_commit
from retinue.runs.status import record_failure
from retinue.utils.errors import Stopped
from retinue.utils.paths import PROJECT, own_packages

log = logging.getLogger(__name__)


class Submission(NamedTuple):
    """What a job needs, as it was when it was submitted."""

    config: DictConfig  # of this run, Hydra's own part included
    sweep_config: DictConfig
    overrides: Sequence[str]
    context: HydraContext
    task: Callable[[DictConfig], Any]
    singletons: dict[type, Any]
    time: float
    git_commit: str | None


def refuse_without_multirun() -> None:
    """
    Raises:
        ValueError: `hydra/launcher=slurm` is asked for, but Hydra has no launcher take part in a single run.
    """
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.RUN and "max_num_timeout" in hydra.launcher:
        launcher = hydra.runtime.choices["hydra/launcher"]
        raise ValueError(f"hydra/launcher={launcher} goes with -m, for a single run, too: python train.py -m ...")


def run_submitted(submission: Submission) -> None:
    """The job. Ends the process with a code that is not 0 where the run did not finish."""
    Singleton.set_state(submission.singletons)
    setup_globals()
    register_resolvers()
    for number in (signal.SIGTERM, signal.SIGUSR2):  # while it trains, `Checkpoints` has them
        signal.signal(number, _stop)
    config = submission.config
    config.hydra.job.id = os.environ["SLURM_JOB_ID"]
    logging.getLogger("submitit").propagate = False  # its own lines are none of train.log's

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
        traceback.print_exception(done._return_value)  # `return_value` would raise it
        sys.exit(1)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number, f"stopped by {signal.Signals(number).name}; the same command goes on from there")


def requeue(folder: Path, at_most: int) -> None:
    """Put this job back in the queue, unless it has been restarted `at_most` times already, for whatever cause."""
    times = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if times >= at_most:
        record_failure(folder, f"out of time after {times} restarts (hydra.launcher.max_num_timeout={at_most})")
        return
    print(f"back in the queue, for the {times + 1}. of {at_most} times", file=sys.stderr, flush=True)
    subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True, timeout=60)


def changes_since(submission: Submission) -> list[str]:
    """In a sentence each, how conf/ and the code differ from what was there at submission."""
    from retinue.runs.training import difference

    changes: list[str] = []
    try:
        now = submission.context.config_loader.load_sweep_config(submission.sweep_config, list(submission.overrides))
        changed = difference(now, submission.config)
    except Exception as error:  # whatever is wrong with it, this run does not depend on it
        changed = f"an error: {str(error).splitlines()[0]}"
    if changed:
        changes.append(f"since the submission conf/ has changed to {changed}; the run is trained as submitted")
    if files := newer_code(submission.time):
        commits = {submission.git_commit, git_commit()}
        moved = f", from commit {submission.git_commit} to {git_commit()}" if len(commits) > 1 else ""
        listed = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
        changes.append(f"since the submission the code has changed{moved}, and is taken as it is now: {listed}")
    return changes


def newer_code(time: float) -> list[str]:
    """The Python files of a run that were written after `time`, those included that git does not know yet."""
    patterns = [f"{package}/*.py" for package in sorted(own_packages())]
    found = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *patterns], cwd=PROJECT, capture_output=True, text=True
    )
    paths = [PROJECT / name for name in found.stdout.splitlines()] if found.returncode == 0 else []
    return [str(path.relative_to(PROJECT)) for path in paths if path.exists() and path.stat().st_mtime > time]


def queue() -> frozenset[str] | None:
    """This user's jobs, pending and running, an array's each by itself (`12_3`); None where Slurm does not answer."""
    command = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%i"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return frozenset(listed.stdout.split()) if listed.returncode == 0 else None
