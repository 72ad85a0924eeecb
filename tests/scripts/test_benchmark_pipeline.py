"""Test of the command that measures the input pipeline."""

from scripts import benchmark_pipeline


def test_a_row_has_what_a_claim_needs(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    benchmark_pipeline.main(["image_size=32", "batch_size=2", "rounds=1", f"out={path}"])
    header, *rows = path.read_text().splitlines()
    assert header.split(",")[:5] == ["what", "against", "ratio", "shape", "dtype"]
    assert rows[0].startswith("retinue,timm,")
    assert "simplejpeg" in rows[0]
    assert "retinue" in capsys.readouterr().out
