"""End a trial of a hyper-parameter search early if it does worse than the earlier trials (scripts/search.py)."""

from pathlib import Path
from typing import Any

import optuna
import pytorch_lightning as pl
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from pytorch_lightning.callbacks import Callback

# File of a search, and name of the only study in it.
JOURNAL, STUDY = "journal.log", "search"
# Attribute of a pruned trial: the epoch after which it was ended.
PRUNED = "pruned"


def open_storage(folder: Path) -> JournalStorage:
    """Return the storage of the search in `folder`: a file to which all processes append, and which survives a kill."""
    return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))


def reopen(study: optuna.Study, number: int) -> optuna.Trial:
    """Return the trial `number` of a study, which another process may have started."""
    return optuna.Trial(study, study.trials[number]._trial_id)


class Pruning(Callback):
    """Report a validation figure after each epoch, and end the training if it is below the median of earlier trials.

    Args:
        folder: folder of the search.
        trial: number of the trial in the search.
        monitor: name of the figure, such as `val/top1`; its highest value is the best.
        warmup: number of first epochs in which no trial is ended.
        warmup_steps: number of first optimiser steps in which no trial is ended.
    """

    def __init__(self, folder: str, trial: int, monitor: str, warmup: int, warmup_steps: int = 0):
        self.folder, self.number, self.monitor = Path(folder), trial, monitor
        self.warmup, self.warmup_steps = warmup, warmup_steps
        self._trial: optuna.Trial | None = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.monitor not in pl_module.val_figures:
            # With recipe.val_every, this epoch had no validation.
            return
        epoch = trainer.current_epoch + 1
        in_warmup = trainer.global_step < self.warmup_steps
        stop = trainer.is_global_zero and self._must_stop(epoch, pl_module.val_figures[self.monitor], in_warmup)
        if trainer.strategy.reduce_boolean_decision(stop, all=False):
            trainer.should_stop = True

    def _must_stop(self, epoch: int, value: float, in_warmup: bool) -> bool:
        if self._trial is None:
            # Open the study in the process that trains, which may be another than the process of the search.
            pruner = optuna.pruners.MedianPruner(n_warmup_steps=self.warmup)
            study = optuna.load_study(study_name=STUDY, storage=open_storage(self.folder), pruner=pruner)
            self._trial = reopen(study, self.number)
        trial = self._trial
        # A kill came after the trial was marked as pruned and before the training ended.
        if PRUNED in trial.user_attrs:
            return True
        # A resumed run may repeat an epoch, whose figure has been reported already.
        if epoch not in trial.study.trials[self.number].intermediate_values:
            trial.report(value, epoch)
        if in_warmup or not trial.should_prune():
            return False
        trial.set_user_attr(PRUNED, epoch)
        return True
