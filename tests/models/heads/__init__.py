"""Helpers of the tests of heads and necks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import load_weights
from models.reference import load_vector, make_input, official_state, relative_error
from retinue.utils.arithmetic import ceil_div

VECTORS = Path(__file__).parent.parent.parent / "vectors"


def sides(H: int, W: int, levels: int) -> list[tuple[int, int]]:
    """Return height and width of each map of a pyramid whose finest map is H x W."""
    return [(ceil_div(H, 2**i), ceil_div(W, 2**i)) for i in range(levels)]


def pyramid(channels: Sequence[int], H: int, W: int, batch: int = 2) -> list[Tensor]:
    """Return random maps with these numbers of channels; the first is H x W, and each next one is half as large."""
    return [torch.randn(batch, c, *side) for c, side in zip(channels, sides(H, W, len(channels)), strict=True)]


def input_maps(channels: Sequence[int], H: int, W: int) -> list[Tensor]:
    """Return the maps of a reference vector's pyramid, one image; the first is H x W."""
    return [make_input([1, c, *side]) for c, side in zip(channels, sides(H, W, len(channels)), strict=True)]


def assert_matches(name: str, build: Callable[[], nn.Module], inputs: Sequence[Any] | None = None) -> None:
    """Assert that a module with the authors' weights gives the outputs of the authors' code.

    The weights are loaded in the same way as a released file.

    Args:
        name: Name of the reference vector.
        build: Function that builds the module.
        inputs: Arguments of the module; by default the list of maps that the vector describes.
    """
    vector = load_vector(VECTORS / f"{name}.json.gz")
    model = build().eval()
    loaded = load_weights(model, official_state(vector))
    assert not loaded.unexpected and not loaded.dropped and not loaded.resized
    assert sum(parameter.numel() for parameter in model.parameters()) == vector["num_params"]

    if inputs is None:
        _, width, H, W = vector["input_shape"]
        arguments = vector["kwargs"]
        channels = arguments.get("in_channels") or arguments.get("feature_channels") or [width] * arguments["levels"]
        inputs = [input_maps(channels, H, W)]
    with torch.inference_mode():
        outputs = model(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    errors = [relative_error(*pair) for pair in zip(vector["outputs"].values(), outputs, strict=True)]
    assert max(errors) < 1e-5, errors


def stir(model: Any) -> Any:
    """Add noise to all weights and return the model: initial zeros would hide errors in the layers before them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def without_gradient(model: nn.Module, output: Tensor) -> set[str]:
    """Return the names of the parameters that the scalar output does not depend on."""
    output.backward()
    return {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
