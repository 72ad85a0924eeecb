"""Train a net: `python train.py model=biformer data=imagenet data.root=/data/in1k`; `--help` lists what there is."""

import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from runs.config import CONF, check, register_resolvers
from runs.errors import in_a_job, user_errors
from runs.help import wants_help, write_help


def train(cfg: DictConfig) -> dict[str, Any]:
    """Train as composed, on as many devices as the config says; a run that is finished is not run again.

    Returns:
        The metrics of `result.json`: `test/top1`, `test/top1_ci95`, ...

    Raises:
        ValueError: the config asks for what cannot be.
    """
    from runs.launch import launch, needs_launch, rank
    from runs.result import read_result, show_result
    from runs.status import attempt
    from runs.training import no_empty_folder, starts_anew, train_here

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


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    from runs.slurm import refuse_without_multirun
    from runs.training import no_empty_folder

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
