"""Show errors to the user as one line on stderr with exit code 2, without a traceback."""

import argparse
import errno
import logging
import math
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType

from retinue.utils.paths import CONF, is_own_file, list_group
from retinue.utils.suggestions import nearest

SHOW_TRACEBACK = "HYDRA_FULL_ERROR"

# Seconds within which a second signal is the same request to stop: `timeout` signals a process and then its group.
SAME_REQUEST = 1.0

# Faults of files and disks, and what the user can do; the system's own words say what happened.
REMEDIES = {
    errno.ENOSPC: "make room, then start the same command again",
    errno.EDQUOT: "make room in your quota, then start the same command again",
    errno.EFBIG: "a limit on the size of files stands in the way (ulimit -f)",
    errno.EROFS: "name a folder that can be written",
    errno.EACCES: "name a file or folder that you may use, or change its permissions",
    errno.EPERM: "name a file or folder that you may use, or change its permissions",
    errno.ENOTDIR: "a file stands where a folder is needed; name another one, or move the file away",
    errno.EEXIST: "a file stands where a folder is needed; name another one, or move the file away",
    errno.EISDIR: "a folder stands where a file is needed; name another one, or move the folder away",
    errno.ENOENT: "it, or its folder, is not there or was removed",
    errno.ESTALE: "it, or its folder, is not there or was removed",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.EIO: "the disk or the file server has a fault",
}
# Faults that are reported even if Python does not know which file they are about.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stopped(BaseException):
    """A signal has asked the run to stop, and the run has saved its state.

    Args:
        signum: number of the signal.
        message: the line that the user sees.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


@contextmanager
def user_errors(config_dir: Path | None = None, config_name: str = "") -> Iterator[None]:
    """Turn our ValueErrors, faults of files and Hydra's composition errors into one line and exit code 2.

    `HYDRA_FULL_ERROR=1` shows the traceback instead. A reader of standard output that has gone, as in `--help | head`,
    ends the program quietly. `Stopped`, SIGTERM and Ctrl-C end it with one line and the exit code of the signal.

    Args:
        config_dir: folder of Hydra's primary config; with it, a mistyped key is answered with the nearest existing key.
        config_name: name of the primary config.
    """
    user_setting = os.environ.get(SHOW_TRACEBACK, "0")
    # With this setting Hydra raises its errors, instead of printing several lines and exiting with code 1.
    os.environ[SHOW_TRACEBACK] = "1"
    # On a full disk the log file's handler would print a traceback for each line that it cannot write.
    logging.raiseExceptions = False
    try:
        with stopping_on_sigterm(), _reporting(config_dir, config_name) if user_setting != "1" else nullcontext():
            try:
                yield
            finally:
                # Flush here: an error in the flush at the interpreter's end could not be handled.
                sys.stdout.flush()
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        if not _reader_has_closed_stdout():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    finally:
        os.environ[SHOW_TRACEBACK] = user_setting


@contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Raise `Stopped` on SIGTERM inside the block, unless the signal has a handler already.

    So files and folders that are half made are removed, as after Ctrl-C. While a net trains, the run's own handler
    takes the signal.
    """
    default = (
        signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and threading.current_thread() is threading.main_thread()
    )
    if default:
        signal.signal(signal.SIGTERM, _stop)
        previous, sys.unraisablehook = sys.unraisablehook, _stop_again
    try:
        yield
    finally:
        if default:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sys.unraisablehook = previous


def _stop(number: int, frame: FrameType | None) -> None:
    global _stopped_at
    if time.monotonic() - _stopped_at < SAME_REQUEST:
        return
    _stopped_at = time.monotonic()
    raise Stopped(number, f"stopped by {signal.Signals(number).name}")


def _stop_again(ignored: "sys.UnraisableHookArgs") -> None:
    """Repeat a request to stop that came in code whose exceptions Python ignores, such as a finaliser."""
    global _stopped_at
    if not isinstance(ignored.exc_value, Stopped):
        sys.__unraisablehook__(ignored)
        return
    _stopped_at = -math.inf
    threading.Timer(0.01, signal.pthread_kill, (threading.main_thread().ident, ignored.exc_value.signum)).start()


def _reader_has_closed_stdout() -> bool:
    """Tell whether standard output is a pipe that nobody reads any more, as in `--help | head -1`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


@contextmanager
def in_a_job() -> Iterator[None]:
    """Report the errors of a single run from within Hydra's job, before Hydra adds a line.

    In a sweep the error is raised, so that the sweep's other jobs go on.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    with _reporting() if _reports and HydraConfig.get().mode == RunMode.RUN else nullcontext():
        yield


@contextmanager
def _reporting(config_dir: Path | None = None, config_name: str = "") -> Iterator[None]:
    global _reports
    previous, _reports = _reports, True
    try:
        yield
    except Exception as error:
        line = _one_line(error, config_dir, config_name)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    finally:
        _reports = previous


# Time of the last signal that raised `Stopped`, on the clock of `time.monotonic`.
_stopped_at = -math.inf
# True while `user_errors` or `in_a_job` turns errors into lines.
_reports = False


