"""Tests of what all pyramid backbones share."""

import pytest
from timm.layers import calculate_drop_path_rates

from models.hierarchical import stage_layout


def test_stage_layout_doubles_channels_and_strides():
    dims, strides, rates = stage_layout(64, (1, 2, 3), drop_path_rate=0.5)
    assert dims == [64, 128, 256]
    assert strides == [4, 8, 16]
    assert rates == calculate_drop_path_rates(0.5, [1, 2, 3], stagewise=True)
    assert rates[0] == [0.0] and rates[-1][-1] == 0.5


def test_stage_layout_takes_channels_of_each_stage():
    dims, strides, rates = stage_layout((64, 128, 320), (2, 2, 2), drop_path_rate=0.0, stride=2)
    assert dims == [64, 128, 320]
    assert strides == [2, 4, 8]
    assert rates == [[0.0, 0.0]] * 3


def test_stage_layout_needs_one_entry_per_stage():
    with pytest.raises(ValueError, match="dims has 2 entries and depths has 3; each needs one per stage"):
        stage_layout((64, 128), (1, 1, 1), drop_path_rate=0.0)
