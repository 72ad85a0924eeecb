import pytorch_lightning as pl
import torch

from scripts import benchmark_pipeline


def test_both_sides_end_with_the_same_kind_of_batch(tmp_path):
    """Else their times could not be compared: the same shape and type, normalised values of the same spread."""
    pl.seed_everything(0, verbose=False)  # timm's side draws from the global generators
    benchmark_pipeline.make_photos(tmp_path, 48)
    sides = (make(tmp_path, 32, 48) for make in (benchmark_pipeline.ours, benchmark_pipeline.timms))
    one, other = (torch.stack([next(side) for _ in range(8)]) for side in sides)  # a batch is mixed by one share
    assert one.shape == other.shape == (8, 48, 3, 32, 32)
    assert one.dtype == other.dtype == torch.float32
    assert abs(one.mean() - other.mean()) < 0.4
    assert 0.7 < one.std() / other.std() < 1.4


def test_a_row_has_what_a_claim_needs(tmp_path, capsys):
    benchmark_pipeline.main(["--size", "32", "--batch", "2", "--rounds", "1", "--csv", str(tmp_path / "rows.csv")])
    header, *rows = (tmp_path / "rows.csv").read_text().splitlines()
    assert header.split(",")[:5] == ["what", "against", "ratio", "shape", "dtype"]
    assert rows[0].startswith("retinue,timm,")
    assert "simplejpeg" in rows[0]
    assert "retinue" in capsys.readouterr().out
