"""The page of a run: of one that goes on, one without evaluation, one with a torn last line, a long one."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tests.tiny import DEMO, ROOT
from uvit_dist.config_yaml import dump_config, load_config
from uvit_dist.errors import MissingInputError
from uvit_dist.page import write_page
from uvit_dist.page.charts import charts
from uvit_dist.page.facts import POINTS, curve, read_run, reduced


def record(step, **more):
    return {"step": step, "samples_seen": 64 * step, "loss": 1.0 / step, "grad_norm": 0.5, "lr": 1e-3,
            "images_per_s": 100.0, "data_wait_s": 0.001, "data_bytes_per_s": 0.0, "time": 1000.0 + step,
            "loss_by_timestep": [1.0, 0.5, 0.1], **more}  # fmt: skip


def write_metrics(run_dir, records, torn=""):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records) + torn)


def titles(run_dir):
    return [chart.title for chart in charts(read_run(run_dir))]


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.tags = [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.found += [value for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_a_page_needs_no_network_and_no_script(tmp_path):
    write_metrics(tmp_path, [record(step) for step in range(1, 30)])
    text = write_page(tmp_path).read_text()
    links = Links()
    links.feed(text)
    assert [link for link in links.found if not link.startswith(("#", "data:"))] == []
    assert "script" not in links.tags
    assert not re.search(r"url\((?!#)|@import", text)
    assert "<h2>Loss</h2>" in text


def test_signatures_and_passwords_in_urls_are_not_shown(tmp_path):
    signed = "https://bucket.example/vae.safetensors?X-Amz-Expires=60&X-Amz-Signature=5ecre7"
    known = "https://me:pa55word@data.example/vae.safetensors"
    config = load_config(
        DEMO, [f"autoencoder.decoder={signed}", f"autoencoder.encoder={known}", "storage.endpoint=http://u:pa55@h:80"]
    )
    (tmp_path / ".launch-train.yaml").write_text(dump_config(config))
    write_metrics(tmp_path, [record(1)])
    job = {"attempt": 1, "job_id": "1", "restart": 0}
    attempts = [
        {**job, "event": "attempt", "hosts": ["a"], "world_size": 1, "from_step": None, "time": 1.0},
        {**job, "event": "ended", "cause": "mistake", "reason": f"{signed}: cannot be fetched", "time": 2.0},
    ]
    (tmp_path / "launch" / "train").mkdir(parents=True)
    (tmp_path / "launch" / "train" / "attempts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in attempts))
    text = write_page(tmp_path).read_text()
    assert "https://bucket.example/vae.safetensors?…" in text
    assert "https://…@data.example/vae.safetensors" in text
    assert not re.search("5ecre7|pa55|X-Amz", text)


def test_only_what_was_recorded_is_drawn(tmp_path):
    write_metrics(tmp_path, [record(step) for step in range(1, 30)])
    told = titles(tmp_path)
    assert told == ["Progress, attempts and faults over time", "Loss", "Loss by timestep", "Gradient norm",
                    "Learning rate", "Throughput", "Waits for data"]  # fmt: skip
    more = [record(step, mfu=0.4, tflops_per_rank=400.0, memory_gb=50.0, data_bytes_per_s=1e6) for step in range(1, 9)]
    write_metrics(tmp_path, more)
    assert set(titles(tmp_path)) - set(told) == {
        "FLOP utilisation", "Arithmetic of a rank", "Memory", "Bytes read"
    }  # fmt: skip


def test_a_torn_last_line_is_passed_over(tmp_path):
    write_metrics(tmp_path, [record(step) for step in range(1, 6)], torn='{"step": 6, "loss": 0.')
    assert [line["step"] for line in read_run(tmp_path).lines] == [1, 2, 3, 4, 5]
    write_page(tmp_path)


def test_values_that_are_no_numbers_leave_a_gap(tmp_path):
    write_metrics(tmp_path, [record(1), record(2, loss=float("nan")), record(3, loss=None, grad_norm="?"), record(4)])
    run = read_run(tmp_path)
    assert curve(run.lines, "loss").x.tolist() == [1, 4]
    assert curve(run.lines, "grad_norm").x.tolist() == [1, 2, 4]
    write_page(tmp_path)


def test_steps_that_a_restart_went_back_behind_are_in_the_time_axis_alone(tmp_path):
    before = [record(step, loss=9.0) for step in range(1, 11)]
    after = [record(step, loss=1.0, time=2000.0 + step) for step in range(6, 13)]
    write_metrics(tmp_path, before + after)
    run = read_run(tmp_path)
    assert [line["loss"] for line in run.lines] == [9.0] * 5 + [1.0] * 7
    assert [len(piece) for piece in run.pieces()] == [10, 7]


def test_attempts_and_faults_stand_at_their_times(tmp_path):
    write_metrics(tmp_path, [record(step) for step in range(1, 11)])
    directory = tmp_path / "launch" / "train"
    directory.mkdir(parents=True)
    common = {"job_id": "7", "restart": 0, "attempt": 1}
    events = [
        {"event": "started", "time": 1000.0, **common},
        {"event": "attempt", "time": 1000.0, "hosts": ["n0"], "world_size": 2, "from_step": None, **common},
        {"event": "ended", "time": 4600.0, "cause": "node_lost", "reason": "n0 is gone", "exit_code": 1,
         "hosts": ["n0"], "checkpoint": 8, "last_step": 10, **common},
        {"event": "attempt", "time": 4700.0, "hosts": ["n1"], "world_size": 2, "from_step": 8, **common, "attempt": 2},
    ]  # fmt: skip
    (directory / "attempts.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    run = read_run(tmp_path)
    first, second = run.attempts
    assert (first.begin, first.end, second.end) == pytest.approx((0.0, 1.0, None))
    assert run.ends == [(pytest.approx(1.0), "node_lost")]
    assert [line["step"] for line in run.lines] == list(range(1, 9))
    text = write_page(tmp_path).read_text()
    assert "node_lost" in text
    assert "n0 is gone" in text


def score(step, distance, **more):
    return {"step": step, "fid": distance, "weights": "ema", "samples": 50_000, "of_run": True, "cfg_scale": 0.4,
            "solver": "dpm_solver_pp", "solver_steps": 50, **more}  # fmt: skip


def test_scores_and_grids_are_shown_and_those_of_no_run_are_not_in_the_curve(tmp_path):
    write_metrics(tmp_path, [record(step) for step in range(1, 11)])
    records = []
    for step, distance in ((5, 30.0), (10, 3.0)):
        grid = tmp_path / "evaluation" / f"step-{step}" / "grid.png"
        grid.parent.mkdir(parents=True)
        Image.new("RGB", (40, 40), (step, 0, 0)).save(grid)
        records.append(score(step, distance, grid=f"elsewhere/evaluation/step-{step}/grid.png"))
    (tmp_path / "evaluation/step-10/grid.png").write_bytes(b"\x89PNG torn")
    records.append(score(0, 300.0, of_run=False, weights="untrained"))
    (tmp_path / "evaluation/scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records) + '{"st')
    run = read_run(tmp_path)
    assert list(run.distances.values()) == [{5: 30.0, 10: 3.0}]
    assert [picture.told for picture in run.pictures] == ["step 5, ema weights, 30"]
    assert "Fréchet distance over the steps" in titles(tmp_path)


def test_a_large_grid_is_shown_smaller(tmp_path):
    from uvit_dist.page.facts import data_url

    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "grid.png")
    url = data_url(tmp_path / "grid.png")
    assert url.startswith("data:image/jpeg;base64,")
    assert len(url) < (tmp_path / "grid.png").stat().st_size


@pytest.mark.parametrize("length", [1, POINTS, POINTS + 1, 12_345])
def test_a_long_curve_keeps_its_mean_and_its_extremes(length):
    random = np.random.default_rng(length)
    x, y = np.arange(length, dtype=float), random.normal(size=length)
    found = reduced(x, y, 2.0)
    assert len(found.x) <= POINTS
    assert found.low.min() == 2 * y.min()
    assert found.high.max() == 2 * y.max()
    size = -(-length // POINTS)
    assert found.mean[0] == pytest.approx(2 * y[:size].mean())
    assert found.x[-1] == pytest.approx(x[size * (len(found.x) - 1) :].mean())
    assert (found.low <= found.mean + 1e-12).all()
    assert (found.mean <= found.high + 1e-12).all()


def test_names_and_paths_are_escaped(tmp_path):
    run_dir = tmp_path / "<b>&run"
    write_metrics(run_dir, [record(step) for step in range(1, 4)])
    text = write_page(run_dir, tmp_path / "page.html").read_text()
    assert "<b>&run" not in text
    assert "&lt;b&gt;&amp;run" in text


def test_charts_are_well_formed_with_ids_of_their_own(tmp_path):
    write_metrics(tmp_path, [record(step, mfu=0.4) for step in range(1, 9)])
    ids = []
    for chart in charts(read_run(tmp_path)):
        tree = ElementTree.fromstring(chart.svg)
        ids += [part.get("id") for part in tree.iter() if part.tag.endswith("clipPath")]
    assert len(ids) == len(set(ids))


def test_no_run_is_a_mistake_that_says_so(tmp_path):
    with pytest.raises(MissingInputError, match="no run is here"):
        write_page(tmp_path)
    command = [sys.executable, "-m", "uvit_dist.page", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 66
    assert done.stderr.startswith("error: ")
    assert not (tmp_path / "page.html").exists()
