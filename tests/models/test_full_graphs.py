"""Every family of backbones is one graph for `torch.compile` on a GPU that this machine does not need to have."""

from typing import Any

import pytest
import timm
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from ops import backend
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


def move(net: nn.Module, device: str = "cuda") -> None:
    """Replace all parameters and buffers by tensors without values on a device, by default the stand-in of a GPU."""
    for module in net.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                moved = nn.Parameter(moved, requires_grad=tensor.requires_grad)
            setattr(module, name, moved)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", NETS)
def test_a_net_is_one_graph(name, dynamic):
    """Compile a net as in training, but without its gradients, for which autograd needs a real GPU.

    In a dynamic graph, height and width of the images are variable, as in detection, unless the net fixes them.
    """
    torch.compiler.reset()
    with torch.device("meta"):
        net = timm.create_model(name, drop_path_rate=0.1, **few_blocks(name))
    with stand_in_gpu(), torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        move(net)
        images = torch.empty(2, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
        if dynamic:
            torch._dynamo.maybe_mark_dynamic(images, (2, 3))
        compiled = torch.compile(net, fullgraph=is_whole(net), dynamic=None if dynamic else False, backend="aot_eager")
        scores = compiled(images)
    assert scores.shape == (2, 1000) and scores.device.type == "cuda"


# The operators with kernels that a step of each net runs, forward and backward.
OPERATORS = {
    "biformer_nano": "routed_attention",
    "inline_deit_tiny": "linear_attention",
    "nat_mini": "neighborhood_attention",
    "swin_nano": "window_attention",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_a_training_step_is_one_graph_each_way(name, monkeypatch):
    """Compile forward and backward with kernels for tensors on the CPU, since autograd needs a real GPU for others."""
    operators = []

    def record(graph: torch.fx.GraphModule, _: object) -> Any:
        targets = {str(node.target) for node in graph.graph.nodes}
        operators.append({target.split(".")[1] for target in targets if target.startswith("retinue.")})
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    # Otherwise the kernels are not offered on the CPU.
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    with torch.device("meta"):
        net = timm.create_model(name, drop_path_rate=0.1, **few_blocks(name))
    with stand_in_gpu(), backend.using("triton"), torch.autocast("cpu", torch.bfloat16):
        move(net, "cpu")
        compiled = torch.compile(net, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=record))
        compiled(torch.empty(2, 3, 64, 64)).sum().backward()
    assert operators == [{OPERATORS[name]}, {f"{OPERATORS[name]}_backward"}]
    assert all(parameter.grad is not None for parameter in net.parameters())
