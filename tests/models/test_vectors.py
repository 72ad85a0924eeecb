"""Every reference vector: our nets and ops, with the authors' weights, give what the authors' code gave."""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from models import DenseBackbone, backbones, create_model, heads, load_weights, timm_nets
from models.weights import rename_weights
from ops import attention, create_op
from tests.reference import load_vector, make_input, official_state, relative_error


def claims(*modules: ModuleType) -> dict[str, tuple[str, Any]]:
    """Each vector's name, the file that claims it, and what as."""
    return {name: (module.__name__.rpartition(".")[2], claim) for module in modules
            for name, claim in getattr(module, "VECTORS", {}).items()}  # fmt: skip


def files(package: ModuleType) -> list[ModuleType]:
    return [
        importlib.import_module(f"{package.__name__}.{info.name}") for info in pkgutil.iter_modules(package.__path__)
    ]


NETS, OPS, HEADS = [timm_nets, *files(backbones)], files(attention), files(heads)

VECTORS = [
    pytest.param(path, id=path.name.removesuffix(".json.gz"), marks=pytest.mark.slow if large else ())
    for path in sorted((Path(__file__).parent.parent / "vectors").glob("*.json.gz"))
    if path.name.removesuffix(".json.gz") not in claims(*HEADS)  # tests/models/heads/
    for large in [load_vector(path)["num_params"] > 30e6]
]


def build(name: str, vector: dict) -> nn.Module:
    """The net or the op that claims the vector."""
    nets, ops = claims(*NETS), claims(*OPS)
    assert name in nets or name in ops, "no file's VECTORS claims this vector"
    if name in ops:
        op, arguments = ops[name]
        return create_op(op, **arguments(vector["kwargs"]))
    claim = nets[name][1]
    net, arguments = (claim, {}) if isinstance(claim, str) else claim
    return (DenseBackbone if "stage1" in vector["outputs"] else timm.create_model)(net, **arguments)


def run(model: nn.Module, vector: dict, x: Tensor) -> tuple[Tensor, ...]:
    """What the model gives for an input of the vector's shape."""
    theirs = vector["kwargs"]
    with torch.inference_mode():
        if "H" in theirs:  # an op alone, on the tokens of a map
            outputs = model(x.unflatten(1, (theirs["H"], theirs["W"]))).flatten(1, 2)
        elif "operator alone on an NCHW map" in vector["notes"]:
            outputs = model(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            outputs = model(x)
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.parametrize("path", VECTORS)
def test_matches_the_authors_code(path):
    vector = load_vector(path)
    model = build(path.name.removesuffix(".json.gz"), vector).eval()
    state = official_state(vector)
    unused = load_weights(model, state).dropped  # of dense features that the authors' code makes with the whole net
    ours = rename_weights(model, state)
    params = sum(parameter.numel() for parameter in model.parameters())
    assert params + sum(ours[name].numel() for name in unused) == vector["num_params"]

    x = make_input(vector["input_shape"])
    outputs = run(model, vector, x)
    assert len(outputs) == len(vector["outputs"])
    errors = [relative_error(*pair) for pair in zip(vector["outputs"].values(), outputs, strict=True)]
    if max(errors) >= 1e-5:  # under these weights some nets' scores are so large that softmax is nearly a step
        bounds = [max(1e-5, 20 * moved) for moved in sensitivity(model.double(), vector, x.double())]
        assert all(error < bound for error, bound in zip(errors, bounds, strict=True)), (errors, bounds)


def sensitivity(model: nn.Module, vector: dict, x: Tensor) -> list[float]:
    """How far each output moves, relatively, when the input is moved by no more than float32 rounds it."""
    exact = run(model, vector, x)
    nearby = [x * (1 + 2**-24 * torch.randn(x.shape, generator=torch.Generator().manual_seed(i))) for i in range(4)]
    runs = [run(model, vector, each) for each in nearby]
    return [max(float((r[i] - e).norm() / e.norm()) for r in runs) for i, e in enumerate(exact)]


def test_no_claim_is_made_twice():
    names = [name for module in (*NETS, *OPS, *HEADS) for name in claims(module)]
    assert len(names) == len(set(names))


def classifiers() -> list[Any]:
    """One vector of a classifier for each system."""
    found: dict[str, Any] = {}
    for param in VECTORS:
        vector = load_vector(str(param.values[0]))
        if param.id in claims(*NETS) and "logits" in vector["outputs"] and not param.marks:
            found.setdefault(vector["system"], param)
    return list(found.values())


@pytest.mark.parametrize("path", classifiers())
def test_the_authors_file_loads_for_another_size(path, tmp_path):
    vector = load_vector(path)
    torch.save({"model": official_state(vector)}, tmp_path / "authors.pth")
    claim = claims(*NETS)[path.name.removesuffix(".json.gz")][1]
    name, arguments = (claim, {}) if isinstance(claim, str) else claim
    side = {"crossvit": 480, "halonet": 512}.get(vector["system"], 256)
    net = create_model({"name": name, **arguments}, 1000, 3, side).eval()
    done = load_weights(net, tmp_path / "authors.pth")
    assert not done.missing and not done.unexpected and not done.dropped
    with torch.inference_mode():
        assert net(torch.randn(1, 3, side, side)).isfinite().all()
