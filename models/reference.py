"""Reference vectors: what a module computes with weights that anyone can rebuild from their names.

A vector holds the names and shapes of a module's state dict and 64 values of each output. The weights follow from the
names by `fill`, the input from `make_input`, so no checkpoint is stored and a vector takes a few KB. A reimplementation
that is loaded with those weights, as a released checkpoint is, must give the same output.

`scripts/make_vector.py` makes vectors; `tests/vectors/` holds the vectors of the papers' own code.
"""

import gzip
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retinue.utils.files import replacing

RECORDED_VALUES = 64


def load_vector(path: str | Path) -> dict[str, Any]:
    """Return a vector as a dictionary.

    Returns:
        system, variant: the parts of the file's name, `<system>__<variant>.json.gz`.
        source: repository, commit, file and function of the module.
        kwargs: the arguments that the module was built with.
        notes: what else one must know to repeat the run.
        input_shape: the shape that `make_input` was given.
        num_params: the number of parameters of the module.
        state: a list of [name, shape, dtype, as_built]; tensors with `as_built` (indices, masks and tables that the
            constructor computes) are not weights.
        outputs: for each output by name its shape, mean, standard deviation and `values`, which are taken at equal
            distances from the flattened output.
    """
    with gzip.open(path, "rt") as file:
        return json.load(file)


def save_vector(vector: Mapping[str, Any], path: str | Path) -> None:
    """Write a vector to `<system>__<variant>.json.gz`; equal vectors give equal bytes."""
    with replacing(path) as temporary_path:
        temporary_path.write_bytes(gzip.compress(json.dumps(vector).encode(), mtime=0))


def record_vector(
    module: nn.Module,
    input_shape: Sequence[int],
    *,
    system: str,
    variant: str,
    source: str = "",
    kwargs: Mapping[str, Any] | None = None,
    notes: str = "",
    output_names: Sequence[str] = (),
) -> dict[str, Any]:
    """Fill a module's weights by their names, run the module in evaluation mode and return the vector.

    Parameters and the running statistics of batch norms are filled. Other buffers stay as built. The module keeps the
    filled weights.

    Args:
        module: takes one tensor; its output is a tensor, a sequence of tensors or a mapping from names to tensors.
        input_shape: shape of the input, in the layout that the module takes.
        system: the paper's short name.
        variant: the net's name and, where they matter, its settings.
        source: repository, commit, file and function of the module.
        kwargs: the arguments that the module was built with; they must be values of JSON.
        notes: what else one must know to repeat the run.
        output_names: one name for each output. By default an output (B, classes) is `logits`, another single tensor
            `out`, and several outputs are `stage1`, `stage2` and so on.

    Raises:
        ValueError: the number of `output_names` is not the number of outputs.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    state = []
    for key, tensor in module.state_dict().items():
        running_statistic = key.rsplit(".", 1)[-1] in ("running_mean", "running_var")
        as_built = key not in parameters and not running_statistic
        if not as_built:
            tensor.copy_(torch.from_numpy(np.asarray(fill(key, tuple(tensor.shape)))))
        state.append([key, list(tensor.shape), str(tensor.dtype).removeprefix("torch."), as_built])
    # Some nets cache tables made of their weights when they change to evaluation mode, so change to it after filling.
    module.train().eval()
    with torch.inference_mode():
        outputs = _by_name(module(make_input(input_shape)), output_names)
    return {
        "system": system,
        "variant": variant,
        "source": source,
        "kwargs": dict(kwargs or {}),
        "notes": notes,
        "input_shape": list(input_shape),
        "num_params": sum(parameter.numel() for parameter in module.parameters()),
        "state": state,
        "outputs": {name: _summary(output) for name, output in outputs.items()},
    }


def _by_name(outputs: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the outputs of a module with their names in a vector."""
    if isinstance(outputs, Mapping) and not names:
        return dict(outputs)
    if isinstance(outputs, Tensor):
        tensors, default = [outputs], ["logits" if outputs.ndim == 2 else "out"]
    else:
        tensors = list(outputs.values() if isinstance(outputs, Mapping) else outputs)
        default = [f"stage{i}" for i in range(1, len(tensors) + 1)]
    if names and len(names) != len(tensors):
        raise ValueError(f"the module has {len(tensors)} outputs, but {len(names)} names were given")
    return dict(zip(names or default, tensors, strict=True))


def _summary(output: Tensor) -> dict[str, Any]:
    values = output.detach().double().flatten()
    return {
        "shape": list(output.shape),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "values": values[_recorded_places(values.numel(), RECORDED_VALUES)].tolist(),
    }


def _recorded_places(size: int, count: int) -> np.ndarray:
    """Return the indices of `count` values at equal distances in a flattened output of `size` values."""
    return np.linspace(0, size - 1, count).astype(int)


def fill(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 values of the tensor called `key`, which depend on its name and shape only.

    The scales keep the activations of a deep net in a normal range: a matrix or a convolution's kernel is divided by
    the square root of its number of inputs, scales of norms are near 1, biases near 0 and variances above 0.5.
    """
    noise = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "running_var":
        return 0.5 + np.abs(noise)
    if leaf == "running_mean" or leaf.startswith("bias") or leaf.endswith("bias"):
        return 0.1 * noise
    if leaf == "weight":
        return noise / math.sqrt(max(1, math.prod(shape[1:]))) if len(shape) > 1 else 1.0 + 0.1 * noise
    # Tables and tokens have several dimensions, layer scales and temperatures have one.
    return 0.2 * noise if len(shape) > 1 else 0.5 + 0.05 * noise


def official_state(vector: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict that the vector was made with, without the tensors that the constructor computes."""
    return {
        key: torch.from_numpy(np.asarray(fill(key, tuple(shape)), dtype=np.float32))
        for key, shape, _, as_built in vector["state"]
        if not as_built
    }


def make_input(shape: Sequence[int]) -> Tensor:
    """Return the input of a vector: float32 values of a normal distribution that depend on the shape only."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


def relative_error(recorded: Mapping[str, Any], output: Tensor) -> float:
    """Return ‖output − recorded‖ / ‖recorded‖ over the recorded values, or infinity if the shapes differ."""
    if list(output.shape) != recorded["shape"]:
        return math.inf
    values = output.detach().double().flatten()
    actual = values[_recorded_places(values.numel(), len(recorded["values"]))].numpy()
    expected = np.array(recorded["values"])
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-12))
