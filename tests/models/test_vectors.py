"""Every reference vector: our nets and ops, with the authors' weights, compute what the authors' code computed."""

from typing import Any

import pytest
import torch

from models import create_model, load_weights
from models.reference import load_vector, official_state
from tests.vectors import VECTOR_FILES
from tests.vectors.claims import HEADS, NETS
from tests.vectors.comparison import assert_reproduces
from tests.vectors.kinds import classes
from tests.vectors.method_claims import METHODS
from tests.vectors.op_claims import OPS, PARTS

# Sides of images, in pixels, that are neither those of the vectors nor unfit for the net; 256 by default.
OTHER_SIZES = {"crossvit": 480, "halonet": 512, "lola_specvit": 31}

# tests/models/heads/ tests the vectors of heads.
VECTORS = [
    pytest.param(name, marks=pytest.mark.slow if load_vector(path)["num_params"] > 30e6 else ())
    for name, path in VECTOR_FILES.items()
    if name not in HEADS
]


@pytest.mark.parametrize("name", VECTORS)
def test_matches_the_authors_code(name):
    claims = NETS | OPS | PARTS | METHODS
    assert name in claims, "no claim in tests/vectors/claims.py, op_claims.py or method_claims.py names this vector"
    assert_reproduces(claims[name], load_vector(VECTOR_FILES[name]))


def test_every_vector_is_claimed_once():
    names = [*NETS, *OPS, *PARTS, *METHODS, *HEADS]
    assert len(names) == len(set(names))
    assert set(VECTOR_FILES) <= set(names)


def test_every_claim_belongs_to_a_system_that_has_vectors():
    """Claims may name vectors that the repository does not hold, but a mistyped system is an error."""
    systems = {name.partition("__")[0] for name in VECTOR_FILES}
    assert {name.partition("__")[0] for name in [*NETS, *OPS, *PARTS, *METHODS, *HEADS]} <= systems


def one_classifier_per_system() -> list[Any]:
    """Return one vector of a classifier for each system."""
    params: dict[str, Any] = {}
    for param in VECTORS:
        name = str(param.values[0])
        vector = load_vector(VECTOR_FILES[name])
        if name in NETS and "logits" in vector["outputs"] and not param.marks:
            params.setdefault(vector["system"], param)
    return list(params.values())


@pytest.mark.parametrize("name", one_classifier_per_system())
def test_the_authors_file_loads_for_another_size(name, tmp_path):
    vector, claim = load_vector(VECTOR_FILES[name]), NETS[name]
    bands = vector["input_shape"][1]
    torch.save({"model": official_state(vector)}, tmp_path / "authors.pth")
    side = OTHER_SIZES.get(vector["system"], 256)
    arguments = {key: value for key, value in claim.arguments.items() if key != "img_size"}
    net = create_model({"name": claim.name, **arguments}, classes(vector), bands, side).eval()
    result = load_weights(net, tmp_path / "authors.pth")
    assert not result.missing and not result.unexpected
    assert set(result.dropped) <= set(getattr(net, "unused_weights", ()))
    with torch.inference_mode():
        assert net(torch.randn(1, bands, side, side)).isfinite().all()
