"""The loggers of a run: each row once, also after a resume."""

import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from retinue.runs.loggers import MetricsCSV, WandbRun, links, mlflow
from tests.retinue.runs.cli import SMALL, SWIN, rows, start, stop_when


def test_a_new_figure_is_a_new_column(tmp_path):
    path = tmp_path / "metrics.csv"
    log = MetricsCSV(path, from_step=0)
    log.log_metrics({"train/loss": 2.0}, 1)
    log.log_metrics({"train/loss": 1.0, "val/top1": 0.5}, 2)
    assert rows(path) == [
        {"step": "1", "train/loss": "2.0", "val/top1": ""},
        {"step": "2", "train/loss": "1.0", "val/top1": "0.5"},
    ]


def test_a_resumed_run_writes_no_row_twice(tmp_path):
    path = tmp_path / "metrics.csv"
    whole, killed = MetricsCSV(tmp_path / "whole.csv", 0), MetricsCSV(path, 0)
    for step in range(1, 7):
        whole.log_metrics({"train/loss": 1 / step}, step)
    for step in range(1, 6):
        killed.log_metrics({"train/loss": 1 / step}, step)
    # A kill may cut the last line short.
    path.write_bytes(path.read_bytes()[:-4])
    resumed = MetricsCSV(path, from_step=3)
    for step in range(4, 7):
        resumed.log_metrics({"train/loss": 1 / step}, step)
    assert path.read_text() == (tmp_path / "whole.csv").read_text()


def test_a_run_without_a_checkpoint_starts_with_an_empty_log(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsCSV(path, 0).log_metrics({"train/loss": 9.0}, 1)
    MetricsCSV(path, 0).log_metrics({"train/loss": 1.0}, 1)
    assert [row["train/loss"] for row in rows(path)] == ["1.0"]


def records(folder: Path) -> Iterator[Any]:
    """Yield the records of an offline W&B run: LevelDB's log format after seven bytes, one message per record."""
    (path,), messages = folder.glob("*.wandb"), cast(Any, wandb_internal_pb2)
    data, at, message = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        # 1 marks a whole record, 4 the last part of a record.
        if kind in (1, 4):
            record, message = messages.Record.FromString(message), b""
            yield record


def history(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of figures of an offline W&B run."""
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            yield {item.key or item.nested_key[0]: item.value_json for item in record.history.item}


def test_tensorboard_wandb_and_mlflow_go_on_with_the_same_run(tmp_path):
    client = pytest.importorskip("mlflow", reason="the test takes mlflow").MlflowClient
    command = (
        *SWIN, *SMALL[:-2], "data.num_workers=0", "logger=[tensorboard,wandb,mlflow]", "logger.wandb.mode=offline",
        "logger.wandb.tags=[short]", "trainer.log_every_n_steps=1",
        "trainer.limit_train_batches=8", "recipe.epochs=3", "hydra.run.dir=run",
    )  # fmt: skip
    stopped = start("train", *command, folder=tmp_path)
    assert stop_when(stopped, tmp_path / "run/checkpoints/best.ckpt", signal.SIGTERM) == 128 + signal.SIGTERM
    again = start("train", *command, folder=tmp_path)
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err

    steps, epoch_ends = list(range(1, 25)), [8, 16, 24]
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == steps
    assert [event.step for event in events.Scalars("val/top1")] == epoch_ends

    store = client(f"sqlite:///{tmp_path / 'mlflow.db'}")
    [run] = store.search_runs([store.get_experiment_by_name("retinue").experiment_id])
    assert [figure.step for figure in store.get_metric_history(run.info.run_id, "train/loss")] == steps
    assert [figure.step for figure in store.get_metric_history(run.info.run_id, "val/top1")] == epoch_ends
    assert (run.info.run_name, run.info.status) == ("/".join((*tmp_path.parts[-2:], "run")), "FINISHED")

    parts = sorted((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(parts) == 2 and len({part.name.rpartition("-")[2] for part in parts}) == 1  # one id
    runs = [record.run for part in parts for record in records(part) if record.WhichOneof("record_type") == "run"]
    assert {(run.run_group, *run.tags) for run in runs} == {("classification/digits", "short")}
    figures = [row for part in parts for row in history(part)]
    assert [int(row["_step"]) for row in figures] == steps
    assert [int(row["_step"]) for row in figures if "val/top1" in row] == epoch_ends
    written = rows(tmp_path / "run/metrics.csv")
    assert [float(row["train/loss"]) for row in figures] == [float(row["train/loss"]) for row in written]


def test_the_result_links_to_an_online_run(tmp_path):
    online, offline = WandbRun(mode="disabled"), WandbRun(mode="disabled")
    url = "https://wandb.ai/me/retinue/runs/1"
    online._experiment, offline._experiment = (SimpleNamespace(url=address) for address in (url, None))  # pyright: ignore
    assert links([MetricsCSV(tmp_path / "metrics.csv", 0), online]) == {"wandb": url}
    assert links([offline]) == {}


def test_mlflow_goes_on_with_the_same_run_and_logs_no_step_twice(tmp_path):
    client = pytest.importorskip("mlflow", reason="the test takes mlflow").MlflowClient
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def log(from_step, steps, folder="outputs/it's/a/run"):
        logger = mlflow(folder, from_step, "retinue", uri)
        for step in steps:
            logger.log_metrics({"train/loss": 1 / step} | ({"val/top1": step / 10} if step % 4 == 0 else {}), step)
        logger.finalize("success")
        return logger.run_id

    def steps(run, name):
        return [figure.step for figure in client(uri).get_metric_history(run, name)]

    killed, other = log(0, range(1, 7)), log(0, [1], "outputs/another/run")
    # The checkpoint is that of step 3, so the resumed run repeats the steps 4 to 6.
    assert log(3, range(4, 10)) == killed
    assert (steps(killed, "train/loss"), steps(killed, "val/top1")) == (list(range(1, 10)), [4, 8])
    assert client(uri).get_run(killed).data.metrics["train/loss"] == pytest.approx(1 / 9)
    assert client(uri).get_run(killed).info.run_name == "it's/a/run"
    # A run that begins anew replaces its MLflow run and no other run's.
    again = log(0, [1, 2])
    experiment = client(uri).get_experiment_by_name("retinue").experiment_id
    assert {run.info.run_id for run in client(uri).search_runs([experiment])} == {again, other}
    assert steps(again, "train/loss") == [1, 2]
