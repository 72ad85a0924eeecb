"""Compilation of a net by `torch.compile`: as a whole or block by block, and whether it pays."""

from collections import defaultdict

import torch
import torch._dynamo as dynamo
from timm.layers import DropPath
from torch import Tensor, nn

# Compiler of all nets.
BACKEND = "inductor"
# Number of graphs that a block may have: one for each stage, shift of windows, size of the batch and mode.
GRAPHS = 64
# A net is compiled block by block if it has this many times as many blocks as kinds of blocks.
MIN_BLOCKS_PER_KIND = 3
# Estimates for one layer, a module without parts: the seconds in which it is compiled with its backward pass (a guess),
# and the seconds of a training step that are saved. Compiled steps of BiFormer-S and Swin-T saved more on an H100.
SECONDS_TO_COMPILE, SECONDS_SAVED = 2.0, 1e-4


class TensorDropPath(nn.Module):
    """Drop path (arXiv:1603.09382) whose rate is a tensor, so that blocks with different rates share one graph.

    A rate that is a Python number would be a constant of the graph.

    Args:
        drop_prob: Share of the images for which the path is dropped, below 1.
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        # Not a buffer, which checkpoints would hold and an average of the weights would change.
        self.keep = torch.tensor(1 - drop_prob)

    def _apply(self, fn, *args, **kwargs):
        self.keep = fn(self.keep)
        return super()._apply(fn, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) < self.keep
        return x * (kept / self.keep).to(x.dtype)


def layers(net: nn.Module) -> int:
    """Return the number of modules without parts."""
    return sum(not any(module.children()) for module in net.modules())


def alike_blocks(net: nn.Module) -> list[list[nn.Module]]:
    """Return the blocks of a net by kind: blocks of one class whose parameters have the same names and shapes.

    A block is a part of a sequence or list, has several parts with parameters, and lies in no other block. Only kinds
    with at least two blocks are returned, so stages of different widths are no blocks.
    """
    kinds: dict[tuple, list[nn.Module]] = defaultdict(list)
    for container in net.modules():
        if isinstance(container, nn.Sequential | nn.ModuleList):
            for part in container:
                if sum(next(child.parameters(), None) is not None for child in part.children()) > 1:
                    shapes = tuple((name, parameter.shape) for name, parameter in part.named_parameters())
                    kinds[type(part), shapes].append(part)
    alike = [blocks for blocks in kinds.values() if len(blocks) > 1]
    inner = {id(part) for blocks in alike for block in blocks for part in block.modules() if part is not block}
    outermost = [[block for block in blocks if id(block) not in inner] for blocks in alike]
    return [blocks for blocks in outermost if blocks]


def by_block(net: nn.Module) -> list[list[nn.Module]]:
    """Return the blocks to compile by kind if compiling them is much faster than compiling the net, else []."""
    kinds = alike_blocks(net)
    return kinds if kinds and sum(map(len, kinds)) >= MIN_BLOCKS_PER_KIND * len(kinds) else []


def compile_net(net: nn.Module, *, cuda_graphs: bool = False, one_size: bool = True) -> None:
    """Compile a net in place, so that the names of its weights stay.

    A net of many like blocks is compiled block by block: the blocks of a kind share their code, and the layers between
    the blocks are not compiled. CUDA graphs need the net as a whole.

    Args:
        net: The net, or a backbone.
        cuda_graphs: Replay a step's kernels as CUDA graphs. Then call `torch.compiler.cudagraph_mark_step_begin` before
            each step, and keep no output or gradient of the step before.
        one_size: All images have the same size. Otherwise the net is compiled as a whole, for any size.
    """
    dynamo.config.recompile_limit = max(GRAPHS, dynamo.config.recompile_limit)
    mode = "reduce-overhead" if cuda_graphs else None
    kinds = by_block(net) if one_size and not cuda_graphs else []
    for blocks in kinds:
        for block in blocks:
            share_drop_path(block)
            block.compile(backend=BACKEND, dynamic=False)
    if not kinds:
        net.compile(backend=BACKEND, mode=mode, dynamic=False if one_size else None)


def share_drop_path(block: nn.Module) -> None:
    """Replace each drop path of timm's by a `TensorDropPath` of the same rate."""
    for parent in list(block.modules()):
        for name, child in parent.named_children():
            if isinstance(child, DropPath) and child.scale_by_keep:
                setattr(parent, name, TensorDropPath(child.drop_prob).train(child.training))


def seconds_gained(net: nn.Module, steps: int) -> tuple[float, float]:
    """Return estimates of the seconds that compiling a net takes, and of the seconds that it saves in training.

    Args:
        net: The net, or a backbone.
        steps: Number of training steps.
    """
    kinds = by_block(net)
    compiled = sum(layers(blocks[0]) for blocks in kinds) if kinds else layers(net)
    faster = sum(layers(block) for blocks in kinds for block in blocks) if kinds else layers(net)
    return SECONDS_TO_COMPILE * compiled, SECONDS_SAVED * faster * steps
