from runs.loggers import MetricsCSV
from tests.runs.cli import rows


def test_a_figure_that_comes_later_is_a_new_column(tmp_path):
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
    path.write_bytes(path.read_bytes()[:-4])  # the kill cut the last line
    resumed = MetricsCSV(path, from_step=3)
    for step in range(4, 7):
        resumed.log_metrics({"train/loss": 1 / step}, step)
    assert path.read_text() == (tmp_path / "whole.csv").read_text()


def test_a_new_run_does_not_keep_the_rows_of_one_without_a_checkpoint(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsCSV(path, 0).log_metrics({"train/loss": 9.0}, 1)
    MetricsCSV(path, 0).log_metrics({"train/loss": 1.0}, 1)
    assert [row["train/loss"] for row in rows(path)] == ["1.0"]
