"""Parameters and multiply-accumulates against the papers' tables (papers)."""

import re
from collections.abc import Sequence
from functools import partial

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from timm.models import model_entrypoint

from models import complexity, create_model, model_name
from retinue.results.papers import agrees, list_papers, model_choice, read_paper, tolerance
from retinue.runs.config import register_resolvers
from retinue.utils.paths import CONF

ALL = {
    f"{row['net']} {row['input']} {paper} {i}": row
    for paper in list_papers()
    for i, row in enumerate(read_paper(paper)["variants"])
    if "net" in row
}
ROWS = {name: row for name, row in ALL.items() if model_entrypoint(row["net"]).__module__.startswith("models.")}
COUNTED: dict[tuple[str, ...], tuple[int, int]] = {}  # rows that differ in training only have one count


def composed(choice: Sequence[str]) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*choice, "run_dir=run"])


def is_named(counted: float, reason: str) -> bool:
    """Whether the reason of an exception (`params_exception`, `macs_exception`) names the count, to its digits.

    The count is the reason's first number before a unit: "we count 22.32 M", "19.7 G are counted".
    """
    number = re.search(r"\d+(?:\.(\d+))?(?= [MG]\b)", reason)
    return number is not None and abs(counted - float(number[0])) <= 0.5 * 10 ** -len(number[1] or "") + 1e-9


LARGE = 40  # M parameters: small sizes show a net's layout, and large ones take a while to count


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if (row["params_m"] or 0) > LARGE or row["input"] > 224 else ())
        for name, row in ROWS.items()
    ],
)
def test_the_papers_parameters_and_macs(name):
    row = ROWS[name]
    choice = (*model_choice(row["net"], row.get("args", {}), row["input"]), "data=imagenet")
    if choice not in COUNTED:
        cfg = composed(choice)
        assert cfg.data.image_size == row["input"]
        COUNTED[choice] = complexity(partial(create_model, cfg.model, 1000, 3, row["input"]), row["input"])
    params, macs = COUNTED[choice]
    for counted, key, exception in (
        (params / 1e6, "params_m", "params_exception"),
        (macs / 1e9, "macs_g", "macs_exception"),
    ):
        printed, reason = row[key], row.get(exception)
        if printed is None:
            continue
        assert agrees(counted, printed) == (reason is None), (counted, printed, reason)
        assert reason is None or is_named(counted, reason), (counted, reason)


@pytest.mark.parametrize("name", sorted(ALL.keys() - ROWS.keys()))
def test_timms_nets_are_the_papers(name):  # their multiply-accumulates are timm's to count
    row = ALL[name]
    cfg = composed([*model_choice(row["net"], row.get("args", {}), row["input"]), "data=imagenet"])
    assert model_name(cfg.model, cfg.data.image_size) == row["net"]
    with torch.device("meta"):
        net = timm.create_model(row["net"], num_classes=1000, **row.get("args", {}))
    params = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    if row["params_m"] is not None:
        assert agrees(params, row["params_m"]) != ("params_exception" in row), (params, row["params_m"])


def test_the_tolerance_is_a_hundredth_or_half_of_the_last_digit():
    assert (tolerance(28.0), tolerance(4.5), tolerance(173.0)) == (0.5, 0.05, 1.73)
    assert agrees(28.4, 28.0) and not agrees(28.6, 28.0)
    assert agrees(4.55, 4.5) and not agrees(4.56, 4.5)


def test_the_reason_of_an_exception_names_the_count_to_its_digits():
    assert is_named(22.324, "we count 22.32 M for the authors' net") and not is_named(22.33, "we count 22.32 M")
    assert is_named(19.66, "19.7 G are counted") and not is_named(19.66, "counted otherwise in table 3")


def test_a_built_net_is_counted_without_running_it():
    net = timm.create_model("swin_nano", num_classes=7).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    counted = complexity(net, (32, 64))
    assert counted == complexity(partial(timm.create_model, "swin_nano", num_classes=7), (32, 64))
    assert counted[0] == sum(p.numel() for p in net.parameters())
    assert all((before[key] == value).all() for key, value in net.state_dict().items()) and net.training


def test_every_kind_of_layer_counts():
    net = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0, img_size=32)
    tokens, width = 5, 192
    attention = 4 * tokens * width**2 + 2 * tokens**2 * width
    assert complexity(net, 32)[1] == 4 * 16 * 16 * 3 * width + attention + 8 * tokens * width**2
