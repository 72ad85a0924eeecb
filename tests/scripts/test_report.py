"""The page in a browser: by mouse and by keyboard, on a wide screen and on a phone."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml

from retinue.evaluation.sight.pictures import draw_grid
from retinue.results.run_pictures import write_caption
from scripts import report
from tests.scripts.browser import Reader
from tests.scripts.run_folders import fail, make_run, write_result
from tests.scripts.test_compare import make_test

EVIL = "größe_</script><script>document.title='taken'</script><b>&amp;"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Make a folder of three nets by two seeds, a second data set, and failed, stopped and half-written runs."""
    outputs = tmp_path_factory.mktemp("outputs")
    for seed in (0, 1):
        make_run(outputs, "swin_nano", seed, 0.80 + seed / 100)
        # More expensive than swin_nano and better.
        make_run(outputs, "biformer_nano", seed, 0.90 + seed / 100)
        # More expensive than both and worse.
        make_run(outputs, "resnet10t_wide", seed, 0.70 + seed / 100)
    fail(make_run(outputs, "swin_nano", 2), "OutOfMemoryError: <img src=x onerror=document.title='taken'> 2 GiB")
    make_run(outputs, "swin_nano", 3)
    (make_run(outputs, "swin_nano", 4) / "result.json").write_text('{"status"')
    folder = make_run(outputs, "evil", 0)
    write_result(folder, EVIL, 0, {"test/top1": 0.5, "test/loss": float("nan"), "test/miou": 0.25})
    make_run(outputs, "swin_nano", 0, 0.6, data="cifar10")
    return outputs


