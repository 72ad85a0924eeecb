import csv
import math
import subprocess
import sys
import time

import pytest

from retinue.results.collection import find_runs
from scripts import collect, compare
from tests.scripts.run_folders import fail, make_run, write_result
from tests.scripts.test_compare import make_test


@pytest.fixture
def sweep(tmp_path):
    """Make a folder of two nets by three seeds, and a failed, a stopped and an unreadable run."""
    for seed, top1 in enumerate((0.80, 0.82, 0.84)):
        make_run(tmp_path, "swin_nano", seed, top1)
        make_run(tmp_path, "biformer_nano", seed, top1 + 0.1)
    fail(make_run(tmp_path, "swin_nano", 3), "OutOfMemoryError: 2 GiB")
    make_run(tmp_path, "biformer_nano", 3)
    (make_run(tmp_path, "biformer_nano", 4) / "result.json").write_text('{"status": "finished", "metr')
    return tmp_path


def table(folder, *arguments):
    """Run the script and return the rows of the CSV file that it writes."""
    path = folder / "table.csv"
    collect.main([f"folder={folder}", *arguments, f"out={path}"])
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_row_is_the_mean_over_seeds_and_counts_unfinished_runs(sweep, capsys):
    biformer, swin = table(sweep)
    assert (swin["model"], swin["runs"]) == ("swin_nano", "3 (1 failed)")
    assert biformer["runs"] == "3 (1 stopped, 1 unreadable)"
    assert float(swin["test/top1"]) == pytest.approx(0.82)
    assert float(swin["test/top1_std"]) == pytest.approx(0.02)
    assert float(swin["test/top1_ci95"]) == pytest.approx(4.30265 * 0.02 / math.sqrt(3), rel=1e-5)
    assert (swin["test/top1_n"], float(swin["params"])) == ("3", 9e6)
    out, err = capsys.readouterr()
    assert "| swin_nano     | 3 (1 failed)                |  82.00 ± 4.97 |       9.00 |    27.00 |" in out
    assert "9 runs: 6 finished, 1 stopped, 1 unreadable, 1 failed" in err
    assert "swin_nano/0a1b2c3d-s3: OutOfMemoryError: 2 GiB" in err
    assert "biformer_nano/0a1b2c3d-s4: result.json cannot be read: Unterminated string" in err
    assert "stopped: " in err


def test_runs_of_different_settings_are_not_averaged_and_the_settings_are_named(tmp_path):
    for epochs in (2, 300):
        for seed in (0, 1):
            make_run(tmp_path, "swin_nano", seed, epochs / 1000, epochs=epochs, warmup=epochs)
    rows = table(tmp_path)
    assert [(row["recipe.epochs"], float(row["test/top1"]), row["runs"]) for row in rows] == [
        ("2", 0.002, "2"), ("300", 0.3, "2"),
    ]  # fmt: skip
    # `recipe.epochs` distinguishes the same runs already.
    assert "recipe.warmup" not in rows[0]


def test_settings_that_do_not_change_the_result_make_no_row(tmp_path):
    for seed, workers in ((0, 0), (1, 8)):
        config = make_run(tmp_path, "swin_nano", seed, 0.5) / "config.yaml"
        config.write_text(config.read_text().replace("num_workers: 0", f"num_workers: {workers}"))
    assert [row["runs"] for row in table(tmp_path)] == ["2"]


def test_a_run_that_failed_before_it_had_a_config_counts_with_the_others_of_its_net(tmp_path):
    folder = make_run(tmp_path, "swin_nano", 0, 0.5)
    failed = folder.with_name("0a1b2c3d-s1")
    failed.mkdir()
    fail(failed, "no such data")
    assert [(row["model"], row["runs"]) for row in table(tmp_path)] == [("swin_nano", "1 (1 failed)")]
    assert [row["runs"] for row in table(tmp_path, "where.seed=1", "where.data=digits")] == ["0 (1 failed)"]


