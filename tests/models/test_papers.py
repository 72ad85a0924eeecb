"""Parameters and multiply-accumulates against the papers' tables (conf/paper)."""

from functools import partial
from pathlib import Path

import pytest
import timm
import yaml
from timm.models import model_entrypoint

from models import complexity

PAPERS = sorted((Path(__file__).parents[2] / "conf/paper").glob("*.yaml"))
ROWS = {
    f"{row['net']} {row['input']}": row
    for path in PAPERS
    for row in yaml.safe_load(path.read_text())["variants"]
    if "net" in row and model_entrypoint(row["net"]).__module__.startswith("models.")  # timm's are timm's to count
}


def printed(value: float) -> tuple[float, float]:
    """A figure and what it may be off by: 1 %, or half of its last digit."""
    text = f"{value:g}"
    digits = len(text.partition(".")[2])
    return value, max(0.01 * value, 0.5 * 10**-digits)


@pytest.mark.parametrize("name", ROWS)
def test_the_papers_parameters_and_macs(name):
    row = ROWS[name]
    params, macs = complexity(partial(timm.create_model, row["net"], **row.get("args", {})), row["input"])
    for measured, table in ((params / 1e6, row["params_m"]), (macs / 1e9, row["flops_g"])):
        value, tolerance = printed(table)
        assert abs(measured - value) <= tolerance + 1e-9, (measured, table)


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
