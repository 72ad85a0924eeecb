"""Probe the frozen features of a net: `python probe.py run=DIR probe=linear`; see also `--help`."""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from retinue.runs.arguments import quote_brackets
from retinue.runs.config import allow_run_keys, register_resolvers, with_run
from retinue.runs.help import wants_help, write_help
from retinue.utils.errors import in_a_job, user_errors
from retinue.utils.paths import CONF


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="probe")
def main(cfg: DictConfig) -> float:
    from retinue.runs.folders import no_empty_folder
    from retinue.runs.probing import probe
    from retinue.runs.slurm import refuse_without_multirun

    hydra_config = HydraConfig.get()
    with in_a_job(), no_empty_folder(Path(hydra_config.runtime.output_dir)):
        refuse_without_multirun()
        metrics = probe(with_run(cfg, hydra_config.overrides.task, hydra_config.runtime.choices))
        return next(value for value in metrics.values() if isinstance(value, float))


if __name__ == "__main__":
    register_resolvers()
    with user_errors(CONF, "probe"):
        if wants_help(sys.argv[1:]):
            write_help("probe", sys.argv[1:])
        else:
            sys.argv[1:] = allow_run_keys(quote_brackets(sys.argv[1:]))
            main()
