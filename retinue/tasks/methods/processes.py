"""Gathering over the processes of a training, for losses that compare all images of a step."""

import torch
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def rank() -> int:
    """Return the global rank of this process; 0 if it trains alone."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def ranks() -> int:
    """Return the number of processes that train."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def gather(x: Tensor) -> Tensor:
    """Return the rows of all processes, (W * B, ...), by rank; the gradient flows back to each process's own rows.

    Every process must call this with the same shape. A loss over all rows that every process computes has the same
    gradient as in one process with all images, since DDP takes the mean of the gradients, and each process receives
    the sum of all W equal losses.

    Args:
        x: (B, ...), the rows of this process.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x
    rows = torch.cat(all_gather(x))
    if rows.requires_grad:
        # With gloo, torch's all_gather sends the memory of a gradient as if the gradient were contiguous.
        rows.register_hook(lambda grad: grad.contiguous())
    return rows
