"""Every family of backbones is one graph for `torch.compile` on a GPU that this machine does not need to have."""

import pytest
import timm
import torch
from torch import nn

from tests.models.test_backbones import EVERY, few_blocks
from tests.ops.kernels.ahead_of_time import stand_in_gpu

# One net for each op with kernels; the other families are slow tests.
WITH_KERNELS = ("biformer_nano", "cswin_tiny", "inline_deit_tiny", "l2vit_tiny", "litv2_small", "nat_mini", "swin_nano")
NETS = [
    pytest.param(*net.values, marks=net.marks if net.values[0] in WITH_KERNELS else pytest.mark.slow) for net in EVERY
]


def is_whole(net: nn.Module) -> bool:
    """Tell whether no op of a net declares that it cannot be one graph."""
    return all(getattr(module, "fullgraph", True) for module in net.modules())


def to_gpu(net: nn.Module) -> None:
    """Replace all parameters and buffers by tensors without values on the stand-in of a GPU."""
    for module in net.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            moved = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
            if isinstance(tensor, nn.Parameter):
                moved = nn.Parameter(moved, requires_grad=tensor.requires_grad)
            setattr(module, name, moved)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", NETS)
def test_a_net_is_one_graph(name, dynamic):
    """Compile a net as in training, but without its gradients, for which autograd needs a real GPU."""
    torch.compiler.reset()
    with torch.device("meta"):
        net = timm.create_model(name, drop_path_rate=0.1, **few_blocks(name))
    with stand_in_gpu(), torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        to_gpu(net)
        images = torch.empty(2, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
        compiled = torch.compile(net, fullgraph=is_whole(net), dynamic=dynamic, backend="aot_eager")
        scores = compiled(images)
    assert scores.shape == (2, 1000) and scores.device.type == "cuda"
