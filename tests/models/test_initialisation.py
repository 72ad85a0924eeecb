"""Our nets start where the authors' nets start: each parameter's values, weight decay and drop path rates."""

import math
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import DropPath, trunc_normal_
from torch import nn

from models.initialisation import differences, record_initialisation
from models.reference import load_vector
from scripts.record_initialisation import main
from tests import vectors
from tests.vectors.claims import NETS
from tests.vectors.kinds import Net

RECORDS = {
    path.name.removesuffix(".json.gz"): path
    for path in sorted((Path(vectors.__file__).parent / "initialisation").glob("*.json.gz"))
}
# Nets of ours that are compared instead of timm's nets, which start differently, and nets without a vector of logits
OURS = {f"gcvit__gc_vit_{size}": Net(f"gc_vit_{size}") for size in ("xxtiny", "xtiny", "tiny", "small", "base")} | {
    "hyena_nd__deit_tiny": Net("hyena_deit_tiny"),
    "hyperzzw__terminator_cifar10": Net("terminator_cifar"),
}
# Arguments of a recorded net that our net takes too, under the same names
COMMON = ("num_classes", "in_chans", "drop_path_rate")
# Records of larger nets are compared by slow tests.
LARGE = 6e6


def size(name: str) -> int:
    return sum(math.prod(entry["shape"]) for entry in load_vector(RECORDS[name])["parameters"].values())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if size(name) > LARGE else ()) for name in RECORDS]
)
def test_fresh_weights_are_the_authors(name):
    nets = NETS | OURS
    assert name in nets, "no net in tests/vectors/claims.py has this name"
    record, claim = load_vector(RECORDS[name]), nets[name]
    arguments = {**claim.arguments, **{key: record["kwargs"][key] for key in COMMON if key in record["kwargs"]}}
    assert differences(lambda: timm.create_model(claim.name, **arguments), record) == []


class Toy(nn.Module):
    """A net with each kind of parameter, whose initialisation has knobs."""

    def __init__(
        self, std=0.02, bound=2.0, gamma=1e-5, temperature=2.0, bias=0.0, rates=(0.0, 0.1, 0.2), exempt="table"
    ):
        super().__init__()
        self.fc = nn.Linear(64, 64)
        trunc_normal_(self.fc.weight, std=std, a=-bound, b=bound)
        nn.init.constant_(self.fc.bias, bias)
        self.proj = nn.Linear(64, 32)
        self.gamma = nn.Parameter(gamma * torch.ones(64))
        self.temperature = nn.Parameter(torch.arange(1, 65).float() ** temperature)
        self.table = nn.Parameter(torch.zeros(4, 4))
        self.paths = nn.ModuleList(DropPath(rate) for rate in rates)
        self.exempt = exempt.split()

    def no_weight_decay(self):
        return set(self.exempt)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, []),
        ({"std": 0.0218}, ["fc.weight"]),
        ({"std": 0.02274, "bound": 0.04548}, ["fc.weight"]),
        ({"gamma": 1e-4}, ["gamma"]),
        ({"temperature": 1.9}, ["temperature"]),
        ({"bias": 0.01}, ["fc.bias"]),
        ({"rates": (0.0, 0.1, 0.1)}, ["drop path rates [0.1] instead of [0.1, 0.2]"]),
        ({"exempt": ""}, ["table"]),
        ({"exempt": "table fc.weight"}, ["fc.weight"]),
    ],
    ids=str,
)
def test_a_change_of_the_initialisation_is_found(change, found):
    lines = differences(lambda: Toy(**change), record_initialisation(Toy))
    assert [line.partition(":")[0] for line in lines] == found


class Ours(nn.Module):
    """The toy's linear layers under other names, as one layer."""

    def __init__(self, std):
        super().__init__()
        self.weight = nn.Parameter(torch.cat([trunc_normal_(torch.empty(64, 64), std=std), nn.Linear(64, 32).weight]))

    def checkpoint_filter(self, state):
        return {"weight": torch.cat([state["fc.weight"], state["proj.weight"]])}


@pytest.mark.parametrize(("std", "found"), [(0.02, []), (0.025, ["fc.weight"])])
def test_parameters_are_compared_under_the_authors_names(std, found):
    record = record_initialisation(lambda: Toy(rates=()))
    assert [line.partition(":")[0] for line in differences(lambda: Ours(std), record)] == found


def test_the_script_records_a_net(tmp_path):
    path = tmp_path / "swin__nano.json.gz"
    main(["module=models.backbones.swin:swin_nano", f"out={path}", "kwargs.drop_path_rate=0.2"])
    record = load_vector(path)
    assert record["kwargs"] == {"drop_path_rate": 0.2} and len(record["drop_path"]) == 7
    assert differences(lambda: timm.create_model("swin_nano", drop_path_rate=0.2), record) == []
    assert differences(lambda: timm.create_model("swin_nano", drop_path_rate=0.1), record)
