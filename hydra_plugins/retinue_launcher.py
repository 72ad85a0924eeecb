"""Register `hydra/launcher=slurm` with Hydra, which finds plug-ins only in the package `hydra_plugins`."""

from retinue.runs import slurm_sweep


class SlurmSweep(slurm_sweep.SlurmSweep):
    """Launcher of `conf/hydra/launcher/slurm.yaml`; Hydra demands a class that a module of this package defines."""
