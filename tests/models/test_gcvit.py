"""GC ViT: the authors' classifiers, and their rule for detectors."""

from pathlib import Path
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

CLASSIFIERS = sorted((Path(__file__).parent.parent / "vectors").glob("gcvit__gc_vit_*.json.gz"))
CLASSIFIERS = [path for path in CLASSIFIERS if "_det" not in path.name]
DETECTOR: Any = {"norms": True, "window": 24, "poolings": (3, 2, 1, 0), "depths": (2, 2, 2, 2)}


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if "xxtiny" in path.name else pytest.mark.slow) for path in CLASSIFIERS],
    ids=lambda path: path.name.split(".")[0],
)
def test_classifies_as_the_authors_net_does(path):
    """timm's nets claim these vectors; ours, with the same weights, match them too."""
    vector = load_vector(path)
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
    given, fewer = ({} if form == "local" else {"context": torch.randn(2, h, 6, 8).double()} for h in (6, 4))
    assert torch.allclose(op(x, **given), shrinking(padded, **given)[:, :4, :9], atol=1e-12)
    assert not torch.allclose(op(x, **given), shrinking(x, **fewer), atol=1e-3)


def test_queries_of_a_detector_are_resized_to_its_windows():
    torch.manual_seed(0)
    make = GlobalQuery(FIRST._replace(stage=2, stride=16), 8, 2, window=24, poolings=1, shrink=False)
    query = make(torch.randn(1, 14, 20, 8))
    assert query.shape == (1, 24, 24, 8) and sum(isinstance(m, torch.nn.MaxPool2d) for m in make.modules()) == 1
    assert GlobalQuery(FIRST._replace(stage=2, stride=16), 8, 2)(torch.randn(1, 5, 20, 8)).shape == (1, 5, 14, 8)


def test_a_detector_takes_a_classifiers_weights_with_tables_resized():
    torch.manual_seed(0)
    classifier = timm.create_model("gc_vit_xxtiny", depths=DETECTOR["depths"])
    net = DenseBackbone("gc_vit_xxtiny", **DETECTOR).eval()
    done = load_weights(net, classifier.state_dict())
    assert len(done.resized) == 8 and all(key.startswith("norms.") for key in done.missing) and not done.unexpected
    for stage, side in enumerate((7, 7, 14, 7)):
        key = f"stages.{stage}.blocks.1.mixer.relative_position_bias_table"
        table = classifier.state_dict()[key].T.unflatten(1, (2 * side - 1, 2 * side - 1))
        resized = F.interpolate(table[None], (47, 47), mode="bicubic").flatten(2)[0].T
        assert torch.allclose(net.net.state_dict()[key], resized, atol=1e-6)
    with torch.inference_mode():
        maps = net(torch.randn(1, 3, 250, 310))
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 63, 78), (128, 32, 39), (256, 16, 20), (512, 8, 10)]
