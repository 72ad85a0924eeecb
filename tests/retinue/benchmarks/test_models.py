"""Tests of the plot of the benchmark of models."""

from retinue.benchmarks import models


def test_the_plot_follows_the_rows(tmp_path):
    row = {"what": "net", "mode": "inference", "macs_g": 1.0, "images_per_s": 10.0, "params_m": 5.0}
    row |= {"device": "cpu", "dtype": "float32", "shape": "1"}
    models.plot(tmp_path / "one.png", [row, row | {"images_per_s": 20.0}])
    models.plot(tmp_path / "two.png", [row, row | {"images_per_s": 90.0, "macs_g": 4.0}])
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "two.png").read_bytes()
