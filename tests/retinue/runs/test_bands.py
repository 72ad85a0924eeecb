"""Training and evaluation with images of many bands, as a user does it."""

import pytest

from tests.band_folder import BANDS, make_band_folder
from tests.retinue.runs.cli import result

FOLDER = ("data=image_folder", "data.root=bands", f"data.in_chans={BANDS}")


@pytest.mark.parametrize("model", ["lola_specvit", "swin"])
def test_a_net_learns_from_bands(cli, tmp_path, model):
    make_band_folder(tmp_path / "bands")
    printed = cli("scripts/band_statistics", "root=bands", f"in_chans={BANDS}")
    assert printed.code == 0, printed.err
    options = (
        f"model={model}",
        *FOLDER,
        *printed.out.splitlines(),
        "recipe.epochs=8",
        "trainer.limit_train_batches=1.0",
    )
    trained = cli.train(*options, "run_dir=run")
    assert trained.code == 0, trained.err
    assert result(tmp_path / "run")["metrics"]["test/top1"] == 1.0
    evaluated = cli("eval", "run=run", "run_dir=again", "trainer.accelerator=cpu", "data.num_workers=0")
    assert evaluated.code == 0, evaluated.err
    assert result(tmp_path / "again")["metrics"]["test/top1"] == 1.0


def test_the_statistics_of_colours_are_refused(cli, tmp_path):
    make_band_folder(tmp_path / "bands")
    message = cli.train(*FOLDER).error
    assert "needs data.mean and data.std in the files' units" in message
    assert f"python scripts/band_statistics.py root=bands in_chans={BANDS}" in message
