"""Ends a trial of a hyper-parameter search early where it does worse than the others did (scripts/search.py)."""

from pathlib import Path
from typing import Any

import optuna
import pytorch_lightning as pl
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from pytorch_lightning.callbacks import Callback

JOURNAL, STUDY = "journal.log", "search"  # a search's file, and the name of the only study in it
PRUNED = "pruned"  # attribute of a trial: the epoch after which it was ended


def open_storage(folder: Path) -> JournalStorage:
    """The search's storage: a file to which every process appends, and which a kill leaves whole."""
    return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))


def reopen(study: optuna.Study, number: int) -> optuna.Trial:
    """A trial that was asked for before, perhaps by another process."""
    return optuna.Trial(study, study.trials[number]._trial_id)


class Pruning(Callback):
    """Reports the validation's figure after each epoch, and ends the training where it is below the trials' median.

    Args:
        folder: the search's.
        trial: number of the trial in it.
        monitor: the figure, of which the highest is the best.
        warmup, warmup_steps: epochs, and optimiser steps, after which nothing is ended yet.
    """

    def __init__(self, folder: str, trial: int, monitor: str, warmup: int, warmup_steps: int = 0):
        self.folder, self.number, self.monitor = Path(folder), trial, monitor
        self.warmup, self.warmup_steps = warmup, warmup_steps
        self._trial: optuna.Trial | None = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        epoch = trainer.current_epoch + 1
        warming = trainer.global_step < self.warmup_steps
        stop = trainer.is_global_zero and self._is_worse(epoch, pl_module.val_figures[self.monitor], warming)
        if trainer.strategy.reduce_boolean_decision(stop, all=False):
            trainer.should_stop = True

    def _is_worse(self, epoch: int, value: float, warming: bool) -> bool:
        if self._trial is None:  # opened in the process that trains, which need not be the search's
            pruner = optuna.pruners.MedianPruner(n_warmup_steps=self.warmup)
            study = optuna.load_study(study_name=STUDY, storage=open_storage(self.folder), pruner=pruner)
            self._trial = reopen(study, self.number)
        trial = self._trial
        if PRUNED in trial.user_attrs:  # a kill came between that and the end
            return True
        if epoch not in trial.study.trials[self.number].intermediate_values:  # a resumed run repeats an epoch
            trial.report(value, epoch)
        if warming or not trial.should_prune():
            return False
        trial.set_user_attr(PRUNED, epoch)
        return True
