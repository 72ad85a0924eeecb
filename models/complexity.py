"""Parameters and multiply-accumulates of a net, counted on the meta device."""

from collections.abc import Callable

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


def complexity(
    model: nn.Module | Callable[[], nn.Module], img_size: int | tuple[int, int], in_chans: int = 3
) -> tuple[int, int]:
    """Return a net's number of parameters and its multiply-accumulates (MACs) for a forward pass of one image.

    Convolutions, linear layers and attention are counted, on the meta device: no weights are copied or allocated and
    nothing is computed.

    Args:
        model: The net, or a function that builds it. The function runs on the meta device.
        img_size: Side of a square image, or (height, width), in pixels.
        in_chans: Number of image channels.
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
            # With tied weights, a layer that two modules share, as in RTMDet, would keep a tensor on the meta device.
            functional_call(model, meta, (images,), tie_weights=False)
        return counter.get_total_flops()

    # Batch norm in training needs more than one image. Two batch sizes give the cost of the first image including the
    # parts that do not depend on the batch: a + b for flops(n) = a + n * b. A MAC is two FLOPs.
    return sum(parameter.numel() for parameter in model.parameters()), (2 * flops(2) - flops(3)) // 2
