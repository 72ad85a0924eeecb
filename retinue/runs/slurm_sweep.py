"""The runs of a sweep as Slurm jobs: `hydra/launcher=slurm`.

A finished run is not submitted again; a run that is queued or running is waited for. Unlike submitit's own launcher,
this one learns from a run's folder how the run ended. On a cluster without accounting, submitit would wait for ever for
a job that dies without a word, and one failing job would end the wait for all others.
"""

import json
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from omegaconf import DictConfig, OmegaConf, open_dict

from retinue.utils.errors import Stopped

# Hydra imports this module at every start, so modules that import torch are imported inside the functions.

ASK_SLURM_EVERY = 15  # seconds


@dataclass
class Run:
    """One run of the sweep.

    Attributes:
        overrides: the run's overrides.
        config: the run's config, Hydra's own section included.
        folder: the run's folder.
        job: id of the run's Slurm job; None if it has none.
        log: file of the job's standard error; None if the run was submitted by another command.
        old_result: modification time, in nanoseconds, of an existing result.json that does not count: a damaged one,
            or that of an evaluation, which is always rerun.
    """

    overrides: list[str]
    config: DictConfig
    folder: Path
    job: str | None = None
    log: Path | None = None
    old_result: int | None = None

    @property
    def finished(self) -> bool:
        return _time_of_result(self.folder) not in (None, self.old_result)


class NotFinishedError(ValueError):
    """Some runs of a sweep did not finish; each has its reason in its folder."""


