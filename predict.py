"""Predict images without labels: `python predict.py run=DIR images=DIR`; see also `--help`."""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from retinue.runs.arguments import quote_brackets, quote_paths
from retinue.runs.config import allow_run_keys, register_resolvers, with_run
from retinue.runs.help import wants_help, write_help
from retinue.utils.errors import in_a_job, user_errors
from retinue.utils.paths import CONF


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="predict")
def main(cfg: DictConfig) -> None:
    from retinue.runs.folders import no_empty_folder
    from retinue.runs.prediction import predict
    from retinue.runs.slurm import refuse_without_multirun

    hydra_config = HydraConfig.get()
    with in_a_job(), no_empty_folder(Path(hydra_config.runtime.output_dir)):
        refuse_without_multirun()
        predict(with_run(cfg, hydra_config.overrides.task, hydra_config.runtime.choices))


if __name__ == "__main__":
    register_resolvers()
    with user_errors(CONF, "predict"):
        if wants_help(sys.argv[1:]):
            write_help("predict", sys.argv[1:])
        else:
            sys.argv[1:] = allow_run_keys(quote_brackets(quote_paths(sys.argv[1:], ("images", "save"))))
            main()
