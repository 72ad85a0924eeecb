"""`hydra/launcher=slurm`: the runs of a sweep as jobs of Slurm. (Hydra finds its plug-ins in packages of this name.)

What is finished is not submitted again, and what waits or runs already is waited for. Unlike submitit's own launcher,
it learns from a run's folder how the run went: for a job that dies without a word, submitit would wait for ever where
Slurm keeps no accounts, and one job that fails would end the wait for all the others.
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

ASK_SLURM_EVERY = 15  # seconds; the folders are looked at every second


@dataclass
class Run:
    """One of the sweep's."""

    overrides: list[str]
    config: DictConfig  # Hydra's own part included
    folder: Path
    job: str | None = None
    log: Path | None = None
    old_result: int | None = None  # its time, where one lay there: of an evaluation, which is done again

    @property
    def finished(self) -> bool:
        return _time_of_result(self.folder) not in (None, self.old_result)


class SlurmSweep(SlurmLauncher):
    """Submits what is missing as one array, or one for each kind of resources, and waits for it.

    Raises:
        ValueError: there is no Slurm, it takes no such job, or some runs did not finish.
    """

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        if shutil.which("sbatch") is None:
            raise ValueError(
                "hydra/launcher=slurm needs Slurm's sbatch, which is not here; "
                "scripts/local_slurm/start starts a Slurm on this machine"
            )
        from retinue.runs.slurm import queue

        runs = [self._compose(list(overrides), initial_job_idx + i) for i, overrides in enumerate(job_overrides)]
        by_folder = {run.folder: run for run in runs}  # two lines of the grid may mean the same run
        listed = queue()
        missing = [run for run in by_folder.values() if _to_submit(run, listed)]
        arrays: dict[str, list[Run]] = defaultdict(list)
        for run in missing:
            arrays[json.dumps(_resources(run.config))].append(run)
        for resources, array in arrays.items():
            self._submit(json.loads(resources), array)
        try:
            unfinished = _wait(list(by_folder.values()))
        except KeyboardInterrupt:
            raise Stopped(
                signal.SIGINT,
                "the jobs go on; the same command waits for them again, scripts/sweep_status.py shows them",
            ) from None
        if unfinished:
            raise ValueError(f"{unfinished} of {len(by_folder)} runs did not finish; the same command tries them again")
        return [_job_return(run) for run in runs]

    def _compose(self, overrides: list[str], index: int) -> Run:
        """The config is fixed now, and with it the folder: each start of the job takes them as they are."""
        assert self.config is not None and self.hydra_context is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        hydra = config.hydra
        with open_dict(hydra):
            hydra.job.num = index
            hydra.sweep.dir, hydra.sweep.subdir = str(Path(hydra.sweep.dir).absolute()), str(hydra.sweep.subdir)
        return Run(overrides, config, Path(hydra.sweep.dir, hydra.sweep.subdir))

    def _submit(self, resources: dict[str, Any], runs: list[Run]) -> None:
        import submitit
        from submitit.core.utils import FailedJobError

        from retinue.runs.identity import fingerprint
        from retinue.runs.result import git_commit
        from retinue.runs.slurm import Submission, run_submitted
        from retinue.runs.status import SUBMITTED
        from retinue.utils.files import write_text

        assert self.config is not None and self.hydra_context is not None and self.task_function is not None
        now, commit = time.time(), git_commit()
        common = (self.hydra_context, self.task_function, Singleton.get_state(), now, commit)
        submissions = [Submission(run.config, self.config, run.overrides, *common) for run in runs]
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
    """Arguments of submitit's executor for one run; what is not set is left to Slurm."""
    launcher = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    assert isinstance(launcher, dict)
    del launcher["_target_"], launcher["max_num_timeout"]
    if config.trainer.accelerator == "cpu":
        launcher["gpus_per_node"] = None
    # A rank that fails ends the others, which would wait for it; srun would not take the number of CPUs from sbatch.
    launcher["srun_args"] = ["--kill-on-bad-exit=1", f"--cpus-per-task={launcher['cpus_per_task'] or 1}"]
    generic = {"submitit_folder", *OmegaConf.structured(BaseQueueConf)}  # submitit wants the others with a prefix
    return {(str(key) if key in generic else f"slurm_{key}"): value for key, value in launcher.items()}


def _to_submit(run: Run, queue: frozenset[str] | None) -> bool:
    """Whether the run needs a job; its folder is then ready for one."""
    from retinue.runs.status import FAILED, SUBMITTED, attempt, status
    from retinue.runs.training import clear, starts_anew

    state = status(run.folder, queue).state
    if (run.folder / SUBMITTED).exists():
        run.job = json.loads((run.folder / SUBMITTED).read_text())["job"]
    if state in ("running", "queued"):
        _say(f"{state} already: {_shown(run.folder)}")
        return False
    if "rerun" not in run.config:  # an evaluation
        run.old_result = _time_of_result(run.folder)
        return True
    if starts_anew(run.config, run.folder):
        with attempt(run.folder):
            clear(run.folder)
        state = "missing"
    run.config.rerun = False  # done
    (run.folder / FAILED).unlink(missing_ok=True)
    return state != "finished"


def _wait(runs: list[Run]) -> int:
    """Until all runs have ended; tells how each went, and returns how many did not finish."""
    from retinue.runs.slurm import queue
    from retinue.runs.status import FAILED, record_failure, status

    waiting, unfinished = list(runs), 0
    asked = time.monotonic()
    while waiting:
        gone = frozenset()
        if time.monotonic() - asked >= ASK_SLURM_EVERY:
            asked, listed = time.monotonic(), queue()
            if listed is not None:
                gone = frozenset(run.folder for run in waiting if run.job not in listed)
        for run in list(waiting):
            if not run.finished and not (run.folder / FAILED).exists():
                if run.folder not in gone or status(run.folder).state == "running":
                    continue
                record_failure(run.folder, f"job {run.job} ended without a result: {_last_line(run.log)}")
            waiting.remove(run)
            unfinished += not run.finished
            state, detail = status(run.folder)
            _say(f"{state}: {_shown(run.folder)}: {detail}")
        time.sleep(1 if waiting else 0)
    return unfinished


def _last_line(log: Path | None) -> str:
    lines = log.read_text(errors="replace").split("\n") if log and log.exists() else []
    # srun and slurmstepd add their own to what the run has said.
    said = [line for line in lines if line.strip() and not line.startswith(("srun:", "slurmstepd:"))]
    return f"{said[-1].strip()[:300]} ({_shown(log)})" if said and log else f"nothing in its log {log or ''}".strip()


def _job_return(run: Run) -> JobReturn:
    metrics = json.loads((run.folder / "result.json").read_text())["metrics"]
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
