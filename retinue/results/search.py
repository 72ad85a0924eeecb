"""Hyper-parameter search: an Optuna study in a folder, whose trials are runs of train.py."""

import fcntl
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.trial import FrozenTrial, TrialState

from retinue.benchmarks.timing import Row
from retinue.runs.config import check
from retinue.runs.many import one_line
from retinue.runs.pruning import JOURNAL, PRUNED, STUDY, open_storage, reopen
from retinue.runs.training import train
from retinue.utils.command_line import to_text
from retinue.utils.paths import CONF
from retinue.utils.suggestions import nearest

SPACES = CONF / "search"
RANGE_KEYS = {"low", "high", "log", "step"}
# Number of failures before any success that ends a search: the settings are wrong then, not the values of one trial.
MAX_FIRST_FAILURES = 3


def read_space(name: str) -> dict[str, BaseDistribution]:
    """Return the distributions of a search space by keys of train.py.

    Args:
        name: Name of a file in conf/search, or the path of a file that ends in .yaml.

    Raises:
        ValueError: There is no such file, or an entry of it is neither a range nor a list of choices.
    """
    path = Path(name) if name.endswith(".yaml") else SPACES / f"{name}.yaml"
    if not path.is_file():
        names = sorted(path.stem for path in SPACES.glob("*.yaml"))
        raise ValueError(f"no search space {name!r}.{nearest(name, names)} There are: {', '.join(names)}, or FILE.yaml")
    space = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(space, dict) or not space:
        raise ValueError(f"{path} must map keys of train.py to ranges and choices")
    return {key: _read_distribution(f"{path}: {key}", values) for key, values in space.items()}