def test_corrupt_files_do_not_stop_the_other_runs(tmp_path, capsys):
    make_run(tmp_path, "swin_nano", 0, 0.5)
    results = ["[]", "null", "", "{}", '{"metrics": 3}', "\x00"]
    for i, text in enumerate(results):
        (tmp_path / f"broken{i}").mkdir()
        (tmp_path / f"broken{i}/result.json").write_text(text)
    for name, content in (("config.yaml", b"a: [1"), ("failed.json", b"\xff")):
        (tmp_path / name[:6]).mkdir()
        (tmp_path / name[:6] / name).write_bytes(content)
    rows = table(tmp_path)
    assert rows[-1]["test/top1"] == "0.5" and rows[-1]["runs"] == "1"
    assert rows[0]["runs"] == f"0 (1 failed, 1 stopped, {len(results)} unreadable)"
    assert capsys.readouterr().err.count("result.json cannot be read") == len(results)


def test_a_mean_over_more_than_seeds_is_reported(tmp_path, capsys):
    make_run(tmp_path, "swin_nano", 0, 0.1, epochs=2)
    make_run(tmp_path, "swin_nano", 0, 0.3, epochs=300)
    assert float(table(tmp_path, "by=model")[0]["test/top1"]) == pytest.approx(0.2)
    assert "model=swin_nano: a mean over runs that differ in recipe.epochs" in capsys.readouterr().err
    make_run(tmp_path / "copy", "swin_nano", 0, 0.1, epochs=2)
    table(tmp_path, "where.recipe.epochs=2")
    assert "model=swin_nano: seed 0 counts more than once" in capsys.readouterr().err


def test_filters_take_alternatives_patterns_and_numbers(sweep):
    assert [row["model"] for row in table(sweep, "where.model=swin_*")] == ["swin_nano"]
    assert [row["runs"] for row in table(sweep, "where.seed=0,1")] == ["2", "2"]
    assert len(table(sweep, "where.recipe.optimizer.lr=1e-3", "where.model=biformer_nano,none")) == 1
    assert [row["runs"] for row in table(sweep, "where.status=failed")] == ["0 (1 failed)"]


def test_a_pivot_puts_data_sets_side_by_side(tmp_path):
    make_run(tmp_path, "swin_nano", 0, 0.5)
    make_run(tmp_path, "swin_nano", 0, 0.7, data="cifar10")
    make_run(tmp_path, "biformer_nano", 0, 0.9, data="cifar10")
    biformer, swin = table(tmp_path, "by=[model]", "pivot=data", "columns=[test/top1]")
    assert (swin["digits test/top1"], swin["cifar10 test/top1"], swin["runs"]) == ("0.5", "0.7", "2")
    assert (biformer["digits test/top1"], biformer["cifar10 test/top1"]) == ("", "0.9")


def test_runs_with_different_metrics_share_a_table(tmp_path, capsys):
    write_result(make_run(tmp_path, "swin_nano", 0), "swin_nano", 0, {"test/top1": 0.5})
    write_result(make_run(tmp_path, "swin_nano", 1), "swin_nano", 1, {"test/miou": 0.25, "test/top5": float("nan")})
    # A result without a config.
    write_result(tmp_path / "elsewhere", "other", 0, {"test/box_ap": 0.4})
    rows = {row["model"]: row for row in table(tmp_path)}
    assert (rows["swin_nano"]["test/top1"], rows["swin_nano"]["test/miou"]) == ("0.5", "0.25")
    assert rows["other"]["test/box_ap"] == "0.4"
    assert "1 of 2 finished runs have no test/miou" in capsys.readouterr().err


def test_an_evaluation_has_a_row_apart_from_its_run(tmp_path):
    folder = make_run(tmp_path, "swin_nano", 7, 0.5)
    write_result(folder / "evaluation/1234abcd", "swin_nano", 0, {"test/top1": 0.3}, weights="best.ckpt")
    training, evaluation = table(tmp_path)
    assert (training["kind"], training["test/top1"]) == ("training", "0.5")
    assert (evaluation["kind"], evaluation["test/top1"]) == ("evaluation", "0.3")
    assert [row["runs"] for row in table(tmp_path, "by=model")] == ["1", "1"]
    assert find_runs(tmp_path)[1].settings["recipe.epochs"] == 2


def test_markdown_and_latex_escape_special_characters(tmp_path):
    name = "größe_<b>|50%&"
    make_run(tmp_path, name, 0, 0.5)
    make_run(tmp_path, name, 1, 0.6)
    files = [tmp_path / "t.md", tmp_path / "t.tex"]
    collect.main([f"folder={tmp_path}", "spread=std", f"out=[{files[0]},{files[1]}]"])
    markdown, latex = (file.read_text(encoding="utf-8") for file in files)
    assert r"| größe_&lt;b&gt;\|50%&amp; | 2    |  55.00 ± 7.07 |" in markdown
    assert r"  größe\_<b>|50\%\& & 2 & 55.00 $\pm$ 7.07 & 14.00 & 42.00 \\" in latex
    assert latex.count(r"\begin{tabular}{llrrr}") == latex.count(r"\end{tabular}") == 1


