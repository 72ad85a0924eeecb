"""The Slurm launcher decides from a run's folder whether the run needs a job; no Slurm is needed here."""

import json

import pytest
from omegaconf import OmegaConf, open_dict

from retinue.runs.slurm_sweep import Run, _job_return, _needs_job
from tests.retinue.runs.cli import SWIN
from tests.retinue.runs.test_config import composed

RESULT = {"metrics": {"test/top1": 0.5}}


def make_run(folder, *overrides, **files):
    """Return a run whose folder holds its config and these JSON files."""
    config = composed(*SWIN, *overrides)
    with open_dict(config):
        config.hydra = {"job": {"name": "train"}}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    if files:
        saved = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        OmegaConf.save(saved, folder / "config.yaml", resolve=True)
    return Run([], config, folder)


@pytest.mark.parametrize(
    ("overrides", "files", "needs_job", "left"),
    [
        ((), {}, True, set()),
        ((), {"result": RESULT}, False, {"config.yaml", "result.json"}),
        ((), {"failed": {"reason": "no memory"}}, True, {"config.yaml"}),
        ((), {"result": '{"metr'}, False, {"config.yaml", "result.json", "failed.json"}),
        (("rerun=true",), {"result": RESULT}, True, {"config.yaml", "result.json"}),
        (("rerun=true",), {"result": '{"metr'}, True, {"config.yaml", "result.json"}),
        (("rerun=true",), {"failed": {"reason": "no memory"}}, True, {"config.yaml"}),
    ],
    ids=["missing", "finished", "failed", "unreadable", "finished, rerun", "unreadable, rerun", "failed, rerun"],
)
def test_a_run_needs_a_job_unless_it_has_a_result(tmp_path, overrides, files, needs_job, left):
    run = make_run(tmp_path, *overrides, **files)
    assert _needs_job(run, frozenset()) == needs_job
    assert {path.name for path in tmp_path.iterdir()} == left
    # The job of a rerun sets the old result aside when it starts; until then that result does not count.
    assert run.finished == (left == {"config.yaml", "result.json"} and not needs_job)


def test_a_queued_run_is_waited_for(tmp_path, capsys):
    run = make_run(tmp_path, submitted={"job": "12_3"})
    assert not _needs_job(run, frozenset({"12_3"})) and run.job == "12_3"
    assert "queued already: " in capsys.readouterr().err
    assert _needs_job(run, frozenset({"13"}))


def test_an_evaluation_is_always_run_again(tmp_path):
    run = make_run(tmp_path, result=RESULT)
    with open_dict(run.config):
        del run.config["rerun"]
    assert _needs_job(run, frozenset()) and not run.finished


def test_a_finished_run_returns_the_figure_of_its_task(tmp_path):
    assert _job_return(make_run(tmp_path, result=RESULT)).return_value == 0.5
