"""Train a net: `python train.py model=biformer data=imagenet data.root=/data/in1k`; see also `--help`."""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from retinue.runs.arguments import choose_for_few_images, quote_brackets
from retinue.runs.config import register_resolvers
from retinue.runs.help import wants_help, write_help
from retinue.utils.errors import in_a_job, user_errors
from retinue.utils.paths import CONF


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(cfg: DictConfig) -> float:
    from retinue.runs.folders import no_empty_folder
    from retinue.runs.slurm import refuse_without_multirun
    from retinue.runs.training import train

    with in_a_job(), no_empty_folder(Path(HydraConfig.get().runtime.output_dir)):
        refuse_without_multirun()
        return train(cfg)[f"test/{cfg.task.figure}"]


if __name__ == "__main__":
    register_resolvers()
    with user_errors(CONF, "train"):
        if wants_help(sys.argv[1:]):
            write_help("train", sys.argv[1:])
        else:
            sys.argv[1:] = choose_for_few_images(quote_brackets(sys.argv[1:]))
            main()