def test_speed_and_memory_of_a_benchmark_are_joined_by_the_nets_name(sweep):
    header = "what,shape,median_ms,peak_mb,mode,images_per_s"
    (sweep / "models.csv").write_text(f"{header}\nswin_nano,8x3x32x32,40,55,inference,200\nswin_nano,,,9,training,50\n")
    names = ("inference_ms_per_image", "inference_peak_mb")
    biformer, swin = table(sweep, f"benchmarks={sweep / 'models.csv'}", f"columns=[{','.join(names)}]")
    assert [float(swin[name]) for name in names] == [5.0, 55.0]
    assert biformer[names[0]] == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["folder=nowhere"], "there is no folder nowhere"),
        (["folder=empty"], "no run lies below empty: a run's folder holds config.yaml or result.json"),
        (["where.modl=swin"], "no run has 'modl'. Did you mean 'model'?"),
        (["where.model=swin_nono"], "no run has model=swin_nono. Did you mean 'swin_nano'? There are: "),
        (["where=model"], "where takes where.<name>=TEXT, not where=model"),
        (["columns=test/top2"], "no run has 'test/top2'. Did you mean 'test/top1'?"),
        (["by=modle"], "no run has 'modle'. Did you mean 'model'?"),
        (["out=table.xls"], "out takes files that end in .csv, .md, .tex, not table.xls"),
        (["benchmarks=nowhere.csv"], "benchmarks=nowhere.csv: No such file or directory"),
    ],
)
def test_a_mistake_is_answered_in_one_line(sweep, monkeypatch, arguments, message):
    monkeypatch.chdir(sweep)
    (sweep / "empty").mkdir()
    with pytest.raises(ValueError) as error:
        collect.main(["folder=.", *arguments])
    assert message in str(error.value)


def test_an_error_on_the_command_line(tmp_path):
    done = subprocess.run(
        [sys.executable, collect.__file__, "folder=nowhere"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: there is no folder nowhere\n")


def test_a_thousand_runs_take_at_most_two_seconds(tmp_path):
    for i in range(200):
        for seed in range(5):
            make_run(tmp_path, f"net{i % 10}", seed, i / 200, lr=i)
    start = time.process_time()
    rows = table(tmp_path)
    assert len(rows) == 200 and all(row["runs"] == "5" for row in rows)
    assert time.process_time() - start < 2


def test_differences_to_a_baseline_are_those_of_compare(tmp_path, capsys):
    for name, accuracy in (("a", 0.5), ("bb", 0.9), ("ccc", 0.55)):
        for seed in (0, 1):
            make_test(tmp_path, name, seed, accuracy)
    make_run(tmp_path, "dddd", 0, 0.5)
    make_run(tmp_path, "swin_nano", 0, 0.5, data="cifar10")
    rows = {row["model"]: row for row in table(tmp_path, "baseline=a")}
    out, err = capsys.readouterr()
    compare.main(
        [str(tmp_path / "classification/digits" / name) for name in ("a", "bb", "ccc")] + [f"out={tmp_path}/c.csv"]
    )
    with open(tmp_path / "c.csv", newline="", encoding="utf-8") as file:
        expected = {row["what"]: row for row in csv.DictReader(file)}
    for name in ("bb", "ccc"):
        for ours, column in (("mean", "diff"), ("low", "diff_low"), ("p", "p"), ("same_within", "same_within")):
            assert float(rows[name][f"difference top1 {ours}"]) == pytest.approx(float(expected[name][column]))
    assert rows["a"]["difference top1 mean"] == rows["dddd"]["difference top1 mean"] == ""
    assert "difference top1 (%) |" in out and " baseline |" in out and ", same within " in out
    assert "dddd: no difference: " in err and "test_images.npz is missing" in err
    assert "cifar10 (classification): no difference, since a has no run" in err
    with pytest.raises(ValueError, match=r"there is no net 'bbb'\. Did you mean 'bb'"):
        collect.main([f"folder={tmp_path}", "baseline=bbb"])
