"""Loggers of a run: metrics.csv always; TensorBoard, W&B and MLflow on demand; each continues a resumed run."""

import csv
import errno
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from pytorch_lightning.utilities import rank_zero_only

from retinue.utils.files import replacing


class MetricsCSV(Logger):
    """Write `metrics.csv`: a row for each logged set of figures with its step; a new figure becomes a new column.

    Args:
        path: the file.
        from_step: step from which the run is resumed, or 0. Later rows of an existing file are dropped, since the
            resumed run writes them again.

    Raises:
        ValueError: the file is damaged.
    """

    def __init__(self, path: Path, from_step: int):
        super().__init__()
        self.path, self.from_step = path, from_step
        self._columns = ["step"]
        if rank_zero_only.rank == 0:
            # A damaged file is an error before anything is trained.
            rows = [row for row in self._read() if int(row["step"]) <= self.from_step]
            self._columns = list(rows[0]) if rows else ["step"]
            self._rewrite(rows)

    name = property(lambda self: "csv")
    version = property(lambda self: "")

    @property
    @rank_zero_experiment
    def experiment(self) -> None: ...

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Log nothing: config.yaml holds the hyper-parameters."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step, **metrics}
        if not self.path.exists():
            # Writing would make the folder anew, as that of a run without a config.
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
        if new := [name for name in row if name not in self._columns]:
            self._columns += new
            self._rewrite(self._read())
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _read(self) -> list[dict[str, str]]:
        try:
            text = self.path.read_text(encoding="utf-8")
            # A kill may have cut the last line short.
            lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
            rows = [row for row in csv.DictReader(lines) if None not in row.values()]
            for row in rows:
                int(row["step"])
            return rows
        except FileNotFoundError:
            return []
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise ValueError(
                f"{self.path} cannot be read ({type(error).__name__}: {error}); move it away and start the same "
                "command again: the run goes on, without the rows of before"
            ) from None

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)


def tensorboard(run_dir: str, from_step: int) -> TensorBoardLogger:
    """Return a logger that writes event files to `<run>/tensorboard` and hides old events after `from_step`."""
    return TensorBoardLogger(
        run_dir, name="", version="", sub_dir="tensorboard", purge_step=from_step + 1 if from_step else None
    )


class WandbRun(WandbLogger):
    """Lightning's W&B logger with the optimiser's step as W&B's own step: a resumed run repeats and skips none."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log({**metrics, "trainer/global_step": step}, step=step)


def wandb(
    run_dir: str,
    from_step: int,
    project: str,
    entity: str | None,
    mode: str,
    group: str | None,
    tags: Sequence[str],
) -> WandbRun:
    """Return a logger whose run id follows from the run's folder, so that a resumed run continues the same W&B run.

    Args:
        run_dir: the run's folder.
        from_step: step from which the run is resumed; W&B finds it by itself.
        project: W&B's project.
        entity: user or team that owns the project; None for the user's default.
        mode: `online`, `offline` or `disabled`.
        group: name under which W&B shows runs together.
        tags: tags of the run.
    """
    return WandbRun(
        name=_run_name(run_dir),
        save_dir=run_dir,
        id=_run_id(run_dir),
        project=project,
        entity=entity,
        mode=mode,
        group=group,
        tags=list(tags),
        resume="allow",
    )


class MLflowRun(MLFlowLogger):
    """Lightning's MLflow logger, which logs no figure of a step again that a run before the resume has logged."""

    _logged: dict[str, int] | None = None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._logged is None:
            names, of_run = self.experiment.get_run(str(self.run_id)).data.metrics, self.experiment.get_metric_history
            self._logged = {name: max(figure.step for figure in of_run(str(self.run_id), name)) for name in names}
        new = {name: value for name, value in metrics.items() if (step or 0) > self._logged.get(name, -1)}
        super().log_metrics(new, step)


def mlflow(run_dir: str, from_step: int, experiment: str, tracking_uri: str | None) -> MLflowRun:
    """Return a logger that goes on with the MLflow run of the run's folder, or begins one if no step was trained.

    A new MLflow run replaces that of the same folder, which `mlflow gc` removes for good.

    Args:
        run_dir: the run's folder.
        from_step: step from which the run is resumed, or 0.
        experiment: MLflow's experiment, which is made if there is none.
        tracking_uri: address of the server or of the database; None for `MLFLOW_TRACKING_URI` or MLflow's default.

    Raises:
        ValueError: MLflow is not installed.
    """
    try:
        from mlflow import MlflowClient, get_tracking_uri
    except ImportError:
        raise ValueError("logger=mlflow needs MLflow: pip install 'retinue[mlflow]'") from None
    uri, tags, run_id = tracking_uri or get_tracking_uri(), {"retinue.run": _run_id(run_dir)}, None
    if rank_zero_only.rank == 0:
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(experiment)
        filter_ = f"tags.`retinue.run` = '{tags['retinue.run']}'"
        for run in client.search_runs([found.experiment_id], filter_) if found else []:
            if from_step:
                run_id = run.info.run_id
            else:
                client.delete_run(run.info.run_id)
    return MLflowRun(experiment, _run_name(run_dir), uri, tags, run_id=run_id)


def _run_id(run_dir: str) -> str:
    """Return an id that follows from the run's folder."""
    return hashlib.sha256(str(Path(run_dir)).encode()).hexdigest()[:16]


def _run_name(run_dir: str) -> str:
    return "/".join(Path(run_dir).parts[-3:])


def links(loggers: Iterable[Logger]) -> dict[str, str]:
    """Return the run's address on W&B as `{"wandb": "https://..."}`, or {} if it has no online run."""
    urls = (logger.experiment.url for logger in loggers if isinstance(logger, WandbRun))
    url = next((url for url in urls if isinstance(url, str)), None)
    return {"wandb": url} if url else {}
