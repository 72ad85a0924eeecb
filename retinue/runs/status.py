"""What a run's folder says about the run, and whose turn it is: one process writes there at a time."""

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from retinue.runs.launch import rank
from retinue.runs.result import CONFIG, FAILED, read_result
from retinue.utils.files import write_text

log = logging.getLogger(__name__)

LOCK, SUBMITTED = "run.lock", "submitted.json"


class Status(NamedTuple):
    """`state` is finished, running, failed, queued, stopped (goes on with the same command) or missing."""

    state: str
    detail: str = ""


def status(folder: Path, queue: frozenset[str] | None = None) -> Status:
    """How the run in `folder` stands, by what lies there.

    Args:
        queue: Slurm's jobs, pending and running; None where Slurm is not asked.
    """
    if (result := read_result(folder)) is not None:
        tops = [f"{name} {value:.4f}" for name, value in result["metrics"].items() if isinstance(value, float)]
        return Status("finished", tops[0] if tops else "")
    if (owner := lock_owner(folder)) is not None:
        return Status("running", "on {host}, process {pid}".format(**owner) if owner else "")
    if (failed := _read(folder / FAILED)) is not None:
        return Status("failed", failed["reason"])
    submitted = _read(folder / SUBMITTED)
    job = f"job {submitted['job']}" if submitted else ""
    if submitted and queue is not None and submitted["job"] in queue:
        return Status("queued", job)
    return Status("stopped" if (folder / CONFIG).exists() else "missing", job)


@contextmanager
def attempt(folder: Path) -> Iterator[None]:
    """A turn at the run in `folder`: no other process has one meanwhile, and if it fails, `failed.json` says why.

    Of a run's several processes the first holds the lock. A failure before anything was trained is recorded in a sweep
    only: otherwise it is on the screen, and nothing is to be left behind.

    Raises:
        ValueError: another process has its turn.
    """
    with _holding(folder) if rank() == 0 else nullcontext():
        if rank() == 0:
            (folder / FAILED).unlink(missing_ok=True)
        try:
            yield
        except Exception as error:
            if ((folder / CONFIG).exists() or _in_a_sweep()) and not _anothers(folder):
                record_failure(folder, _reason(error))
            raise


def record_failure(folder: Path, reason: str) -> None:
    """Write `failed.json`, unless an earlier process of the same run has."""
    if not (folder / FAILED).exists():
        folder.mkdir(parents=True, exist_ok=True)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_text(folder / FAILED, json.dumps({"reason": reason, "time": now}, indent=2) + "\n")


def lock_owner(folder: Path) -> dict[str, Any] | None:
    """`host`, `pid` and `job` (Slurm's) of the process that has its turn; None where nobody has.

    Not for that process itself: it would lose the lock with the file that is closed here.
    """
    try:
        with open(folder / LOCK) as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return json.loads(file.read() or "{}")
    except OSError:
        pass
    return None


@contextmanager
def _holding(folder: Path) -> Iterator[None]:
    """Hold `run.lock`. The system lets go of it when the process dies, on whatever machine of a cluster."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    # A file server takes a while to notice that the machine is gone from which a job came back to the queue.
    deadline = time.monotonic() + (120 if int(os.environ.get("SLURM_RESTART_COUNT", 0)) else 3)
    while True:
        file = open(path, "a+")  # noqa: SIM115 - closing it gives up the lock
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = json.loads(file.read() or "{}")
            file.close()
            if time.monotonic() > deadline:
                where = "process {pid} on {host}".format(**owner) if owner else "another process"
                raise ValueError(f"{folder} is being trained by {where}; wait for it, or end it") from None
            time.sleep(0.2)
            continue
        except OSError as error:
            log.warning("%s cannot be locked (%s): do not start this run twice", path, error.strerror)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # its owner removed it in between
    try:
        file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}, file)
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _anothers(folder: Path) -> bool:
    """Whether the lock is another job's: then this process was refused, or belongs to one that was."""
    owner = lock_owner(folder) if rank() else None
    return bool(owner) and owner.get("job") != os.environ.get("SLURM_JOB_ID")


def _in_a_sweep() -> bool:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _reason(error: BaseException) -> str:
    """One line. Hydra and torch wrap what was raised, the first as the cause, the second as the last line."""
    from hydra.errors import HydraException

    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    if type(error).__name__ == "ProcessRaisedException":
        return lines[-1][:500]
    text = " ".join(" ".join(lines).split())[:500]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
