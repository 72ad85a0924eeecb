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
    from runs.launch import launch, needs_launch
    from runs.result import read_result, show_result
    from runs.training import another_run, no_empty_folder, train_here

    folder = Path(cfg.run_dir)
    with no_empty_folder(folder):
        result, other = read_result(folder), another_run(cfg, folder)
        if other and not cfg.rerun:
            raise ValueError(f"{folder} holds a run with {other}: choose another hydra.run.dir, or rerun=true")
        cfg.rerun = bool(cfg.rerun and (result or other))  # an unfinished run goes on
        if result is None or cfg.rerun:
            check(cfg)
            launch(train_here, cfg) if needs_launch(cfg) else train_here(cfg)
            result = read_result(folder)
    assert result is not None
    show_result(result, folder)
    return result["metrics"]


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    with in_a_job():
        return train(cfg)[f"test/{cfg.task.figure}"]


if __name__ == "__main__":
    register_resolvers()
    with user_errors(CONF, "train"):
        if wants_help(sys.argv[1:]):
            write_help("train")
        else:
            main()