@pytest.fixture(scope="module")
def page(outputs, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.main([f"folder={outputs}", "title=Swin & <others>", f"out={path}"])
    return path


@pytest.fixture
def reader(chrome, page):
    reader = Reader(chrome)
    reader.open(page)
    # Empty the logs of the previous test.
    for log in ("browser", "performance"):
        chrome.get_log(log)
    yield reader
    assert [entry for entry in chrome.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_the_page_loads_nothing_and_runs_no_code_from_names(page, reader):
    text = re.sub(r'(?s)<script type="application/json".*?</script>', "", page.read_text(encoding="utf-8"))
    assert "<script" in text
    assert not re.search(r"(?:src|href)=[\"']?(?!data:)[\w/]|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", text)
    reader.open(page)
    assert reader.driver.title == "Swin & <others>"
    assert EVIL in reader.names()
    assert not reader.all("img, tbody b")
    messages = [json.loads(entry["message"])["message"] for entry in reader.driver.get_log("performance")]
    urls = {
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    }
    assert {url for url in urls if not url.startswith("data:")} == {page.as_uri()}


def test_the_table_has_the_means_and_sorts_by_a_column(reader):
    # The best net comes first.
    assert reader.names() == ["biformer_nano", "swin_nano", "resnet10t_wide", EVIL]
    row = reader.all("tbody tr")[1].text
    assert "80.50 ± 6.35" in row and "2 + 1 failed + 1 stopped + 1 unreadable" in row.replace("\n", " ")
    button = reader.one("[data-sort='test/top1']")
    button.click()
    assert reader.names() == [EVIL, "resnet10t_wide", "swin_nano", "biformer_nano"]
    assert reader.one("th[aria-sort='ascending']").text.startswith("top1")
    reader.tab_to("[data-sort='test/loss']")
    reader.press(" ")
    # A net without a loss comes last in both directions.
    assert reader.names() == ["biformer_nano", "swin_nano", "resnet10t_wide", EVIL]
    reader.press(" ")
    assert reader.names() == ["resnet10t_wide", "swin_nano", "biformer_nano", EVIL]


def test_the_filter_chooses_rows_points_and_curves(reader):
    assert (len(reader.all("#costs .mark")), len(reader.all("#curves .curve"))) == (4, 10)
    reader.one("#filter").send_keys("SWIN failed")
    assert reader.names() == ["swin_nano"]
    assert reader.one("#shown").text == "1 of 4 rows"
    assert (len(reader.all("#costs .mark")), len(reader.all("#curves .curve"))) == (1, 5)
    reader.one("input[value='runs'] + span").click()
    assert reader.names() == ["swin_nano, seed 2"]
    reader.one("#filter").clear()
    reader.one("#filter").send_keys("no such net")
    assert reader.names() == [] and "No finished run" in reader.one("#costs").text


def test_only_runs_on_the_same_data_are_compared(reader):
    reader.one("#set option:nth-child(2)").click()
    assert reader.one("#set").text.splitlines() == ["digits (classification)", "cifar10 (classification)"]
    assert reader.names() == ["swin_nano"]
    assert "60.00" in reader.one("tbody tr").text


def test_the_theme_follows_the_system_until_it_is_switched(reader, page):
    light = reader.style("body", "background-color")
    reader.one("#theme").click()
    dark = reader.style("body", "background-color")
    assert dark != light and reader.one("#theme").get_attribute("aria-pressed") == "true"
    reader.one("#theme").click()
    assert reader.style("body", "background-color") == light
    reader.open(page, scheme="dark")
    assert reader.style("body", "background-color") == dark


def test_points_have_tooltips_by_mouse_and_by_keyboard(reader):
    from selenium.webdriver import ActionChains, Keys

    # On the Pareto front one net is cheaper and one is better.
    front = {mark.get_attribute("data-entry") for mark in reader.all(".mark.best")}
    assert front == {"swin_nano", "biformer_nano"}
    ActionChains(reader.driver).move_to_element(reader.one(".mark[data-entry='swin_nano'] .shape")).perform()
    assert reader.one(".tip").text.splitlines() == ["swin_nano", "top1 80.50 ± 6.35 %", "MACs 27.00 M"]
    reader.one("#x input[value='params'] + span").click()
    reader.tab_to(".mark[data-entry='biformer_nano']")
    assert reader.one(".tip").text.splitlines()[2] == "Parameters 13.00 M"
    reader.press(Keys.ENTER)
    assert reader.one("#details-title").text == "biformer_nano"


def test_a_runs_details_open_and_close_by_keyboard(reader, outputs):
    from selenium.webdriver import Keys

    reader.tab_to("tbody tr:nth-child(2) .open")
    reader.press(Keys.ENTER)
    assert reader.one("#details").get_attribute("open") is not None
    assert reader.one("#details-title").text == "swin_nano"
    config = yaml.safe_load(reader.one("#config").text)
    assert config["recipe"]["optimizer"]["lr"] == 0.001 and "seed" not in config
    folder = outputs / "classification/digits/swin_nano/0a1b2c3d"
    assert f"python eval.py run={folder}-s0" in reader.one("#details").text
    # Two charts, loss and top-1, show five runs.
    assert len(reader.all("#details .curve")) == 10
    reader.tab_to("#run")
    reader.press(Keys.DOWN, Keys.DOWN)
    text = reader.one("#details").text
    assert "OutOfMemoryError: <img src=x onerror=document.title='taken'> 2 GiB" in text
    assert f"--config-dir {folder}-s2 --config-name config" in text
    reader.press(Keys.ESCAPE)
    assert reader.one("#details").get_attribute("open") is None
    assert reader.driver.execute_script("return document.activeElement.textContent") == "swin_nano"


def test_nothing_is_wider_than_a_phone(reader, page):
    for scheme in ("light", "dark"):
        reader.open(page, 375, scheme)
        assert reader.width() == 375
        for picture in reader.all(".chart svg"):
            assert picture.rect["x"] >= 0 and picture.rect["x"] + picture.rect["width"] <= 375
        reader.driver.execute_script("arguments[0].click()", reader.one("tbody .open"))
        assert reader.one("#details").is_displayed() and reader.width() == 375
        assert reader.one("#details").rect["width"] <= 375


def test_a_folder_without_runs_makes_no_page(tmp_path):
    with pytest.raises(ValueError, match="no run lies below"):
        report.main([f"folder={tmp_path}", f"out={tmp_path / 'report.html'}"])
    assert not (tmp_path / "report.html").exists()


def test_a_folder_without_any_result_still_makes_a_page(tmp_path, chrome):
    fail(make_run(tmp_path, "swin_nano", 0), "no")
    report.main([f"folder={tmp_path}", f"out={tmp_path / 'report.html'}"])
    reader = Reader(chrome)
    chrome.get_log("browser")
    reader.open(tmp_path / "report.html")
    assert "No run is finished." in reader.one("#costs").text
    assert "0 + 1 failed" in reader.one("tbody tr").text.replace("\n", " ")
    assert chrome.get_log("browser") == []


def test_panels_of_robustness_have_a_radar(tmp_path, chrome):
    figures = {"test/top1": 0.9, "test/robust_corruption": 0.6, "test/robust_size": 0.5, "test/robust_pgd": 0.0}
    result = {"status": "finished", "task": "classification", "model": "swin_nano", "data": "digits", "weights": "w",
              "image_size": 32, "panel": "robustness", "metrics": figures}  # fmt: skip
    folder = tmp_path / "evaluation" / "aaaaaaaa"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    report.main([f"folder={folder.parent}", f"out={tmp_path / 'report.html'}"])
    reader = Reader(chrome)
    chrome.get_log("browser")
    reader.open(tmp_path / "report.html")
    assert reader.one("#radar-card").is_displayed()
    labels = [node.text for node in reader.all("#radar svg text")]
    assert labels == ["top1", "corruption", "size", "pgd"]
    assert "corruption 60.0 %" in reader.one("#radar path.curve").get_attribute("aria-label")
    assert chrome.get_log("browser") == []


def test_the_pictures_in_a_runs_folder_are_on_the_page(tmp_path, chrome):
    from selenium.webdriver import Keys

    runs = [make_run(tmp_path, "swin_nano", seed, 0.8) for seed in (0, 1)]
    folder = runs[1] / "sight"
    folder.mkdir()
    draw_grid(folder / "routes.png", [[("cell", np.ones((2, 2, 3)), np.eye(2))] * 9], "title")
    write_caption(folder, "routes", "0.3,0.6", "python scripts/see.py kind=routes run=<img>")
    # Neither a caption that a kill has cut nor one without its picture is shown.
    (folder / "erf.json").write_text('{"kind": "erf"')
    write_caption(folder, "pca", None, "python scripts/see.py kind=pca")
    report.main([f"folder={tmp_path}", f"out={tmp_path / 'page.html'}"])
    # The page carries its pictures.
    shutil.rmtree(folder)
    reader = Reader(chrome)
    chrome.get_log("browser")
    for width in (1280, 375):
        reader.open(tmp_path / "page.html", width)
        reader.driver.execute_script("arguments[0].click()", reader.one("tbody .open"))
        assert not reader.all("#details img")
        reader.tab_to("#run")
        reader.press(Keys.DOWN)
        assert [node.text for node in reader.all("#details figcaption")] == ["routes, query 0.3,0.6"]
        assert "python scripts/see.py kind=routes run=<img>" in reader.one("#details figure").text
        image = reader.one("#details img")
        assert image.get_property("naturalWidth") > 1000 and 0 < image.rect["width"] <= width
        assert reader.width() <= width
    assert chrome.get_log("browser") == []


SPEED = """what,shape,dtype,machine,median_ms,peak_mb,mode,form,batch_size,images_per_s,joules_per_image,p99_ms
swin_nano,,float32,CPU,20,50,inference,eager,2,100,0.5,
swin_nano,,float32,CPU,1,,throughput,eager,1,60,,
swin_nano,,float32,CPU,1,,throughput,eager,8,150,,
swin_nano,,float32,CPU,7,,latency,eager,1,140,,11
swin_nano,,float32,CPU,3,,forward,eager,2,600,,
swin_nano,,float32,CPU,6,,backward,eager,2,300,,
other,,float32,CPU,1,,throughput,eager,8,40,,
"""


def test_the_speed_of_the_nets_is_a_chart_and_a_table(tmp_path, outputs, chrome):
    (tmp_path / "speed.csv").write_text(SPEED)
    page = tmp_path / "report.html"
    report.main([f"folder={outputs}", f"benchmarks={tmp_path / 'speed.csv'}", f"out={page}"])
    reader = Reader(chrome)
    reader.open(page)
    assert reader.one("#speed-conditions").text == "CPU, float32, eager"
    assert len(reader.all("#speed .curve")) == 2 and not reader.all("#throughput option:nth-child(2)")
    heads = [node.text for node in reader.all("#speed-table th")]
    assert heads == ["Net", "Inference, images/s", "Latency, ms", "99th percentile, ms", "Forward, ms", "Backward, ms",
                     "Energy, J/image", "Memory, MB"]  # fmt: skip
    cells = [
        [cell.text for cell in row.find_elements("css selector", "td")] for row in reader.all("#speed-table tbody tr")
    ]
    assert cells == [["swin_nano", "100", "7", "11", "3", "6", "0.5", "50"], ["other", *[""] * 7]]
    reader.one("#x input[value='latency_ms'] + span").click()
    assert {mark.get_attribute("data-entry") for mark in reader.all("#costs .mark")} == {"swin_nano"}
    reader.open(page, 375)
    assert reader.width() == 375


def test_the_table_has_the_differences_to_a_baseline(tmp_path, chrome):
    for seed in (0, 1):
        make_test(tmp_path, "a", seed, 0.5)
        make_test(tmp_path, "bb", seed, 0.9)
    report.main([f"folder={tmp_path}", "baseline=a", f"out={tmp_path / 'page.html'}"])
    reader = Reader(chrome)
    reader.open(tmp_path / "page.html")
    rows = {name: row.text for name, row in zip(reader.names(), reader.all("tbody tr"), strict=True)}
    assert "Difference to a" in reader.one("#table thead").text and "baseline" in rows["a"]
    assert re.search(r"top1 \(%\) \+\d+\.\d\d \(\+.* to \+.*\), p .*, same within ", rows["bb"].replace("\n", " "))
