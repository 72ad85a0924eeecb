"""Compiling kernels, as they would be launched, for GPUs that are not there."""

import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may use, by compute capability
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
FEW = 8  # of the instructions that store registers to memory
OPTIONS = ("num_warps", "num_stages")


class Launch(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]  # by name, tensors on the meta device
    options: dict[str, int]


class Binary(NamedTuple):
    registers: int  # of a thread
    spills: int  # instructions that store registers to memory
    shared: int  # bytes


def launches_of(module: Any, call: Callable[[], Any]) -> list[Launch]:
    """The launches, in order, that `call` makes of kernels that `module` wraps by its `wrap_triton`."""
    launches = []

    class Recorder:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return self.record

        def record(self, *args: Any, **kwargs: Any) -> None:
            options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
            arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            launches.append(Launch(self.kernel, arguments, options))

    with mock.patch.object(module, "wrap_triton", Recorder):
        call()
    return launches


def compile_for(capability: int, launch: Launch) -> Binary:
    """Compile a launch, specialised by its integers as Triton does it, and read its resources from the binary."""
    signature, constants, divisible = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (value == 1 if isinstance(value, int) else value is None):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            divisible[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                divisible[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=divisible)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    return Binary(*_resources(binary.asm["cubin"]), binary.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and spills of a binary."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    return int(re.findall(r"REG:(\d+)", usage)[-1]), len(re.findall(r"\bSTL\b", code))


def assert_fits(capability: int, launch: Launch) -> None:
    """A launch compiles, spills no register and uses no more shared memory than there is.

    A few stores do not count: ptxas makes them of its own accord, to get by with so few registers that one more
    program runs at a time.
    """
    binary = compile_for(capability, launch)
    what = f"{launch.kernel.fn.__name__} for sm_{capability}: {binary}"
    assert binary.spills <= FEW, what
    assert binary.shared <= SHARED_MEMORY[capability], what


def written_when_compiled(call: Callable[..., Any], *inputs: tuple[Sequence[int], torch.dtype]) -> list[list[str]]:
    """The tensors that each kernel writes, by name, in the one graph that `torch.compile` makes of `call` for a GPU.

    Args:
        inputs: shape and type of each argument.
    """
    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    written = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        written.extend(
            node.kwargs["tensors_to_clone"] for node in graph.graph.nodes if "tensors_to_clone" in node.kwargs
        )
        return graph.forward

    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0)),
        mock.patch.object(torch.cuda, "_exchange_device", lambda device: device),
        mock.patch.object(torch.cuda, "_maybe_exchange_device", lambda device: device),
        FakeTensorMode(),
    ):
        tensors = [torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in inputs]
        torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=record))(*tensors)
    return written
