"""The command that measures the targets on a GPU: a dry run of all sections on the CPU."""

import csv

import pytest

from retinue.benchmarks import targets
from scripts import measure_gpu


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "sections", [["routed_attention", "swin_tiny"], pytest.param(list(targets.SECTIONS), marks=pytest.mark.slow)]
)
def test_sections_run_dry_and_write_their_rows_and_targets(tmp_path, capsys, sections):
    measure_gpu.main([f"out={tmp_path}", "dry=true", "seconds=10000", f"sections=[{','.join(sections)}]"])
    out = capsys.readouterr().out
    assert "left out: " not in out.replace("is left out of", ""), out
    written = read(tmp_path / "targets.csv")
    assert {row["bound"] for row in written} == {"at least", "at most"}
    assert all(float(row["measured"]) > 0 for row in written if "compute-sanitizer" not in row["target"])
    assert [row["target"].partition(",")[0] for row in written][:2] == ["routed attention"] * 2
    # A dry run has no NAT, and the sections of tests have targets alone.
    without_rows = {"nat_mini", "nat_mini_forms", "tests", "sanitizer"}
    assert {row["section"] for row in read(tmp_path / "rows.csv")} == set(sections) - without_rows


def test_a_section_that_fails_costs_no_other(tmp_path, capsys, monkeypatch):
    def fails(scale):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setitem(targets.SECTIONS, "routed_attention", fails)
    monkeypatch.setitem(targets.SECTIONS, "dense", lambda scale: ([], [targets.make_target("x", 2.0, 1.0)]))
    measure_gpu.main([f"out={tmp_path}", "dry=true", "sections=[routed_attention,dense]"])
    assert "routed_attention is left out: RuntimeError: no kernel image" in capsys.readouterr().out
    [row] = read(tmp_path / "targets.csv")
    assert (row["target"], row["reached"]) == ("x", "False")
    measure_gpu.main([f"out={tmp_path}", "dry=true", "sections=dense", "seconds=1e-9"])
    assert "dense is left out: the 0 s are over" in capsys.readouterr().out


def test_targets_are_bounds_from_above_or_below():
    assert targets.make_target("x", 2.0, 2.0)["reached"] == "True"
    assert targets.make_target("x", 2.0, 2.1, at_most=True)["reached"] == "False"
    assert targets.make_target("x", 2.0, None)["reached"] is None


def test_it_says_that_it_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match=r"for a CUDA device: dry=true runs"):
        measure_gpu.main([f"out={tmp_path}", "device=cpu"])
    with pytest.raises(ValueError, match=r"no section 'routed_atention'. Did you mean 'routed_attention'"):
        measure_gpu.main([f"out={tmp_path}", "sections=routed_atention", "dry=true"])
