"""Ahead-of-time compilation of kernels for GPUs that this machine does not need to have."""

import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops import triton_kernel_wrap
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Maximum shared memory of a program in bytes, by compute capability.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

# Triton's names of pointer types.
POINTER_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint64: "*u64",
}

# Types in which a kernel receives a Python float: an ordinary launch passes float32, TorchInductor float64.
FLOAT_TYPES = ("fp32", "fp64")

# Maximum number of spill stores that a test accepts. ptxas spills a few registers of its own accord, so that one more
# program can run at a time.
ACCEPTED_SPILLS = 12

# Keyword arguments of a launch that are options of the compiler and not arguments of the kernel.
COMPILER_OPTIONS = ("num_warps", "num_stages")


class Launch(NamedTuple):
    """A recorded launch of a kernel.

    Attributes:
        kernel: the `triton.jit` function.
        arguments: arguments by name; tensors are on the meta device.
        options: options of the compiler by name.
    """

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


class Resources(NamedTuple):
    """Resources that a compiled kernel uses.

    Attributes:
        registers: registers per thread.
        spills: number of instructions that store registers to memory.
        shared: shared memory per program in bytes.
    """

    registers: int
    spills: int
    shared: int


def launches_of(module: Any, call: Callable[[], Any]) -> list[Launch]:
    """Return the launches that `call` makes, in order, of the kernels that `module` passes to its `wrap_triton`."""
    launches = []

    class Recorder:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return self.record

        def record(self, *args: Any, **kwargs: Any) -> None:
            options = {name: kwargs.pop(name) for name in COMPILER_OPTIONS if name in kwargs}
            arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            launches.append(Launch(self.kernel, arguments, options))

    with mock.patch.object(module, "wrap_triton", Recorder):
        call()
    return launches


def compile_for(capability: int, launch: Launch, float_type: str) -> Resources:
    """Compile the kernel of a launch for a compute capability and return the resources that it uses.

    As in a launch by Triton, the code is specialised for integers that are 1 or divisible by 16.

    Args:
        capability: compute capability, such as 90.
        launch: the launch.
        float_type: Triton's name of the type of the floats among the arguments.
    """
    signature, constants, divisible = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (value == 1 if isinstance(value, int) else value is None):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = POINTER_TYPES[value.dtype]
            divisible[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = float_type if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                divisible[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=divisible)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    return Resources(*_registers_and_spills(binary.asm["cubin"]), binary.metadata.shared)


def _registers_and_spills(cubin: bytes) -> tuple[int, int]:
    """Return the registers per thread of a binary and the number of its spill stores."""
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
    """Check that a launch compiles, spills no registers (see `ACCEPTED_SPILLS`) and fits the shared memory.

    A kernel with a float among its arguments must do so for each of `FLOAT_TYPES`.
    """
    if capability >= 100 and torch.__version__ < "2.11":
        pytest.skip("kernels are not offered there: Triton 3.4 cannot compile all of them")
    takes_float = any(isinstance(value, float) for value in launch.arguments.values())
    for float_type in FLOAT_TYPES if takes_float else FLOAT_TYPES[:1]:
        resources = compile_for(capability, launch, float_type)
        description = f"{launch.kernel.fn.__name__} for sm_{capability}, floats as {float_type}: {resources}"
        assert resources.spills <= ACCEPTED_SPILLS, description
        assert resources.shared <= SHARED_MEMORY[capability], description


@contextmanager
def stand_in_gpu() -> Iterator[None]:
    """Let tensors without values be on a GPU that this machine does not have, of compute capability 9.0."""
    if torch.__version__ < "2.11":
        pytest.skip("torch 2.8 does not compile for tensors without values")
    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    # Triton 3.4 has the driver itself in `active`, which is a property in later versions.
    active = "_active" if hasattr(triton.runtime.driver, "_active") else "active"
    with (
        mock.patch.object(triton.runtime.driver, active, driver),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0)),
        mock.patch.object(torch.cuda, "_exchange_device", lambda device: device),
        mock.patch.object(torch.cuda, "_maybe_exchange_device", lambda device: device),
        # Otherwise a kernel that does not compile is a warning only.
        mock.patch.object(triton_kernel_wrap.log, "warning", side_effect=AssertionError),
        FakeTensorMode(),
    ):
        yield


def written_when_compiled(call: Callable[..., Any], *inputs: tuple[Sequence[int], torch.dtype]) -> list[list[str]]:
    """Return the names of the tensors that each kernel writes when `torch.compile` compiles `call` for a GPU.

    The test fails if `torch.compile` needs more than one graph.

    Args:
        call: function of tensors.
        inputs: shape and data type of each argument.
    """
    written = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        written.extend(
            node.kwargs["tensors_to_clone"] for node in graph.graph.nodes if "tensors_to_clone" in node.kwargs
        )
        return graph.forward

    with stand_in_gpu():
        tensors = [torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in inputs]
        torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=record))(*tensors)
    return written