def _one_line(error: Exception, config_dir: Path | None, config_name: str) -> str | None:
    """Return the line for the user, or None for an error that no input of the user has caused."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    cause: BaseException = error
    while isinstance(cause, HydraException | OmegaConfBaseException) and cause.__cause__ is not None:
        if isinstance(cause, MissingConfigException):
            break
        cause = cause.__cause__
    if isinstance(cause, MissingConfigException) and config_dir:
        group, _, name = (cause.missing_cfg_file or "").removesuffix(".yaml").partition("/")
        # The choices of a group in folders, such as experiment/<paper>/<name>, are not among Hydra's options.
        nested = sorted(str(path.relative_to(config_dir / group).with_suffix(""))
                        for path in (config_dir / group).glob("*/*.yaml"))  # fmt: skip
        if nested and not cause.options:
            listed = f"one of {len(nested)} files in conf/{group}, such as {nested[0]}"
            return f"{group}={name} is not there.{nearest(name, nested)} There are: {listed}"
    if isinstance(cause, MissingConfigException) and cause.options:
        group, _, name = (cause.missing_cfg_file or "").removesuffix(".yaml").rpartition("/")
        return f"{group}={name} is not there.{nearest(name, cause.options)} There are: {', '.join(cause.options)}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        text = str(cause if isinstance(cause, ValueError) else error)
        key = getattr(cause, "full_key", None)
        if config_dir and key and "is not in struct" in str(cause):
            known = _known_keys(config_dir, config_name, sys.argv[1:])
            return f"there is no key {key!r} in the config.{nearest(key, known)} --cfg job shows all keys"
        # OmegaConf wraps the error of a resolver, such as that of the run's folder, in lines of its own.
        text = re.sub(r"(?s)^ValueError raised while resolving interpolation: (.*?)\n +full_key: .*", r"\1", text)
        return " ".join(text.split("\nSet the environment")[0].split())
    if "Config group override must be a string" in str(error):
        return _null_group(config_dir or CONF, sys.argv[1:])
    if isinstance(error, ValueError) and _is_ours(error):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in REMEDIES and (error.filename or error.errno in FULL_DISK):
        place = f"{error.filename2 or error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}; {REMEDIES[error.errno]}"
    return _from_killed_process(error) or _from_worker(error)


def _null_group(config_dir: Path, arguments: list[str]) -> str | None:
    """Return the line on a config group that the command line sets to null; Hydra's own message names no group."""
    for argument in arguments:
        group, _, value = argument.lstrip("+").partition("=")
        if re.search(r"\b(null|None)\b", value) and (config_dir / group).is_dir():
            return f"{group} must be one of {', '.join(list_group(group, config_dir))}, not null"
    return None


def _is_ours(error: Exception) -> bool:
    """Tell whether our own code raised the error; one from inside a library keeps its traceback."""
    return is_own_file(Path(traceback.extract_tb(error.__traceback__)[-1].filename))


def _from_killed_process(error: Exception) -> str | None:
    """Return a line for the death of a loading process or of a rank, or None for any other error."""
    text = str(error)
    # torch raises these as a RuntimeError and as a ProcessExitedException.
    if re.match(r"DataLoader worker \(pid", text):
        return (
            f"{text.split(' It is possible')[0].rstrip('.').splitlines()[0]}; often the memory is full: take a smaller "
            "data.num_workers. The same command goes on from the last checkpoint"
        )
    if re.fullmatch(r"process \d+ terminated with signal \w+", text):
        return f"{text}; often the memory is full. The same command goes on from the last checkpoint"
    return None


def _from_worker(error: Exception) -> str | None:
    """Return the line for an error of a loading process or of a rank, which torch wraps in a traceback, or None."""
    text = str(error).rstrip()
    wrapped = text.startswith("Caught ValueError in DataLoader worker") or re.match(r"\s*-- Process \d+ termin", text)
    files = [Path(name) for name in re.findall(r'^  File "(.+?)", line', text, re.MULTILINE)]
    if not wrapped or not files:
        return None
    if fault := re.fullmatch(r"\w+Error: \[Errno (\d+)\] (.+)", text.splitlines()[-1]):
        number = int(fault[1])
        return f"{fault[2]}; {REMEDIES[number]}" if number in REMEDIES else None
    _, found, message = text.rpartition("\nValueError: ")
    return " ".join(message.split()) if found and is_own_file(files[-1]) else None


def _known_keys(config_dir: Path, config_name: str, arguments: list[str]) -> list[str]:
    """Return every key, dotted, of the config that the groups chosen in `arguments` compose."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import DictConfig

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    options, overrides = parser.parse_known_args(arguments)
    folders = [f"file://{Path(options.config_dir).absolute()}"] if options.config_dir else []
    choices = [override for override in overrides if (config_dir / override.split("=")[0]).is_dir()]

    def walk(node: DictConfig, prefix: str) -> Iterator[str]:
        for key in node:
            yield f"{prefix}{key}"
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
                yield from walk(child, f"{prefix}{key}.")

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        return list(walk(compose(config_name, [*choices, f"hydra.searchpath=[{', '.join(folders)}]"]), ""))
