"""Gathering over the processes of a training, for losses that compare all images of a step."""

import torch
from torch import Tensor
from torch.distributed.nn.functional import all_gather


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
    return torch.cat(all_gather(x))
