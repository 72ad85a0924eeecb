"""State of a run, as its folder tells it, and the lock by which only one process at a time trains a run."""

import contextlib
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
from retinue.runs.result_file import CONFIG, FAILED, RESULT, read_result
from retinue.utils.files import write_text

log = logging.getLogger(__name__)

LOCK, SUBMITTED = "run.lock", "submitted.json"

# The states of a run, everywhere in the project:
#   finished    it has a result
#   running     a process holds its lock
#   queued      its Slurm job waits or starts
#   failed      it ended with an error
#   stopped     it has begun and has neither result nor error; the same command goes on from its checkpoint
#   missing     it has not begun
#   unreadable  a file that would tell its state is damaged
STATES = ("finished", "running", "queued", "failed", "stopped", "missing", "unreadable")

# Seconds for which a process waits for a lock. After a requeue a file server may take a while to notice that the
# machine is gone on which the job ran before.
WAIT, WAIT_AFTER_REQUEUE = 3, 120


class Status(NamedTuple):
    """State of a run.

    Attributes:
        state: one of `STATES`.
        detail: what is known beyond the state, such as a figure, the process or the reason of a failure; may be empty.
    """

    state: str
    detail: str = ""


def status(folder: Path, jobs: frozenset[str] | None = None) -> Status:
    """Return the state of the run in `folder`.

    Args:
        folder: the run's folder; it need not exist.
        jobs: ids of the pending and running Slurm jobs. With None, Slurm is not asked, and no run is `queued`.
    """
    try:
        result = read_result(folder)
    except ValueError as error:
        return Status("unreadable", str(error))
    if result is not None:
        figures = [f"{name} {value:.4f}" for name, value in result["metrics"].items() if isinstance(value, float)]
        return Status("finished", figures[0] if figures else "")
    if (owner := lock_owner(folder)) is not None:
        return Status("running", f"on {owner['host']}, process {owner['pid']}" if owner else "")
    try:
        if (reason := _read_entry(folder / FAILED, "reason")) is not None:
            return Status("failed", reason)
        submitted = _read_entry(folder / SUBMITTED, "job")
    except ValueError as error:
        return Status("unreadable", str(error))
    job = f"job {submitted}" if submitted else ""
    if submitted and jobs is not None and submitted in jobs:
        return Status("queued", job)
    return Status("stopped" if (folder / CONFIG).exists() else "missing", job)


@contextmanager
def attempt(folder: Path) -> Iterator[None]:
    """Hold the run in `folder` while the block runs; if the block fails, `failed.json` records why.

    Of a run's several processes, the one of rank 0 holds the lock. A failure before anything was trained is recorded
    only in a sweep; in a single run the user reads it on the screen, and no folder is left behind.

    Raises:
        ValueError: another process holds the run.
    """
    with locked(folder) if rank() == 0 else nullcontext():
        if rank() == 0:
            (folder / FAILED).unlink(missing_ok=True)
        with recorded_failure(folder):
            yield


@contextmanager
def recorded_failure(folder: Path, only_in_a_sweep: bool = False) -> Iterator[None]:
    """Record in `failed.json` why the block fails: in a sweep, and otherwise if the run has begun.

    Args:
        folder: the run's folder.
        only_in_a_sweep: record nothing in a single run, whatever the folder holds.
    """
    try:
        yield
    except Exception as error:
        begun = (folder / CONFIG).exists() and not only_in_a_sweep
        # With rerun=true a run that fails early leaves the finished run that it was to replace.
        finished = (folder / RESULT).exists()
        if (begun or _in_a_sweep()) and not finished and not _another_job_holds(folder):
            # On a full disk the reason cannot be recorded, and the error itself is what the user must see.
            with contextlib.suppress(OSError):
                record_failure(folder, _reason(error))
        raise


def record_failure(folder: Path, reason: str) -> None:
    """Write `failed.json`, unless another process of the same run has written it already."""
    if not (folder / FAILED).exists():
        folder.mkdir(parents=True, exist_ok=True)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_text(folder / FAILED, json.dumps({"reason": reason, "time": now}, indent=2) + "\n")


def lock_owner(folder: Path) -> dict[str, Any] | None:
    """Return `host`, `pid` and Slurm `job` of the process that holds the run, or None if no process does.

    The process that holds the run must not call this: closing the file here would give up its own lock.
    """
    try:
        with open(folder / LOCK) as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return _read_owner(file.read())
    except (OSError, ValueError):
        pass
    return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `run.lock`; the operating system releases it when the process dies, on every machine of a cluster.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0
    deadline = time.monotonic() + (WAIT_AFTER_REQUEUE if requeued else WAIT)
    while True:
        file = open(path, "a+")  # noqa: SIM115 - closing it gives up the lock
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = _read_owner(file.read())
            file.close()
            if time.monotonic() > deadline:
                holder = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
                raise ValueError(f"{folder} is being trained by {holder}; wait for it, or end it") from None
            time.sleep(0.2)
            continue
        except OSError as error:
            log.warning("%s cannot be locked (%s): do not start this run twice", path, error.strerror)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        # The former owner removed the file between opening and locking it: try again with a new file.
        file.close()
    try:
        file.truncate(0)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        try:
            # A buffered write that fails on a full disk would fail again when the file is closed.
            os.write(file.fileno(), json.dumps(owner).encode())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()


def _another_job_holds(folder: Path) -> bool:
    """Tell whether a different job holds the lock; then this process's run was refused, and its error is not recorded.

    Rank 0 of a refused run fails before its attempt begins, so only the other ranks look.
    """
    owner = lock_owner(folder) if rank() else None
    return bool(owner) and owner.get("job") != os.environ.get("SLURM_JOB_ID")


def _in_a_sweep() -> bool:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _reason(error: BaseException) -> str:
    """Return an error as one line, without the wrapping of Hydra (the cause) or torch (the last line)."""
    from hydra.errors import HydraException

    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    if type(error).__name__ == "ProcessRaisedException":
        return lines[-1][:500]
    text = " ".join(" ".join(lines).split())[:500]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _read_entry(path: Path, name: str) -> str | None:
    """Return an entry of a JSON file as text, or None if there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))[name])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} cannot be read: {_reason(error)}; remove it") from None


def _read_owner(text: str) -> dict[str, Any]:
    """Return what `run.lock` says about its owner; {} if that is not known."""
    try:
        owner = json.loads(text)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) and {"pid", "host"} <= owner.keys() else {}
