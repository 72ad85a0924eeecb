"""Forms in which a net is executed: eager, compiled, and with its kernels replayed as CUDA graphs."""

from collections.abc import Callable

import torch
from torch import nn

from retinue.tasks.compilation import compile_net

# Forms by name. "compiled" is what `task.compile=true` does: block by block if the blocks are alike. "whole" compiles
# the net as a whole, "reduce-overhead" does so with CUDA graphs, and "graph" replays the kernels of an eager step.
EAGER, COMPILED, WHOLE, REDUCE_OVERHEAD, GRAPH = "eager", "compiled", "whole", "reduce-overhead", "graph"
FORMS = (EAGER, COMPILED, WHOLE, REDUCE_OVERHEAD, GRAPH)
# Forms that need a GPU.
GPU_FORMS = (REDUCE_OVERHEAD, GRAPH)
# Eager steps before a step is captured, in which libraries choose their kernels and the optimiser makes its state.
STEPS_BEFORE_CAPTURE = 3


def prepare(net: nn.Module, form: str) -> None:
    """Compile a net in place as its form says."""
    if form == WHOLE:
        net.compile(dynamic=False)
    elif form in (COMPILED, REDUCE_OVERHEAD):
        compile_net(net, cuda_graphs=form == REDUCE_OVERHEAD)


def in_form(step: Callable[[], object], form: str) -> Callable[[], object]:
    """Return a function that runs a step of a prepared net in its form."""
    if form == GRAPH:
        return captured(step)
    if form != REDUCE_OVERHEAD:
        return step

    def marked() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        step()

    return marked


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """Capture a step in one CUDA graph, and return a function that replays the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(STEPS_BEFORE_CAPTURE):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
