"""Forward passes on the meta device, on which a net's multiply-accumulates are counted."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


def on_meta(image: Tensor) -> AbstractContextManager:
    """Return the context for a forward pass of `image`: `MapSizesOnCPU` on the meta device, otherwise no change."""
    return MapSizesOnCPU() if image.is_meta else nullcontext()


class MapSizesOnCPU(TorchFunctionMode):
    """Keep the tensors that a net makes of its maps' sizes on the CPU during a forward pass on the meta device.

    Detection transformers make integer tensors of the sizes and split their tokens by these values, and tensors on the
    meta device have no values. Where such a tensor meets one on the meta device, a copy without values replaces it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        tensors: list[Tensor] = []
        tree_map_only(Tensor, tensors.append, (args, kwargs))
        cpu_tensors = [tensor for tensor in tensors if not tensor.is_meta]
        if cpu_tensors and func is Tensor.to and torch.device("meta") in args:
            return args[0]
        if cpu_tensors and len(cpu_tensors) < len(tensors):
            # A scalar tensor on the CPU may stay: torch combines it with tensors on any device.
            args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta") if t.ndim else t, (args, kwargs))
        return func(*args, **kwargs)
