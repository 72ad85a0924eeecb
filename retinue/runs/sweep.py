"""The runs of a sweep and their states, without starting any."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from retinue.runs.slurm import list_jobs
from retinue.runs.status import Status, status
from retinue.utils.paths import CONF


class SweepRun(NamedTuple):
    """One run of a sweep.

    Attributes:
        overrides: the overrides that differ between the sweep's runs.
        folder: the run's folder; it may not exist yet.
        status: the run's state.
    """

    overrides: list[str]
    folder: Path
    status: Status


def list_runs(arguments: Sequence[str]) -> list[SweepRun]:
    """Return each run of the sweep `train.py -m <arguments>`, in the sweep's order.

    The interpolations of conf/ must be registered (`register_resolvers`).
    """
    overrides = [argument for argument in arguments if argument not in ("-m", "--multirun")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        grid = list(itertools.chain(*BasicSweeper.split_arguments(parser.parse_overrides(overrides), None)))
        sweeps = [compose("train", job, return_hydra_config=True).hydra.sweep for job in grid]
        folders = [Path(sweep.dir, sweep.subdir) for sweep in sweeps]
    varies = [len(set(values)) > 1 for values in zip(*grid, strict=True)]
    jobs = list_jobs()
    return [
        SweepRun(list(itertools.compress(job, varies)), folder, status(folder, jobs))
        for job, folder in zip(grid, folders, strict=True)
    ]
