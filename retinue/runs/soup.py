"""Weights of runs, their validation, and the greedy soup of them (Wortsman et al., arXiv:2203.05482, section 2)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from models import load_weights
from models.merging import State, mean, read_state
from retinue.runs.config import best_checkpoint
from retinue.runs.identity import identity
from retinue.runs.result_file import CONFIG, read_config
from retinue.runs.training import build_data, build_task, build_trainer, quiet_libraries
from retinue.utils.paths import CONF


def weights_of(path: Path) -> dict[str, Tensor]:
    """Return the weights of a weights file, or the best weights of a run's folder.

    Raises:
        ValueError: The file cannot be read, or the run has no checkpoint yet.
    """
    return read_state(best_checkpoint(path) if path.is_dir() else path)


class Validation:
    """Figure of a net on the validation split of the runs' own data; higher is better.

    Args:
        runs: Folders of runs of one net on one set of data.

    Attributes:
        figure: Name of the figure, such as `val/top1`.

    Raises:
        ValueError: A path is no run's folder, or the runs' data differ.
    """

    def __init__(self, runs: Sequence[Path]):
        configs = [_config_of(run) for run in runs]
        for run, config in zip(runs, configs, strict=True):
            if identity(config)["data"] != identity(configs[0])["data"]:
                raise ValueError(f"{run} has other data than {runs[0]}: a greedy soup needs one validation split")
        quiet_libraries()
        cfg = configs[0]
        cfg.run_dir, cfg.weights = str(runs[0]), None
        cfg.trainer = OmegaConf.merge(
            OmegaConf.load(CONF / "trainer" / "auto.yaml"), {"precision": cfg.trainer.precision}
        )
        cfg.recipe.batch_size = cfg.task.eval_batch
        if "pretrained" in cfg.model:
            cfg.model.pretrained = False
        self.cfg, self.datamodule = cfg, build_data(cfg)
        self.figure = f"val/{cfg.task.figure}"
        self.task = build_task(cfg, self.datamodule)

    def __call__(self, state: State) -> float:
        """Return the figure of the net with these weights."""
        load_weights(self.task.model, state)
        build_trainer(self.cfg, logger=False).validate(self.task, datamodule=self.datamodule, verbose=False)
        return self.task.val_figures[self.figure]


def _config_of(run: Path) -> Any:
    config = read_config(run) if run.is_dir() else None
    if config is None:
        raise ValueError(f"{run} is no run folder: it has no {CONFIG}; a greedy soup needs runs, for their data")
    return config


def greedy_soup(
    states: Sequence[State], validate: Callable[[State], float]
) -> tuple[dict[str, Tensor], list[int], list[float], float]:
    """Add nets to a soup, from the best one to the worst one, as long as the soup's figure does not fall.

    Args:
        states: Weights of each net.
        validate: Function that returns the figure of weights; higher is better.

    Returns:
        The weights of the soup; the positions of its members in the order in which they were added; the figure of each
        net; and the figure of the soup.
    """
    figures = [validate(state) for state in states]
    order = sorted(range(len(states)), key=lambda position: -figures[position])
    members, best = order[:1], figures[order[0]]
    for position in order[1:]:
        figure = validate(mean(states[member] for member in [*members, position]))
        if figure >= best:
            members, best = [*members, position], figure
    return mean(states[member] for member in members), members, figures, best
