"""Parameters that a method's loss does not depend on, such as stages that it leaves out."""

import torch
from torch.func import functional_call

from retinue.tasks.methods.method import Method


def unused_parameters(method: Method, in_chans: int) -> list[str]:
    """Return the names of the parameters that require a gradient but receive none from the loss.

    DDP refuses such parameters. The loss is traced on the meta device in evaluation mode, where nothing is computed.

    Args:
        method: The method.
        in_chans: Number of image channels.
    """
    views = []
    for size, grid, masked in method.views:
        view = {"image": torch.empty(2, in_chans, *size, device="meta")}
        views.append(view | {"mask": torch.empty(2, *grid, dtype=torch.bool, device="meta")} if masked else view)
    indices = torch.empty(2, dtype=torch.int64, device="meta")
    tensors = (*method.named_parameters(), *method.named_buffers())
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    trained = [name for name, parameter in method.named_parameters() if parameter.requires_grad]
    for name in trained:
        meta[name].requires_grad_()
    was_training = method.training
    batch = {"views": views, "index": indices, "label": indices}
    losses = functional_call(method.eval(), meta, (batch, 0.0), tie_weights=False)
    method.train(was_training)
    gradients = torch.autograd.grad(losses["loss"], [meta[name] for name in trained], allow_unused=True)
    return [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]
