"""`eval.py calibrate=true` fits the temperature to the validation split, by one process as by two."""

import pytest

from datamodules.digits import Digits
from retinue.runs.result_file import read_result
from tests.retinue.runs.cli import result, start

CALIBRATE = ("calibrate=true", "trainer=cpu", "data.num_workers=0")


def test_a_calibrated_evaluation_and_data_without_images_for_it(cli, tmp_path, monkeypatch):
    assert cli.train("hydra.run.dir=run").code == 0
    plain = cli("eval", "run=run", "trainer=cpu", "data.num_workers=0", "hydra.run.dir=plain")
    assert plain.code == 0 and "test/temperature" not in result(tmp_path / "plain")["metrics"]
    outcome = cli("eval", "run=run", *CALIBRATE, "hydra.run.dir=calibrated")
    assert outcome.code == 0, outcome.err
    wrote = result(tmp_path / "calibrated")
    metrics = wrote["metrics"]
    # The other figures stay as they are, and so does the folder's name.
    assert {name: metrics[name] for name in result(tmp_path / "plain")["metrics"]} == result(tmp_path / "plain")[
        "metrics"
    ]
    assert wrote["config_sha256"] == result(tmp_path / "plain")["config_sha256"]
    assert 0.01 <= metrics["test/temperature"] <= 100
    assert metrics["test/calibrated_loss"] != metrics["test/loss"]
    for name in ("reliability_calibrated.png", "risk_coverage.png"):
        assert (tmp_path / "calibrated" / name).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(Digits, "splits", ("train", "val"))
    error = cli("eval", "run=run", *CALIBRATE).error
    assert "calibrate=true needs validation images that are not the test images: data=digits has the splits" in error


@pytest.mark.slow
def test_two_processes_find_the_temperature_of_one(cli, tmp_path):
    assert cli.train("hydra.run.dir=run").code == 0
    temperatures = []
    for devices in (1, 2):
        # 7 does not divide the number of images, so that batches are padded.
        arguments = ("run=run", *CALIBRATE, "batch_size=7", f"trainer.devices={devices}", f"hydra.run.dir=d{devices}")
        process = start("eval", *arguments, folder=tmp_path)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        metrics = (read_result(tmp_path / f"d{devices}") or {})["metrics"]
        temperatures.append(metrics["test/temperature"])
    assert temperatures[0] == pytest.approx(temperatures[1], rel=1e-5)
