"""Searches hyper-parameters: each trial is a run of train.py; bad ones are ended early; a stopped search goes on.

    python scripts/search.py lr_wd --trials 20                               # conf/search/lr_wd.yaml, on the digits
    python scripts/search.py my_space.yaml --name swin --trials 50 model=swin data=cifar10

What has a `=` is for train.py. Trials are asked of Optuna (TPE, after ten random ones) and judged by the best
validation, never by the test split; one below the median of the others at its epoch is ended (not in the first five
trials, nor while the learning rate is warming up). outputs/search/<name>/ holds the journal, trials.csv and a folder
for each trial's run. The same command goes on: first with trials that were stopped, then with new ones up to
`--trials`; a second process with the same command shares the work.
"""

import argparse
import fcntl
import shlex
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

from retinue.benchmarks.timing import Row, print_rows, write_csv
from retinue.runs.config import check, register_resolvers
from retinue.runs.pruning import PRUNED, STUDY, open_storage, reopen
from retinue.runs.training import train
from retinue.utils.errors import user_errors
from retinue.utils.paths import CONF
from retinue.utils.suggestions import nearest

SPACES = CONF / "search"
RANGE = {"low", "high", "log", "step"}
ALL_WRONG = 3  # so many failures before any success are no chance


def read_space(name: str) -> dict[str, BaseDistribution]:
    """The space of conf/search/<name>.yaml, or of a file of one's own.

    Raises:
        ValueError: there is no such file, or a line of it is neither a range nor a list of choices.
    """
    path = Path(name) if name.endswith(".yaml") else SPACES / f"{name}.yaml"
    if not path.is_file():
        known = sorted(path.stem for path in SPACES.glob("*.yaml"))
        raise ValueError(f"no search space {name!r}.{nearest(name, known)} There are: {', '.join(known)}, or FILE.yaml")
    space = yaml.safe_load(path.read_text())
    if not isinstance(space, dict) or not space:
        raise ValueError(f"{path} must map keys of train.py to ranges and choices")
    return {key: _distribution(f"{path}: {key}", values) for key, values in space.items()}


