"""Auxiliary losses in two processes (gloo, CPU), with gradients accumulated over two batches."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from tests.models.test_backbones import build
from tests.retinue.runs.cli import averages_shards

# One block for each loss: connectivity, diversity, load_balance
MIXERS = [[{"name": "sparsifiner", "size": 4}, {"name": "full", "diversity": 2.0}, "mixture_of_heads"]]


class Total(nn.Module):
    """Net whose forward pass returns the sum of a loss on the scores and of the auxiliary losses."""

    def __init__(self):
        super().__init__()
        self.net = build("deit_tiny", depths=(3,), dim=48, heads=4, num_classes=3, img_size=64, mixers=MIXERS)

    def forward(self, x):
        scores, losses = self.net.forward_with_losses(x)
        assert set(losses) == {"connectivity", "diversity", "load_balance"}
        return scores.square().mean() + sum(losses.values())


def images(rank: int, step: int) -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2 * rank + step))


def train(rank: int, way: str, folder: str) -> None:
    """Accumulate the gradients of two batches in one of two processes, and write them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = Total()
    if way == "ddp":
        wrapped = DistributedDataParallel(model)
        with wrapped.no_sync():
            wrapped(images(rank, 0)).backward()
        wrapped(images(rank, 1)).backward()
    else:
        mesh = init_device_mesh("cpu", (2,))
        for block in model.net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for step in (0, 1):
            model(images(rank, step)).backward()
    grads = {}
    for name, parameter in model.named_parameters():
        grad: torch.Tensor = parameter.grad  # pyright: ignore[reportAssignmentType]
        grads[name] = grad if way == "ddp" else grad.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
    if rank == 0:
        torch.save(grads, f"{folder}/grads.pt")
    # Gloo's thread may still hold the last sum, and it would wait for Python, which waits for the thread's end.
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", pytest.param("fsdp", marks=averages_shards)])
def test_gradients_are_the_mean_over_processes_and_the_sum_over_batches(way, tmp_path: Path):
    model = Total()
    for rank in (0, 1):
        for step in (0, 1):
            (model(images(rank, step)) / 2).backward()
    spawn(train, (way, str(tmp_path)), nprocs=2)
    grads = torch.load(tmp_path / "grads.pt", weights_only=True)
    assert set(grads) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
        torch.testing.assert_close(
            grads[name], parameter.grad, rtol=1e-4, atol=1e-5 * float(parameter.grad.abs().max())
        )
