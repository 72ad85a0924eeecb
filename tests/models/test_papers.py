"""Our nets' parameters and multiply-accumulates agree with the tables in papers/."""

import pkgutil
import re
from collections.abc import Sequence
from functools import partial

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from timm.models import model_entrypoint

from models import backbones, complexity, create_model, model_name
from retinue.results.papers import agrees, list_papers, model_choice, read_paper, tolerance
from retinue.runs.config import register_resolvers
from retinue.utils.paths import CONF
from retinue.utils.sizes import size_pixels

ALL = {
    f"{row['net']} {row['input']} {paper} {i}": row
    for paper in list_papers()
    for i, row in enumerate(read_paper(paper)["variants"])
    if "net" in row
}
ROWS = {name: row for name, row in ALL.items() if model_entrypoint(row["net"]).__module__.startswith("models.")}
# (parameters, multiply-accumulates) by the choice of a net: rows that differ only in training share one count.
COUNTED: dict[tuple[str, ...], tuple[int, int]] = {}
# M parameters. Small sizes show a net's layout already, and counting the large sizes takes a while.
LARGE = 20


def composed(choice: Sequence[str]) -> DictConfig:
    """Compose the training config with these overrides."""
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*choice, "run_dir=run"])


def is_named(counted: float, reason: str) -> bool:
    """Tell whether the reason of an exception in a paper's table states our count, up to rounding.

    Args:
        counted: Our count in millions of parameters or billions of multiply-accumulates.
        reason: Text of `params_exception` or `macs_exception`. Its first number before a unit is the count: "we count
            22.32 M", "19.7 G are counted".
    """
    number = re.search(r"\d+(?:\.(\d+))?(?= [MG]\b)", reason)
    if number is None:
        return False
    digits = len(number[1]) if number[1] else 0
    return abs(counted - float(number[0])) <= 0.5 * 10**-digits + 1e-9


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
        assert size_pixels(cfg.data) == row["input"]
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


# timm counts the multiply-accumulates of timm's nets, so these tests compare parameters only.
@pytest.mark.parametrize("name", sorted(ALL.keys() - ROWS.keys()))
def test_timms_nets_have_the_papers_parameters(name):
    row = ALL[name]
    cfg = composed([*model_choice(row["net"], row.get("args", {}), row["input"]), "data=imagenet"])
    assert model_name(cfg.model, size_pixels(cfg.data)) == row["net"]
    with torch.device("meta"):
        net = timm.create_model(row["net"], num_classes=1000, **row.get("args", {}))
    params = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    if row["params_m"] is not None:
        assert agrees(params, row["params_m"]) != ("params_exception" in row), (params, row["params_m"])


def test_the_tolerance_is_a_hundredth_or_half_of_the_last_digit():
    assert (tolerance(28.0), tolerance(4.5), tolerance(173.0)) == (0.5, 0.05, 1.73)
    assert agrees(28.4, 28.0) and not agrees(28.6, 28.0)
    assert agrees(4.55, 4.5) and not agrees(4.56, 4.5)


def test_a_system_has_one_name_everywhere():
    models = {path.stem for path in (CONF / "model").glob("*.yaml")}
    assert {info.name for info in pkgutil.iter_modules(backbones.__path__)} <= models
    assert {path.name for path in (CONF / "experiment").iterdir() if path.is_dir()} <= models
    assert {paper for paper in list_papers() if any("net" in row for row in read_paper(paper)["variants"])} <= models


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


def test_every_kind_of_layer_is_counted():
    net = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0, img_size=32)
    tokens, width = 5, 192
    attention = 4 * tokens * width**2 + 2 * tokens**2 * width
    assert complexity(net, 32)[1] == 4 * 16 * 16 * 3 * width + attention + 8 * tokens * width**2