def _distribution(where: str, values: Any) -> BaseDistribution:
    if isinstance(values, list) and values:
        return CategoricalDistribution([_word(value) for value in values])
    if not isinstance(values, dict) or not {"low", "high"} <= set(values) <= RANGE:
        raise ValueError(f"{where} must be {{low: ..., high: ...}}, with log: true or step: ..., or a list of choices")
    whole = all(isinstance(values[end], int) for end in ("low", "high"))
    try:
        return IntDistribution(**values) if whole else FloatDistribution(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _word(value: Any) -> Any:
    """A choice as Optuna keeps it and Hydra's command line takes it; a list such as [agent,window] is one word."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return str(value).replace(" ", "").replace("'", "")


def _override(key: str, value: Any) -> str:
    return f"{key}={'null' if value is None else value}"


def _example(distribution: Any) -> Any:
    return distribution.choices[0] if isinstance(distribution, CategoricalDistribution) else distribution.low


class Search:
    """A study in a folder, and what all its trials have in common.

    Args:
        folder: where its journal and its trials' runs are; made if it is not there.
        overrides: train.py's command line.

    Raises:
        ValueError: the folder holds another search.
    """

    def __init__(self, folder: Path, space: Mapping[str, BaseDistribution], overrides: Sequence[str], seed: int):
        self.folder, self.space, self.overrides = folder, space, overrides
        check(self.config(0, {key: _example(each) for key, each in space.items()}))  # before anything is written
        folder.mkdir(parents=True, exist_ok=True)
        storage = open_storage(folder)
        self.study = optuna.create_study(storage=storage, study_name=STUDY, direction="maximize", load_if_exists=True)
        # The same seed again after a stop would draw the same trials again.
        self.study.sampler = optuna.samplers.TPESampler(seed=seed + len(self.study.trials), constant_liar=True)
        mine = {"overrides": list(overrides), "space": {key: distribution_to_json(each) for key, each in space.items()}}
        there = self.study.user_attrs or mine
        for what in mine:
            if there[what] != mine[what]:
                raise ValueError(f"{folder} holds a search with other {what}, {there[what]}: choose another --name")
            self.study.set_user_attr(what, mine[what])

    def config(self, number: int, params: Mapping[str, Any]) -> DictConfig:
        """What train.py would compose, in the trial's folder, with pruning."""
        chosen = map(_override, params, params.values())
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", [*self.overrides, *chosen])
        cfg.run_dir = str(self.folder / f"trial-{number}")
        pruning = {
            "_target_": "retinue.runs.pruning.Pruning",
            "folder": str(self.folder),
            "trial": number,
            "monitor": f"val/{cfg.task.figure}",
            "warmup": int(cfg.recipe.schedule.get("warmup_epochs", 0)),
            "warmup_steps": cfg.recipe.schedule.get("warmup_steps") or 0,
        }
        OmegaConf.update(cfg, "callbacks.pruning", pruning, force_add=True)
        if "wandb" in cfg.logger and not any(each.startswith("logger.wandb.group=") for each in self.overrides):
            cfg.logger.wandb.group = f"search/{self.folder.name}"
        return cfg

    def run(self, trials: int) -> None:
        """Go on with the trials that were stopped, then run new ones until there are so many."""
        while True:
            for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
                with self._claimed(trial.number) as mine:
                    if mine:
                        self._run(trial.number, trial.params)
            if len(self.study.trials) >= trials:
                return
            self.study.ask({**self.space})  # and the loop takes it up

    @contextmanager
    def _claimed(self, number: int) -> Iterator[bool]:
        """Whether no other process is at this trial; it is this one's until the block ends, or the process does."""
        folder = self.folder / f"trial-{number}"
        folder.mkdir(exist_ok=True)
        with open(folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield self.study.trials[number].state == TrialState.RUNNING

    def _run(self, number: int, params: Mapping[str, Any]) -> None:
        print(f"trial {number}: {' '.join(map(_override, params, params.values()))}", flush=True)
        try:
            train(self.config(number, params))
        except Exception as error:  # diverged, or too large for the memory: the others go on
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
            print(f"trial {number} failed: {reason}", file=sys.stderr)
            reopen(self.study, number).set_user_attr("failed", reason)
            self.study.tell(number, state=TrialState.FAIL)
            states = [trial.state for trial in self.study.trials]
            if states.count(TrialState.FAIL) >= ALL_WRONG and not {TrialState.COMPLETE, TrialState.PRUNED} & {*states}:
                raise ValueError(f"the first {number + 1} trials failed, the last one with {reason}") from error
            return
        trial = self.study.trials[number]
        if PRUNED in trial.user_attrs:
            self.study.tell(number, state=TrialState.PRUNED)
        else:
            self.study.tell(number, max(trial.intermediate_values.values()))

    def rows(self) -> list[Row]:
        """A row for each trial, the best first."""
        trials = sorted(self.study.trials, key=_best, reverse=True)
        return [
            {
                "what": f"trial-{trial.number}",
                "state": trial.state.name.lower(),
                "val": None if _best(trial) < 0 else _best(trial),
                "epochs": max(trial.intermediate_values, default=0),
                **trial.params,
                "failed": trial.user_attrs.get("failed"),
            }
            for trial in trials
        ]


def _best(trial: FrozenTrial) -> float:
    return max(trial.intermediate_values.values(), default=-1.0)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s SPACE [options] [key=value ...]",
    )
    parser.add_argument("space", metavar="SPACE", help="of conf/search, or a file of your own (.yaml)")
    parser.add_argument("--trials", type=int, default=20, help="in all, with those of former starts (20)")
    parser.add_argument("--name", help="of the search's folder; the space's name if not given")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of trials (0); seed=N is that of the runs")
    parser.add_argument("--outputs", type=Path, default=Path("outputs/search"), help="where searches are")
    argv = sys.argv[1:] if argv is None else argv
    overrides = [argument for argument in argv if "=" in argument and not argument.startswith("-")]
    args = parser.parse_args([argument for argument in argv if argument not in overrides])

    register_resolvers()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = (args.outputs / (args.name or Path(args.space).stem)).absolute()
    search = Search(folder, read_space(args.space), overrides, args.seed)
    try:
        search.run(args.trials)
    finally:
        rows = search.rows()
        if rows:
            write_csv(folder / "trials.csv", rows)
    print_rows(rows, f"{args.space}: best validation of each trial")
    if finished := search.study.get_trials(states=(TrialState.COMPLETE,)):
        best = max(finished, key=_best).params
        print(f"best: python train.py {shlex.join([*overrides, *map(_override, best, best.values())])}")
    print(folder)


if __name__ == "__main__":
    with user_errors(CONF, "train"):
        main()
