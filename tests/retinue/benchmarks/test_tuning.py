"""Tests of the search for the fastest tiles."""

import pytest
import torch

from retinue.benchmarks.tuning import coordinate_descent


def test_the_search_changes_one_number_at_a_time():
    candidates = [(a, b) for a in (1, 2, 4, 8) for b in (1, 2, 3)]
    best, times = coordinate_descent((1, 1), candidates, lambda tiles: abs(tiles[0] - 4) + abs(tiles[1] - 3) + 1.0)
    assert best == (4, 3) and 1 < len(times) < len(candidates)
    assert coordinate_descent((1, 1), candidates, lambda tiles: sum(tiles))[0] == (1, 1)


def test_look_ups_of_tiles_are_recorded_with_the_defaults():
    launch = pytest.importorskip("ops.kernels.launch")
    default = launch.TileConfig(16, 32, 1, 1)
    half = torch.zeros(1, dtype=torch.float16)
    with launch.recorded_lookups() as lookups:
        assert launch.tile_config("attention.forward", half, 32, 49, default) == default
    launch.tile_config("attention.backward", half, 32, 49, default)
    assert lookups == {("attention.forward", (0, 0), 2, 32, 49): default}
