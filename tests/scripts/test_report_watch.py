"""The page that follows running sweeps, from its server and in a browser."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from urllib.error import HTTPError

import pytest

from retinue.results import watch
from retinue.results.report import make_data
from scripts import report
from tests.scripts.browser import Reader
from tests.scripts.run_folders import make_run, write_result


def hold(folder):
    """Start a process that holds the lock of a run until its standard input is closed."""
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-S", "-c", code, str(folder / "run.lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert holder.stdout is not None
    holder.stdout.readline()
    return holder


@pytest.fixture
def served(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "MAX_AGE", 0.0)
    server = watch.make_server(lambda: make_data(watch.find_live_runs(tmp_path), tmp_path), tmp_path, "Live", port=0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield tmp_path, f"http://localhost:{server.server_port}/", server
    server.shutdown()
    server.server_close()
    thread.join()


def until(condition):
    """Wait until a condition holds; the page asks every three seconds."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_live_page_follows_runs_and_keeps_the_readers_choices(served, chrome):
    outputs, url, server = served
    reader = Reader(chrome)
    reader.driver.get(url)
    until(lambda: "no run lies below" in reader.one("#counts").text)
    running = make_run(outputs, "swin_nano", 0)
    holder = hold(running)
    try:
        until(lambda: reader.names() == ["swin_nano"])
        assert "0 + 1 running" in reader.one("tbody tr").text.replace("\n", " ")
        reader.one("input[value='runs'] + span").click()
        assert "running, epoch 2 of 2" in reader.one("tbody tr").text.replace("\n", " ")
        reader.one("tbody .open").click()
        assert "a process trains it" in reader.one("#details").text and not reader.all("#details .command")
        reader.one("#close").click()
        reader.one("#filter").send_keys("nano")
    finally:
        holder.communicate()
    write_result(running, "swin_nano", 0, {"test/top1": 0.8})
    make_run(outputs, "biformer_nano", 0, 0.9)
    make_run(outputs, "resnet10t", 0, 0.7)
    until(lambda: len(reader.names()) == 2)
    # The choice of runs instead of means, and the filter, are as before; the best net comes first.
    assert reader.names() == ["biformer_nano, seed 0", "swin_nano, seed 0"]
    assert reader.one("#shown").text == "2 of 3 rows" and "3 finished" in reader.one("#counts").text
    assert len(reader.all("#costs .mark")) == 2
    assert [entry for entry in chrome.get_log("browser") if entry["level"] == "SEVERE"] == []
    server.shutdown()
    server.server_close()
    until(lambda: "The server has ended" in reader.one("#counts").text)
    assert len(reader.names()) == 2
    reader.driver.get("data:,")
    chrome.get_log("browser")


def test_the_server_sends_the_runs_once_and_to_this_machine_only(served):
    outputs, url, server = served
    make_run(outputs, "swin_nano", 0, 0.8)
    assert server.server_address[0] == "127.0.0.1"
    with urllib.request.urlopen(f"{url}data.json") as answer:
        tag = answer.headers["ETag"]
        assert json.load(answer)["counts"] == {"finished": 1}

    def code(path, **headers):
        try:
            return urllib.request.urlopen(urllib.request.Request(url + path, headers=headers)).status
        except HTTPError as error:
            return error.code

    assert code("data.json", **{"If-None-Match": tag}) == 304
    make_run(outputs, "swin_nano", 1, 0.9)
    assert code("data.json", **{"If-None-Match": tag}) == 200
    assert (code("", Host="example.org:8000"), code("../scripts/report.py")) == (403, 404)


@pytest.fixture
def interruptible():
    """Let Ctrl-C interrupt this process, also where a shell that started it in the background ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_watching(tmp_path, capsys):
    make_run(tmp_path, "swin_nano", 0, 0.8)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port={port} cannot be used .*port=0 takes a free one"):
            report.main([f"folder={tmp_path}", "watch=true", f"port={port}"])
    answers = []

    def visit():
        # The connections of a server that does not listen yet are refused.
        for _ in range(100):
            try:
                answers.append(urllib.request.urlopen(f"http://localhost:{port}/data.json").status)
                break
            except OSError:
                time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    visitor = threading.Thread(target=visit)
    visitor.start()
    report.main([f"folder={tmp_path}", "watch=true", f"port={port}"])
    visitor.join()
    assert answers == [200] and not (tmp_path / "report.html").exists()
    assert capsys.readouterr().out.splitlines() == [
        f"http://localhost:{port} follows the runs below {tmp_path}; Ctrl-C ends it", "ended",
    ]  # fmt: skip


def test_a_folder_to_watch_must_exist(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        report.main([f"folder={tmp_path / 'nowhere'}", "watch=true"])