class SlurmSweep(SlurmLauncher):
    """Submit the runs that need a job as one array, or one array for each kind of resources, and wait for all runs.

    Raises:
        ValueError: Slurm is not installed, or Slurm refuses a job.
        NotFinishedError: Some runs did not finish.
    """

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        if shutil.which("sbatch") is None:
            raise ValueError(
                "hydra/launcher=slurm needs Slurm's sbatch, which is not installed; "
                "scripts/local_slurm/start starts a Slurm on this machine"
            )
        from retinue.runs.slurm import list_jobs

        runs = [self._compose(list(overrides), initial_job_idx + i) for i, overrides in enumerate(job_overrides)]
        # Two lines of the grid may mean the same run.
        by_folder = {run.folder: run for run in runs}
        jobs = list_jobs()
        arrays: dict[str, list[Run]] = defaultdict(list)
        for run in by_folder.values():
            if _needs_job(run, jobs):
                arrays[json.dumps(_resources(run.config))].append(run)
        for resources, array in arrays.items():
            self._submit(json.loads(resources), array)
        try:
            not_finished = _wait(list(by_folder.values()))
        except KeyboardInterrupt:
            raise Stopped(
                signal.SIGINT,
                "the jobs go on; the same command waits for them again, scripts/sweep_status.py shows them",
            ) from None
        if not_finished:
            raise NotFinishedError(
                f"{not_finished} of {len(by_folder)} runs did not finish; the same command tries them again"
            )
        return [_job_return(run) for run in runs]

    def _compose(self, overrides: list[str], index: int) -> Run:
        """Compose a run's config and folder now, so that every start of its job takes them as they are."""
        assert self.config is not None and self.hydra_context is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        hydra = config.hydra
        with open_dict(hydra):
            hydra.job.num = index
            hydra.sweep.dir, hydra.sweep.subdir = str(Path(hydra.sweep.dir).absolute()), str(hydra.sweep.subdir)
        return Run(overrides, config, Path(hydra.sweep.dir, hydra.sweep.subdir))

    def _submit(self, resources: dict[str, Any], runs: list[Run]) -> None:
        """Submit the runs as one array of jobs, each with these arguments of submitit's executor."""
        import submitit
        from submitit.core.utils import FailedJobError

        from retinue.runs.identity import fingerprint
        from retinue.runs.result_file import git_commit
        from retinue.runs.slurm import Submission, run_submitted
        from retinue.runs.status import SUBMITTED
        from retinue.utils.files import write_text

        assert self.config is not None and self.hydra_context is not None and self.task_function is not None
        now, commit = time.time(), git_commit()
        shared = (self.hydra_context, self.task_function, Singleton.get_state(), now, commit)
        submissions = [Submission(run.config, self.config, run.overrides, *shared) for run in runs]
        executor = submitit.AutoExecutor(resources.pop("submitit_folder"), cluster="slurm")
        try:
            executor.update_parameters(**resources)
            jobs = executor.map_array(run_submitted, submissions)
        except FailedJobError as error:
            raise ValueError(f"Slurm refuses the job: {str(error).strip().splitlines()[-1]}") from error
        stamp = {"time": datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"), "git_commit": commit}
        for run, job in zip(runs, jobs, strict=True):
            run.job, run.log = job.job_id, job.paths.stderr
            run.folder.mkdir(parents=True, exist_ok=True)
            record = {"job": job.job_id, **stamp, "config_sha256": fingerprint(run.config)}
            write_text(run.folder / SUBMITTED, json.dumps(record, indent=2) + "\n")
            _say(f"job {job.job_id}: {_shown(run.folder)}")


def _resources(config: DictConfig) -> dict[str, Any]:
    """Return the arguments of submitit's executor for one run; arguments that are null are left to Slurm."""
    launcher = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    assert isinstance(launcher, dict)
    del launcher["_target_"], launcher["max_num_timeout"]
    if config.trainer.accelerator == "cpu":
        launcher["gpus_per_node"] = None
    # A failing rank must end the other ranks, which would wait for it. srun does not take the number of CPUs from
    # sbatch, so it is repeated here.
    launcher["srun_args"] = ["--kill-on-bad-exit=1", f"--cpus-per-task={launcher['cpus_per_task'] or 1}"]
    # submitit wants the prefix slurm_ on all arguments that it does not share with other executors.
    generic = {"submitit_folder", *OmegaConf.structured(BaseQueueConf)}
    return {(str(key) if key in generic else f"slurm_{key}"): value for key, value in launcher.items()}


def _needs_job(run: Run, jobs: frozenset[str] | None) -> bool:
    """Tell whether the run needs a new job, and prepare its folder for the job."""
    from retinue.runs.result_file import FAILED
    from retinue.runs.status import SUBMITTED, record_failure, status
    from retinue.runs.training import starts_anew

    state, detail = status(run.folder, jobs)
    if (run.folder / SUBMITTED).exists():
        run.job = json.loads((run.folder / SUBMITTED).read_text(encoding="utf-8"))["job"]
    if state in ("running", "queued"):
        _say(f"{state} already: {_shown(run.folder)}")
        return False
    is_evaluation = "rerun" not in run.config
    if is_evaluation or state == "unreadable":
        run.old_result = _time_of_result(run.folder)
    if is_evaluation:
        return True
    run.config.rerun = starts_anew(run.config, run.folder)
    if run.config.rerun:
        # The job sets the old run aside when it starts; until then the old result is none of the job's.
        run.old_result = _time_of_result(run.folder)
    elif state == "unreadable":
        record_failure(run.folder, detail)
        return False
    (run.folder / FAILED).unlink(missing_ok=True)
    return run.config.rerun or state != "finished"


def _wait(runs: list[Run]) -> int:
    """Wait until all runs have ended, say how each one ended, and return how many did not finish."""
    from retinue.runs.result_file import FAILED
    from retinue.runs.slurm import list_jobs
    from retinue.runs.status import record_failure, status

    waiting, not_finished = list(runs), 0
    asked = time.monotonic()
    while waiting:
        # Folders of the runs whose job Slurm no longer lists. The folders themselves are looked at every second.
        gone: set[Path] = set()
        if time.monotonic() - asked >= ASK_SLURM_EVERY:
            asked, jobs = time.monotonic(), list_jobs()
            if jobs is not None:
                gone = {run.folder for run in waiting if run.job not in jobs}
        for run in list(waiting):
            if not run.finished and not (run.folder / FAILED).exists():
                if run.folder not in gone or status(run.folder).state == "running":
                    continue
                record_failure(run.folder, f"job {run.job} ended without a result: {_last_line(run.log)}")
            waiting.remove(run)
            not_finished += not run.finished
            state, detail = status(run.folder)
            _say(f"{state}: {_shown(run.folder)}: {detail}")
        if waiting:
            time.sleep(1)
    return not_finished


def _last_line(log: Path | None) -> str:
    """Return the last line that the run itself wrote to its log, and the log's path."""
    if log is None or not log.exists():
        return "it has no log"
    lines = log.read_text(errors="replace").split("\n")
    # srun and slurmstepd add lines after those of the run.
    written = [line for line in lines if line.strip() and not line.startswith(("srun:", "slurmstepd:"))]
    return f"{written[-1].strip()[:300]} ({_shown(log)})" if written else f"nothing in its log {log}"


def _job_return(run: Run) -> JobReturn:
    metrics = json.loads((run.folder / "result.json").read_text(encoding="utf-8"))["metrics"]
    done = JobReturn(run.overrides, run.config, run.config, task_name=run.config.hydra.job.name)
    done.status, done.return_value = JobStatus.COMPLETED, metrics[f"test/{run.config.task.figure}"]
    return done


def _time_of_result(folder: Path) -> int | None:
    result = folder / "result.json"
    return result.stat().st_mtime_ns if result.exists() else None


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
