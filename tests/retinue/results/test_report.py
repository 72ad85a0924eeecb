import subprocess

from hydra.core.override_parser.overrides_parser import OverridesParser

from retinue.results.collection import find_runs
from retinue.results.report import commands, read_curves, thin
from tests.scripts.run_folders import make_run


def test_a_command_quotes_the_folder_for_the_shell_and_for_hydra(tmp_path):
    make_run(tmp_path / "a b's, c=d", "swin_nano", 0)
    (run,) = find_runs(tmp_path)
    ((title, command),) = commands(run)
    assert title == "Resume the run"
    shown = command.replace("python train.py", "printf '%s\\n'")
    words = subprocess.run(["sh", "-c", shown], capture_output=True, text=True).stdout.splitlines()
    assert words[:4] == ["--config-dir", str(run.folder), "--config-name", "config"]
    parsed = OverridesParser.create().parse_overrides(words[4:])
    overrides = {override.key_or_group: override.value() for override in parsed}
    assert overrides == {"hydra.output_subdir": None, "hydra.run.dir": str(run.folder), "run_dir": str(run.folder)}


def test_long_curves_are_thinned_and_keep_their_end():
    points = [[i, i / 3] for i in range(1000)]
    thinned = thin(points, 100)
    assert len(thinned) == 100 and thinned[-1] == [999, 333.0]
    assert thin(points[:3], 100) == [[0, 0.0], [1, 0.333333], [2, 0.666667]]


def test_a_cut_line_of_the_curves_is_skipped(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,epoch,val/top1,train/loss\n1,1,0.5,nan\n2,2,0.6,1.0\n3,3,0.")
    curves = read_curves(tmp_path / "metrics.csv")
    assert curves == {"val/top1": [[1, 0.5], [2, 0.6]], "train/loss": [[2, 1.0]]}
    assert read_curves(tmp_path / "nowhere.csv") == {}
