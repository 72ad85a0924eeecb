"""The processes of a run: how they are started, and which rank this process has.

On several devices of one machine, the processes are started here with the composed config. Running the command line
again in each process, as Lightning does, would start a whole sweep again in every rank under `--multirun`. torchrun,
and srun with several tasks, start the processes themselves; then nothing is started here.
"""

import os
import signal
import socket
from collections.abc import Callable

from omegaconf import DictConfig, OmegaConf

from retinue.utils.errors import Stopped


def rank() -> int:
    """Return the global rank of this process; 0 if it runs alone."""
    if "LOCAL_RANK" in os.environ:
        return int(os.environ.get("RANK", os.environ["LOCAL_RANK"]))
    return int(os.environ["SLURM_PROCID"]) if slurm_tasks() > 1 else 0


def slurm_tasks() -> int:
    """Return the number of processes in this process's srun step; 1 in a batch script, which srun has not started."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))


def needs_launch(cfg: DictConfig) -> bool:
    """Tell whether the run needs more processes than this one and no launcher outside has started them.

    Raises:
        ValueError: a launcher has started a different number of processes, or several machines are asked for without
            a launcher.
    """
    devices, nodes = cfg.trainer.devices, cfg.trainer.num_nodes
    if "LOCAL_RANK" in os.environ:
        return False
    if slurm_tasks() > 1:
        if slurm_tasks() != devices * nodes:
            raise ValueError(
                f"srun has started {slurm_tasks()} processes for trainer.devices={devices} x trainer.num_nodes={nodes};"
                f" use --nodes={nodes} --ntasks-per-node={devices}"
            )
        return False
    if nodes > 1:
        raise ValueError(f"trainer.num_nodes={nodes} needs hydra/launcher=slurm, srun or torchrun to start processes")
    return devices > 1


def launch(run: Callable[[DictConfig], object], cfg: DictConfig) -> None:
    """Call `run(cfg)` in `trainer.devices` processes and wait for them.

    Signals that ask to stop are passed on to the processes, so that all ranks save and end together.

    Raises:
        Stopped: the processes ended after a signal.
    """
    import torch.multiprocessing as mp

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = mp.start_processes(
        _run_rank,
        args=(run, OmegaConf.to_container(cfg, resolve=True), cfg.trainer.devices, port),
        nprocs=cfg.trainer.devices,
        join=False,
        start_method="spawn",
    )
    assert processes is not None
    received = 0

    def pass_on(number: int, frame: object) -> None:
        nonlocal received
        received = number
        for process in processes.processes:
            if process is not None and process.pid and process.is_alive():
                os.kill(process.pid, number)

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    previous_handlers = {number: signal.signal(number, pass_on) for number in signals}
    try:
        while not processes.join():
            pass
    except mp.ProcessExitedException as error:
        if not received:
            raise
        name = signal.Signals(received).name
        raise Stopped(received, f"stopped by {name}; the same command goes on from there") from error
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def _run_rank(rank: int, run: Callable[[DictConfig], object], cfg: dict, devices: int, port: int) -> None:
    os.environ.update(
        LOCAL_RANK=str(rank), RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(devices), LOCAL_WORLD_SIZE=str(devices),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    try:
        run(OmegaConf.create(cfg))
    except Stopped as stop:
        os._exit(128 + stop.signum)
