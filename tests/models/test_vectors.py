"""Every reference vector: our nets and ops, with the authors' weights, give what the authors' code gave."""

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from models import DenseBackbone, backbones, load_weights
from ops import attention, create_op
from tests.reference import load_vector, make_input, official_state, relative_error

VECTORS = sorted((Path(__file__).parent.parent / "vectors").glob("*.json.gz"))


def claims(package) -> dict[str, tuple[str, Any]]:
    """Each vector's name, the file that claims it, and what as."""
    files = [info.name for info in pkgutil.iter_modules(package.__path__)]
    modules = {file: importlib.import_module(f"{package.__name__}.{file}") for file in files}
    return {name: (file, claim) for file, module in modules.items()
            for name, claim in getattr(module, "VECTORS", {}).items()}  # fmt: skip


def build(name: str, vector: dict) -> nn.Module:
    """The net or the op that claims the vector."""
    nets, ops = claims(backbones), claims(attention)
    assert name in nets or name in ops, "no file's VECTORS claims this vector"
    if name in ops:
        op, arguments = ops[name]
        return create_op(op, **arguments(vector["kwargs"]))
    claim = nets[name][1]
    net, arguments = (claim, {}) if isinstance(claim, str) else claim
    return (DenseBackbone if "stage1" in vector["outputs"] else timm.create_model)(net, **arguments)


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_matches_the_authors_code(path):
    vector = load_vector(path)
    model = build(path.name.removesuffix(".json.gz"), vector).eval()
    load_weights(model, official_state(vector))
    assert sum(parameter.numel() for parameter in model.parameters()) == vector["num_params"]

    with torch.inference_mode():
        outputs = model(make_input(vector["input_shape"]))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert len(outputs) == len(vector["outputs"])
    for (place, recorded), output in zip(vector["outputs"].items(), outputs, strict=True):
        assert relative_error(recorded, output) < 1e-5, place


def test_no_claim_is_made_twice():
    names = [name for package in (backbones, attention) for name in claims(package)]
    assert len(names) == len(set(names))