def _read_distribution(place: str, values: Any) -> BaseDistribution:
    """Return the distribution of one entry; `place` names the file and the key in an error."""
    if isinstance(values, list) and values:
        return CategoricalDistribution([_read_choice(value) for value in values])
    if not isinstance(values, dict) or not {"low", "high"} <= set(values) <= RANGE_KEYS:
        raise ValueError(f"{place} must be {{low: ..., high: ...}}, with log: true or step: ..., or a list of choices")
    is_whole = all(isinstance(values[end], int) for end in ("low", "high"))
    try:
        return IntDistribution(**values) if is_whole else FloatDistribution(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error


def _read_choice(value: Any) -> Any:
    """Return a choice as Optuna stores it: a scalar, or the text of a list such as `[agent,window]`."""
    return value if value is None or isinstance(value, str | bool | int | float) else to_text(value)


def to_overrides(params: Mapping[str, Any]) -> list[str]:
    """Return the parameters of a trial as overrides of train.py."""
    return [f"{key}={to_text(value)}" for key, value in params.items()]


def _example(distribution: Any) -> Any:
    return distribution.choices[0] if isinstance(distribution, CategoricalDistribution) else distribution.low


class Search:
    """A study in a folder, with what all its trials have in common.

    Args:
        folder: Folder of the journal and of the trials' runs; it is made if necessary.
        space: Distributions by keys of train.py.
        overrides: Overrides of train.py that all trials share.
        seed: Seed of the sampler, which proposes the trials.

    Raises:
        ValueError: The folder holds another search, or the overrides make no valid run.
    """

    def __init__(self, folder: Path, space: Mapping[str, BaseDistribution], overrides: Sequence[str], seed: int):
        self.folder, self.space, self.overrides = folder, space, overrides
        # Check a run with example values before anything is written.
        check(self.config(0, {key: _example(distribution) for key, distribution in space.items()}))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            storage = open_storage(folder)
            self.study = optuna.create_study(
                storage=storage, study_name=STUDY, direction="maximize", load_if_exists=True
            )
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{folder / JOURNAL} cannot be read: {reason}; remove its damaged lines, or choose another name=..."
            ) from error
        # After a restart the same seed would propose the same trials again.
        sampler_seed = seed + len(self.study.trials)
        self.study.sampler = optuna.samplers.TPESampler(seed=sampler_seed, constant_liar=True)
        attributes = {
            "overrides": list(overrides),
            "space": {key: distribution_to_json(distribution) for key, distribution in space.items()},
        }
        saved_attributes = self.study.user_attrs or attributes
        for name, value in attributes.items():
            if saved_attributes[name] != value:
                raise ValueError(
                    f"{folder} holds a search with other {name}, {saved_attributes[name]}: choose another name=..."
                )
            self.study.set_user_attr(name, value)

    def config(self, number: int, params: Mapping[str, Any]) -> DictConfig:
        """Return the config of a trial's run: that of train.py, in the trial's folder, with pruning.

        Args:
            number: Number of the trial.
            params: Its values by keys of train.py.
        """
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", [*self.overrides, *to_overrides(params)])
        if cfg.task.figure == "loss":
            raise ValueError("a search maximises a figure: task.figure=knn_top1, probe_top1 or rankme, not loss")
        cfg.run_dir = str(self._trial_folder(number))
        pruning = {
            "_target_": "retinue.runs.pruning.Pruning",
            "folder": str(self.folder),
            "trial": number,
            "monitor": f"val/{cfg.task.figure}",
            "warmup": int(cfg.recipe.schedule.get("warmup_epochs", 0)),
            "warmup_steps": cfg.recipe.schedule.get("warmup_steps") or 0,
        }
        OmegaConf.update(cfg, "callbacks.pruning", pruning, force_add=True)
        names_group = any(override.startswith("logger.wandb.group=") for override in self.overrides)
        if "wandb" in cfg.logger and not names_group:
            cfg.logger.wandb.group = f"search/{self.folder.name}"
        return cfg

    def run(self, trials: int) -> None:
        """Resume the trials that were stopped, then run new ones until there are `trials` in all.

        Raises:
            ValueError: The first trials have all failed.
        """
        while True:
            for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
                with self._claim(trial.number) as is_claimed:
                    if is_claimed:
                        self._run_trial(trial.number, trial.params)
            if len(self.study.trials) >= trials:
                return
            # The new trial is in the state RUNNING: the next pass of the loop runs it.
            self.study.ask({**self.space})

    def _trial_folder(self, number: int) -> Path:
        return self.folder / f"trial-{number}"

    @contextmanager
    def _claim(self, number: int) -> Iterator[bool]:
        """Yield whether this process may run the trial; no other process may until the block or the process ends."""
        folder = self._trial_folder(number)
        folder.mkdir(exist_ok=True)
        with open(folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield self.study.trials[number].state == TrialState.RUNNING

    def _run_trial(self, number: int, params: Mapping[str, Any]) -> None:
        print(f"trial {number}: {' '.join(to_overrides(params))}", flush=True)
        try:
            train(self.config(number, params))
        except Exception as error:
            # The training diverged, or the net is too large for the memory: the other trials go on.
            reason = one_line(error)
            print(f"trial {number} failed: {reason}", file=sys.stderr)
            reopen(self.study, number).set_user_attr("failed", reason)
            self.study.tell(number, state=TrialState.FAIL)
            if self._only_failures():
                raise ValueError(f"the first {number + 1} trials failed, the last one with {reason}") from error
            return
        trial = self.study.trials[number]
        if PRUNED in trial.user_attrs:
            self.study.tell(number, state=TrialState.PRUNED)
        else:
            self.study.tell(number, max(trial.intermediate_values.values()))

    def _only_failures(self) -> bool:
        states = [trial.state for trial in self.study.trials]
        if TrialState.COMPLETE in states or TrialState.PRUNED in states:
            return False
        return states.count(TrialState.FAIL) >= MAX_FIRST_FAILURES

    def rows(self) -> list[Row]:
        """Return a row for each trial, the best first."""
        trials = sorted(self.study.trials, key=_best_validation, reverse=True)
        return [
            {
                "what": f"trial-{trial.number}",
                "state": trial.state.name.lower(),
                "val": max(trial.intermediate_values.values(), default=None),
                "epochs": max(trial.intermediate_values, default=0),
                **trial.params,
                "failed": trial.user_attrs.get("failed"),
            }
            for trial in trials
        ]

    def best_params(self) -> dict[str, Any] | None:
        """Return the parameters of the best trial that ran to its end; None if no trial did."""
        complete = self.study.get_trials(states=(TrialState.COMPLETE,))
        return max(complete, key=_best_validation).params if complete else None


def _best_validation(trial: FrozenTrial) -> float:
    """Return the best value over the trial's epochs; -1, below every metric, if it has none."""
    return max(trial.intermediate_values.values(), default=-1.0)
