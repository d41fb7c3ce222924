"""Logs: JSON lines always, W&B never in the way, plain lines where there is no terminal."""

import json
import logging
import os
import pty
import socket
import subprocess
import sys
import termios

import pytest
import wandb

from tests.tiny import ROOT
from uvit_dist.metrics import JsonLines, MetricsLog, Progress

RECORD = {"step": 3, "loss": 0.5, "grad_norm": 1.0, "images_per_s": 10.0}


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def test_json_lines_are_appended_and_there_at_once(tmp_path):
    for step in (1, 2):
        metrics = MetricsLog(str(tmp_path), {})
        metrics.write({**RECORD, "step": step})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, step + 1))
        metrics.close()


def test_wandb_that_fails_later_stops_nothing(tmp_path, monkeypatch, caplog):
    class Run:
        def log(self, *_, **__):
            raise OSError("no route to host")

        def finish(self):
            raise AssertionError("left alone after it failed")

    def init(**options):
        assert options["resume"] == "allow"
        return Run()

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "init", init)
    logging.getLogger("uvit_dist").propagate = True
    metrics = MetricsLog(str(tmp_path), {})
    metrics.write(RECORD)
    metrics.write({**RECORD, "step": 4})
    metrics.close()
    assert caplog.text.count("no route to host") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def with_wandb(run_dir, **environment):
    """Two attempts of a job that logs to the real W&B. Returns what they said."""
    code = (
        "import logging, sys; logging.basicConfig()\n"
        "from uvit_dist import metrics; metrics.START_S = 3.0\n"
        f"m = metrics.MetricsLog({str(run_dir)!r}, {{'a': 'https://a.b/c?sig=5ecre7'}}); m.write({RECORD!r}); m.close()"
    )
    home = {"HOME": str(run_dir), "WANDB_SILENT": "true"}
    given = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")} | home | environment
    command = [sys.executable, "-c", code]
    return [
        subprocess.run(
            command, env=given, stdin=subprocess.DEVNULL, cwd=ROOT, check=True, capture_output=True, text=True
        ).stderr
        for _ in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("why", ["no network", "no key"])
def test_where_wandb_itself_cannot_be_reached_it_goes_on_offline_and_keeps_its_id(tmp_path, why):
    """A port of this machine on which nobody listens refuses, as a network without a way out does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    key = {"WANDB_API_KEY": "0" * 40} if why == "no network" else {"WANDB_MODE": "online"}
    for told in with_wandb(tmp_path, WANDB_BASE_URL=nobody, **key):
        assert "W&B does not answer (" in told
        assert ("connection refused" if why == "no network" else "No API key") in told
        assert f"wandb sync {tmp_path}/wandb/offline-run-*" in told
        assert "no more is sent" not in told
    identity = (tmp_path / "wandb_id").read_text()
    kept = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(kept) == 2
    assert all(folder.name.endswith(f"-{identity}") and list(folder.glob("*.wandb")) for folder in kept)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    for folder in kept:
        (data,) = folder.glob("*.wandb")
        assert b"https://a.b/c" in data.read_bytes()
        assert b"5ecre7" not in data.read_bytes(), "no signature of a URL"


@pytest.mark.slow
def test_wandb_itself_offline_keeps_its_id_over_attempts(tmp_path):
    with_wandb(tmp_path, WANDB_MODE="offline")
    identity = (tmp_path / "wandb_id").read_text()
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{identity}"))) == 2


def test_plain_lines_where_there_is_no_terminal(caplog):
    logging.getLogger("uvit_dist").propagate = True
    with caplog.at_level(logging.INFO):
        progress = Progress(0, 3, visible=True)
        progress.update(3, RECORD)
        progress.close()
    assert "step 3 of 3, loss 0.5000, gradient norm 1.000, 10 images/s, 0 s left" in caplog.text


def test_a_bar_on_a_terminal():
    code = (
        "from uvit_dist.metrics import Progress\n"
        f"p = Progress(0, 6, True); p.update(3, {RECORD!r}); p._bar.refresh(); p.close()"
    )
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 120))
    done = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=slave)
    assert done.wait() == 0
    os.close(slave)
    shown = os.read(master, 100_000).decode()
    os.close(master)
    assert "3/6" in shown
    assert "loss 0.5000, 10 images/s" in shown


def test_records_wait_while_a_disk_is_full(tmp_path, caplog):
    lines, room = JsonLines(tmp_path / "lines.jsonl"), []
    file = lines._file

    class Disk:
        def write(self, data):
            if not room:
                raise OSError(28, "No space left on device")
            return file.write(data[: room[0]])

        def close(self):
            file.close()

    lines._file = Disk()
    records = [{"step": step, "text": "x" * 400} for step in range(60)]
    for record in records[:50]:
        lines.write(record)
    assert len([r for r in caplog.records if "records wait until there is room" in r.message]) == 1
    room.append(1000)  # a write takes so much of it at most
    for record in records[50:]:
        lines.write(record)
    lines.close()
    assert [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()] == records
