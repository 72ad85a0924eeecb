"""GC ViT: agreement with the authors' classifiers, and the authors' padding in detectors."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from models import DenseBackbone, load_weights
from models.reference import load_vector, make_input, official_state, relative_error
from ops import create_op
from ops.attention.global_query import GlobalQuery
from ops.registry import FIRST
from tests.vectors import VECTOR_FILES

CLASSIFIERS = [name for name in VECTOR_FILES if name.startswith("gcvit__gc_vit_") and "_det" not in name]
DETECTOR: Any = {"norms": True, "window": 24, "poolings": (3, 2, 1, 0), "depths": (2, 2, 2, 2)}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if "xxtiny" in name else pytest.mark.slow) for name in CLASSIFIERS]
)
def test_matches_the_authors_code(name):
    """Compare our nets with the vectors that tests/vectors/claims.py compares timm's nets with."""
    vector = load_vector(VECTOR_FILES[name])
    net = timm.create_model(vector["variant"]).eval()
    load_weights(net, official_state(vector))
    assert sum(parameter.numel() for parameter in net.parameters()) == vector["num_params"]
    with torch.inference_mode():
        assert relative_error(vector["outputs"]["logits"], net(make_input(vector["input_shape"]))) < 1e-5


@pytest.mark.parametrize("form", ["local", "global"])
def test_windows_that_may_not_shrink_are_filled_with_zeros(form):
    torch.manual_seed(0)
    op, shrinking = (
        create_op("global_query", 8, 2, window=6, form=form, shrink=shrink).double() for shrink in (False, True)
    )
    shrinking.load_state_dict(op.state_dict())
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, 3, 0, 2))
    context, smaller_context = (
        {} if form == "local" else {"context": torch.randn(2, rows, 6, 8).double()} for rows in (6, 4)
    )
    assert torch.allclose(op(x, **context), shrinking(padded, **context)[:, :4, :9], atol=1e-12)
    assert not torch.allclose(op(x, **context), shrinking(x, **smaller_context), atol=1e-3)


def test_queries_of_a_detector_are_resized_to_its_windows():
    torch.manual_seed(0)
    global_query = GlobalQuery(FIRST._replace(stage=2, stride=16), 8, 2, window=24, poolings=1, shrink=False)
    query = global_query(torch.randn(1, 14, 20, 8))
    assert query.shape == (1, 24, 24, 8)
    assert sum(isinstance(m, torch.nn.MaxPool2d) for m in global_query.modules()) == 1
    assert GlobalQuery(FIRST._replace(stage=2, stride=16), 8, 2)(torch.randn(1, 5, 20, 8)).shape == (1, 5, 14, 8)


def test_a_detector_loads_a_classifiers_weights_and_resizes_the_tables():
    torch.manual_seed(0)
    classifier = timm.create_model("gc_vit_xxtiny", depths=DETECTOR["depths"])
    net = DenseBackbone("gc_vit_xxtiny", **DETECTOR).eval()
    result = load_weights(net, classifier.state_dict())
    assert len(result.resized) == 8 and not result.unexpected
    assert all(key.startswith("norms.") for key in result.missing)
    for stage, side in enumerate((7, 7, 14, 7)):
        key = f"stages.{stage}.blocks.1.mixer.relative_position_bias_table"
        table = classifier.state_dict()[key].T.unflatten(1, (2 * side - 1, 2 * side - 1))
        resized = F.interpolate(table[None], (47, 47), mode="bicubic").flatten(2)[0].T
        assert torch.allclose(net.net.state_dict()[key], resized, atol=1e-6)
    with torch.inference_mode():
        maps = net(torch.randn(1, 3, 250, 310))
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 63, 78), (128, 32, 39), (256, 16, 20), (512, 8, 10)]
