"""The processes of a run: who starts them, and which of them this one is.

On several devices of one machine they are started here, with the composed config, so that the command line is not run
again in each: under `--multirun` that would start the whole sweep again in every rank. Under torchrun, or srun with
several tasks, which start the processes themselves, nothing is started here.
"""

import os
import signal
import socket
from collections.abc import Callable

import torch.multiprocessing as mp
from omegaconf import DictConfig, OmegaConf

from retinue.utils.errors import Stopped


def rank() -> int:
    """Of this process among those of its run."""
    if "LOCAL_RANK" in os.environ:
        return int(os.environ.get("RANK", os.environ["LOCAL_RANK"]))
    return int(os.environ["SLURM_PROCID"]) if slurm_tasks() > 1 else 0


def slurm_tasks() -> int:
    """How many processes srun has started with this one; a batch script's own processes are none of srun's."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))


def needs_launch(cfg: DictConfig) -> bool:
    """Whether the run wants more processes than this one and nobody else starts them.

    Raises:
        ValueError: somebody has started another number of them, or nobody can start them on several machines.
    """
    devices, nodes = cfg.trainer.devices, cfg.trainer.num_nodes
    if "LOCAL_RANK" in os.environ:
        return False
    if slurm_tasks() > 1:
        if slurm_tasks() != devices * nodes:
            raise ValueError(
                f"srun has started {slurm_tasks()} processes for trainer.devices={devices} x trainer.num_nodes={nodes}:"
                f" it takes --nodes={nodes} --ntasks-per-node={devices}"
            )
        return False
    if nodes > 1:
        raise ValueError(f"trainer.num_nodes={nodes} needs hydra/launcher=slurm, srun or torchrun to start processes")
    return devices > 1


def launch(run: Callable[[DictConfig], object], cfg: DictConfig) -> None:
    """Run `run(cfg)` in `trainer.devices` processes, and wait for them.

    Signals that ask to stop are passed on, so that the ranks save and end together.
    """
    plain = OmegaConf.to_container(cfg, resolve=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = mp.start_processes(
        _rank,
        args=(run, plain, cfg.trainer.devices, port),
        nprocs=cfg.trainer.devices,
        join=False,
        start_method="spawn",
    )
    assert processes is not None
    received = 0

    def pass_on(number: int, frame: object) -> None:
        nonlocal received
        received = number
        for process in filter(None, processes.processes):
            if process.pid and process.is_alive():
                os.kill(process.pid, number)

    former = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    try:
        while not processes.join():
            pass
    except mp.ProcessExitedException as error:
        if received:
            raise Stopped(
                received, f"stopped by {signal.Signals(received).name}; the same command goes on from there"
            ) from error
        raise
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _rank(rank: int, run: Callable[[DictConfig], object], cfg: dict, devices: int, port: int) -> None:
    os.environ.update(
        LOCAL_RANK=str(rank), RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(devices), LOCAL_WORLD_SIZE=str(devices),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    try:
        run(OmegaConf.create(cfg))
    except Stopped as stop:
        os._exit(128 + stop.signum)
