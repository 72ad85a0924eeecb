"""Merged weights against their definitions in float64, and the refusal of nets that differ."""

import pytest
import torch

from models.merging import add_differences, check_same_net, mean, read_state

NAMES = ("model.a.weight", "model.b.running_mean")


def states(count=3):
    generator = torch.Generator().manual_seed(0)
    return [
        {**{name: torch.randn(4, 3, generator=generator) for name in NAMES}, "model.count": torch.tensor(number)}
        for number in range(count)
    ]


def test_the_mean_is_that_of_all_values():
    nets = states()
    merged = mean(iter(nets))
    for name in NAMES:
        expected = torch.stack([net[name].double() for net in nets]).mean(0)
        assert merged[name].dtype == torch.float32
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-6, atol=1e-7)
    assert merged["model.count"] == 0
    half = mean([{"a": torch.tensor([60000.0], dtype=torch.float16)}] * 3)
    assert half["a"].dtype == torch.float16 and half["a"] == 60000


def test_scaled_differences_are_added_to_the_base():
    base, one, other = states()
    merged = add_differences(base, [one, other], [0.5, -0.25])
    for name in NAMES:
        b, x, y = (net[name].double() for net in (base, one, other))
        torch.testing.assert_close(merged[name].double(), b + 0.5 * (x - b) - 0.25 * (y - b), rtol=1e-6, atol=1e-6)
    again = add_differences(base, [one], [1.0])
    torch.testing.assert_close(again[NAMES[0]], one[NAMES[0]])


def test_nets_that_differ_are_refused():
    one, other = states(2)
    check_same_net(one, other, "one", "other")
    other[NAMES[0]] = torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"other is of another net than one: model.a.weight has shape \(5, 3\) there"):
        check_same_net(one, other, "one", "other")
    del other[NAMES[0]]
    with pytest.raises(ValueError, match=r"has no such weight there, and shape \(4, 3\) here"):
        check_same_net(one, other, "one", "other")
    with pytest.raises(ValueError, match=r"has shape \(4, 3\) there, and no such weight here"):
        check_same_net(other, one, "one", "other")


def test_files_of_runs_and_of_nets_have_the_same_names(tmp_path):
    [net] = states(1)
    torch.save({"state_dict": net, "current_model_state": {}, "epoch": 3}, tmp_path / "run.ckpt")
    state = read_state(tmp_path / "run.ckpt")
    assert set(state) == {"a.weight", "b.running_mean", "count"}
    # Only some names have the prefix of a backbone, so that it stays.
    torch.save({"backbone.a": net[NAMES[0]], "head.b": net[NAMES[1]]}, tmp_path / "dense.pth")
    assert set(read_state(tmp_path / "dense.pth")) == {"backbone.a", "head.b"}
