"""scripts/merge_weights.py: soups and task arithmetic of runs and files."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from retinue.runs.soup import greedy_soup
from scripts.merge_weights import main

VALUES = {"a": 1.0, "b": 3.0, "c": 8.0}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in VALUES.items():
        save_file({"head.weight": torch.full((2, 2), value)}, f"{name}.safetensors")


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (("a.safetensors", "b.safetensors", "c.safetensors"), 4.0),
        (("nets=[a.safetensors,b.safetensors]",), 2.0),
        (("b.safetensors", "c.safetensors", "method=arithmetic", "base=a.safetensors", "scales=[0.5,-1]"), -5.0),
        (("b.safetensors", "c.safetensors", "method=arithmetic", "base=a.safetensors", "scales=0.5"), 5.5),
    ],
)
def test_files_are_merged(files, arguments, value):
    main([*arguments, "save=out.safetensors"])
    assert torch.equal(load_file("out.safetensors")["head.weight"], torch.full((2, 2), value))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("a.safetensors", "save=out.ckpt"), "save takes files that end in .safetensors"),
        (("a.safetensors", "method=arithmetic", "save=o.safetensors"), "base is for method=arithmetic"),
        (("a.safetensors", "base=b.safetensors", "save=o.safetensors"), "base is for method=arithmetic"),
        (
            ("a.safetensors", "method=arithmetic", "base=b.safetensors", "scales=[1,2]", "save=o.safetensors"),
            "scales needs 1 number or one for each of the 1 nets",
        ),
        (("a.safetensors", "method=greedy", "save=o.safetensors"), "a.safetensors is no run folder"),
        (("a.safetensors", "none.safetensors", "save=o.safetensors"), "there is no weights file none.safetensors"),
    ],
)
def test_what_cannot_be_merged_is_one_error(files, arguments, says):
    with pytest.raises(ValueError, match=says):
        main(arguments)


def test_a_greedy_soup_takes_what_does_not_lower_its_figure():
    """The figure is the negative distance of the weights from 2: b is the best, d helps, a helps no more, c is far."""
    nets = [{"w": torch.tensor(value)} for value in (0.0, 2.6, 9.0, 1.2)]
    seen = []

    def validate(state):
        seen.append(float(state["w"]))
        return -abs(float(state["w"]) - 2)

    soup, members, figures, best = greedy_soup(nets, validate)
    assert members == [1, 3] and float(soup["w"]) == pytest.approx(1.9)
    assert figures == pytest.approx([-2, -0.6, -7, -0.8]) and best == pytest.approx(-0.1)
    assert seen == pytest.approx([0, 2.6, 9, 1.2, 1.9, 3.8 / 3, 12.8 / 3])
