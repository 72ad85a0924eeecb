"""Export nets as graphs that run without their Python code, and check each graph against its net.

A net is traced by `torch.export` with a variable number of images and, if asked for, a variable size of images. The
traced program is saved as it is, or as an ONNX file by PyTorch's exporter. A graph may silently hold for one size only,
so a file counts as exported when it has given the net's outputs at several numbers and sizes of images.
"""

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ops import backend

INPUT, OUTPUT = "image", "logits"
# Entry of a program's extra files that holds its metadata.
METADATA = "metadata.json"
# Largest difference of two logits relative to the largest logit: float32 sums in another order.
TOLERANCE = 1e-3
# Smallest share of the pixels whose class must be the same; ties of two classes may break either way.
EQUAL_PIXELS = 0.999
# Numbers of images at which a graph is checked.
BATCHES = (1, 2, 5)
# Changes of (height, width) in pixels at which a graph for variable sizes is checked.
SIZE_CHANGES = ((32, 32), (32, 0), (5, 11))
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class Agreement(NamedTuple):
    """How well a graph agrees with its net.

    Attributes:
        shapes: Shapes (B, C, H, W) of the images that were compared.
        error: Largest difference of two logits relative to the largest logit.
        same_class: Share of the images, or of the pixels, with the same best class.
    """

    shapes: list[tuple[int, ...]]
    error: float
    same_class: float


def require_onnx() -> None:
    """Refuse to go on without the packages of the extra `export`.

    Raises:
        ValueError: A package is missing; the message says how to install it.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"format=onnx needs {', '.join(missing)}: pip install '.[export]'")


def trace(net: nn.Module, shape: Sequence[int], dynamic_size: bool = False) -> ExportedProgram:
    """Trace a net in evaluation mode, with plain PyTorch in place of our kernels.

    Args:
        net: The net, from images (B, C, H, W) to logits.
        shape: (C, H, W) of the images.
        dynamic_size: Let height and width vary too; tracing then takes minutes for nets with windows.

    Returns:
        The program. Its number of images is fixed to 1 if the net cannot be traced for any number.

    Raises:
        ValueError: The net cannot be traced; the message gives the first line of the reason.
    """
    variable = {0: Dim.AUTO} | ({2: Dim.AUTO, 3: Dim.AUTO} if dynamic_size else {})
    net.eval()
    try:
        program = _export(net, torch.zeros(2, *shape), variable)
        if 0 not in variable_dimensions(program):
            return _export(net, torch.zeros(1, *shape), {})
    except Exception as error:
        # The tracer refuses code by exceptions of any kind.
        raise ValueError(f"{type(net).__name__} cannot be exported: {_reason(error)}") from error
    return program


def _export(net: nn.Module, images: Tensor, variable: Mapping[int, Any]) -> ExportedProgram:
    with backend.using("torch"), torch.no_grad():
        return torch.export.export(net, (images,), dynamic_shapes=(dict(variable),), strict=False)


def variable_dimensions(program: ExportedProgram) -> set[int]:
    """Return the dimensions of the images that may vary: 0 for their number, 2 and 3 for height and width."""
    [name] = program.graph_signature.user_inputs
    image = next(node.meta["val"] for node in program.graph.nodes if node.name == name)
    # A length that the trace has fixed may still be a symbol, of one value.
    symbols = {i: length.node for i, length in enumerate(image.shape) if isinstance(length, torch.SymInt)}
    return {i for i, node in symbols.items() if node.maybe_as_int() is None}


def save_program(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a program with its metadata as a `torch.export` file."""
    torch.export.save(program, path, extra_files={METADATA: json.dumps(dict(metadata))})


def save_onnx(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a program with its metadata as one ONNX file.

    Raises:
        ValueError: ONNX lacks an operator of the program; the message gives the first line of the reason.
    """
    require_onnx()
    import onnx

    try:
        converted: Any = torch.onnx.export(
            program, input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False
        )
    except Exception as error:
        # The exporter wraps the reason several times.
        raise ValueError(f"the net cannot be written as ONNX: {_reason(error)}") from error
    model = converted.model_proto
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, path)


def load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """Return a function that runs an ONNX file by onnxruntime on the CPU, with torch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        [logits] = session.run([OUTPUT], {INPUT: images.numpy()})
        return torch.from_numpy(np.asarray(logits))

    return run


def load_program(path: Path) -> Callable[[Tensor], Tensor]:
    """Return the module of a `torch.export` file."""
    return torch.export.load(path).module()


def check(
    net: nn.Module, graph: Callable[[Tensor], Tensor], shape: Sequence[int], variable: Iterable[int]
) -> Agreement:
    """Compare a graph with its net on normally distributed images, at several numbers and sizes of images.

    Sizes that the net itself refuses are left out.

    Args:
        net: The net, in evaluation mode.
        graph: Function from images (B, C, H, W) to logits.
        shape: (C, H, W) of the images that were traced.
        variable: Dimensions that may vary, as `variable_dimensions` returns them.

    Raises:
        ValueError: The graph refuses images that the net takes, or its logits differ by more than `TOLERANCE`, or its
            classes differ.
    """
    channels, height, width = shape
    batches = BATCHES if 0 in variable else BATCHES[:1]
    shapes = [(batch, channels, height, width) for batch in batches]
    if {2, 3} <= set(variable):
        shapes += [(batches[-1], channels, height + down, width + right) for down, right in SIZE_CHANGES]
    generator = torch.Generator().manual_seed(0)
    compared, errors, shares = [], [], []
    for images in (torch.randn(shape_, generator=generator) for shape_ in shapes):
        with backend.using("torch"), torch.no_grad():
            try:
                expected = net(images)
            except Exception:
                if images.shape[1:] == tuple(shape):
                    raise
                continue
            try:
                given = graph(images)
            except Exception as error:
                raise ValueError(
                    f"the exported graph refuses images {_text(images.shape)}: {_reason(error)}"
                ) from error
        if given.shape != expected.shape:
            raise ValueError(
                f"for images {_text(images.shape)} the exported graph gives logits {_text(given.shape)} "
                f"in place of {_text(expected.shape)}"
            )
        compared.append(tuple(images.shape))
        errors.append(float((given - expected).abs().max() / expected.abs().max()))
        shares.append(float((given.argmax(1) == expected.argmax(1)).double().mean()))
        if not errors[-1] <= TOLERANCE or shares[-1] < (1 if expected.ndim == 2 else EQUAL_PIXELS):
            raise ValueError(
                f"for images {_text(images.shape)} the exported graph differs from the net: relative error "
                f"{errors[-1]:.1e}, {shares[-1]:.2%} of the classes equal"
            )
    return Agreement(compared, max(errors), min(shares))


def _text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _reason(error: BaseException) -> str:
    """Return the first line of the innermost cause of an exception."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
