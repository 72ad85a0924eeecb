"""Train a net: `python train.py model=biformer data=imagenet data.root=/data/in1k`; `--help` lists what there is."""

import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from retinue.runs.config import check, register_resolvers
from retinue.runs.help import wants_help, write_help
from retinue.utils.errors import in_a_job, user_errors
from retinue.utils.paths import CONF


def train(cfg: DictConfig) -> dict[str, Any]:
    """Train as composed, on as many devices as the config says; a run that is finished is not run again.

    Returns:
        The metrics of `result.json`: `test/top1`, `test/top1_ci95`, ...

    Raises:
        ValueError: the config asks for what cannot be.
    """
    from retinue.runs.launch import launch, needs_launch, rank
    from retinue.runs.result import read_result, show_result
    from retinue.runs.status import attempt
    from retinue.runs.training import no_empty_folder, starts_anew, train_here

    folder = Path(cfg.run_dir)
    with no_empty_folder(folder):
        cfg.rerun = starts_anew(cfg, folder)
        result = None if cfg.rerun else read_result(folder)
        if result is None:
            with attempt(folder):
                check(cfg)
                if needs_launch(cfg):
                    launch(train_here, cfg)
                    result = read_result(folder)
                else:
                    result = train_here(cfg)
    assert result is not None
    if rank() == 0:
        show_result(result, folder)
    return result["metrics"]


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(cfg: DictConfig) -> float:
    from retinue.runs.slurm import refuse_without_multirun
    from retinue.runs.training import no_empty_folder

    with in_a_job(), no_empty_folder(Path(cfg.run_dir)):
        refuse_without_multirun()
        return train(cfg)[f"test/{cfg.task.figure}"]


if __name__ == "__main__":
    register_resolvers()
    with user_errors(CONF, "train"):
        if wants_help(sys.argv[1:]):
            write_help("train")
        else:
            main()
