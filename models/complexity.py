"""Parameters and multiply-accumulates of a net, counted on the meta device."""

from collections.abc import Callable

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


def complexity(
    model: nn.Module | Callable[[], nn.Module], img_size: int | tuple[int, int], in_chans: int = 3
) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one image's forward pass, of a net or of what builds one.

    Convolutions, linear layers and attention count. No weights are copied, allocated or run.
    """
    if not isinstance(model, nn.Module):
        with torch.device("meta"):
            model = model()
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    tensors = (*model.named_parameters(), *model.named_buffers())
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    dtype = next(model.parameters()).dtype

    def flops(batch: int) -> int:
        images = torch.empty(batch, in_chans, *size, device="meta", dtype=dtype)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            functional_call(model, meta, (images,))
        return counter.get_total_flops()

    # one image is too few for batch norm in training; a part that does not grow with the batch counts whole
    return sum(parameter.numel() for parameter in model.parameters()), (2 * flops(2) - flops(3)) // 2
