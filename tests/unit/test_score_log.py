"""The history of a run's scores: whole lines from many writers, the best of what can be compared, W&B's one writer."""

import json
import subprocess
import sys

import pytest
import wandb

from tests.tiny import ROOT
from uvit_dist import score_log, storage
from uvit_dist.metrics import MetricsLog, log_scores
from uvit_dist.preflight import last_rate


def record(step, distance, samples=100, protocol="a", **more):
    return {"step": step, "fid": distance, "samples": samples, "protocol": protocol, "weights": "ema", "of_run": True,
            "checkpoint": f"step-{step}", **more}  # fmt: skip


def scored(run_dir, *records):
    for each in records:
        score_log.append_line(score_log.path_of(run_dir), each)


@pytest.mark.slow
def test_lines_of_many_writers_stay_whole(tmp_path):
    code = (
        "from uvit_dist.score_log import append_line; import sys\n"
        "for i in range(200): append_line(sys.argv[2], {'who': sys.argv[1], 'i': i, 'x': 'x' * 3000})"
    )
    command = [sys.executable, "-c", code]
    writers = [subprocess.Popen([*command, str(n), str(tmp_path / "lines.jsonl")], cwd=ROOT) for n in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    found = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert len(found) == 800
    for number in range(4):
        assert [line["i"] for line in found if line["who"] == str(number)] == list(range(200))


def test_only_what_can_be_compared_is_compared(tmp_path):
    assert score_log.distances(tmp_path) == {}
    scored(
        tmp_path,
        record(10, 30.0), record(20, 20.0), record(30, 25.0),
        record(20, 5.0, samples=50_000), record(30, 1.0, protocol="b"),
        record(40, 0.5, weights="model"), record(50, 0.1, of_run=False),
    )  # fmt: skip
    with open(score_log.path_of(tmp_path), "a") as file:
        file.write('{"step": 60, "fi')  # torn, with a machine
    assert score_log.distances(tmp_path) == {10: 30.0, 20: 20.0, 30: 25.0}
    with open(score_log.path_of(tmp_path), "a") as file:
        file.write("\n")
    scored(tmp_path, record(10, 28.0), *(record(step, float(step), protocol="c") for step in (1, 2, 3)))
    assert score_log.distances(tmp_path) == {1: 1.0, 2: 2.0, 3: 3.0}, "of equally many, the latest"


class Run:
    """W&B's run, as far as it is used."""

    def __init__(self):
        self.sent, self.metrics, self.finished = [], {}, False

    def define_metric(self, name, step_metric=None):
        self.metrics[name] = step_metric

    def log(self, values, step=None):
        self.sent.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def runs(monkeypatch):
    started = []

    def init(**options):
        started.append(Run())
        return started[-1]

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "init", init)
    return started


def test_scores_reach_the_metrics_and_wandb_by_one_writer(tmp_path, runs):
    """While training runs it alone speaks to W&B, and sends the scores; later an evaluation does so itself."""
    with storage.locked(str(tmp_path)):
        training = MetricsLog(str(tmp_path), {})
        training.write({"step": 19, "loss": 0.5})
        scored(tmp_path, record(10, 3.0), record(10, 9.0, of_run=False))
        log_scores(str(tmp_path), record(10, 3.0), {})
        assert len(runs) == 1, "no second writer"
        training.write({"step": 20, "loss": 0.4})
        training.close()
    scored(tmp_path, record(20, 2.0))
    log_scores(str(tmp_path), record(20, 2.0), {})
    first, second = runs
    sent = {"evaluation/step": 10, "evaluation/fid": 3.0}
    assert [step for step, _ in first.sent] == [19, 20, None]
    assert sent.items() <= first.sent[2][1].items()
    assert first.metrics == {"evaluation/step": None, "evaluation/*": "evaluation/step"}
    assert [values["evaluation/fid"] for _, values in second.sent] == [2.0], "each is sent once"
    assert first.finished
    assert second.finished
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "evaluation" in line) for line in lines] == [
        (19, False),
        (10, True),
        (20, False),
        (20, True),
    ]


def test_scores_among_the_metrics_do_not_hide_the_rate_of_training(tmp_path):
    assert last_rate(str(tmp_path)) is None
    append = score_log.append_line
    append(tmp_path / "metrics.jsonl", {"step": 10, "images_per_s": 50.0})
    append(tmp_path / "metrics.jsonl", {"step": 20, "images_per_s": 70.0})
    append(tmp_path / "metrics.jsonl", {"step": 10, "evaluation": record(10, 3.0)})
    assert last_rate(str(tmp_path)) == 70.0
