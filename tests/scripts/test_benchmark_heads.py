"""Tests of the command that measures deformable attention."""

import csv

from scripts import benchmark_heads


def test_both_sides_are_timed_on_the_same_attention(tmp_path):
    path = tmp_path / "rows.csv"
    benchmark_heads.main(["device=cpu", "image_size=64x70", "rounds=2", "threads=1", f"out={path}"])
    rows = list(csv.DictReader(path.open()))
    assert [(row["what"], row["part"]) for row in rows] == [
        (name, part) for part in ("encoder", "decoder") for name in ("ours", "mmcv's plain PyTorch")
    ]
    assert all(0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"]) for row in rows)
    # The ratio of the baseline to itself.
    assert [float(row["ratio"]) for row in rows[1::2]] == [1, 1]
