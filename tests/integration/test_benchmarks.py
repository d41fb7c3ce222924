"""The benchmark of a GPU runs through at tiny size on whatever is here, so that it works the first time on one."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import simulation
from tests.tiny import ROOT

pytestmark = pytest.mark.slow


def test_every_part_of_the_gpu_benchmark_is_measured_at_tiny_size(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())
    assert record["not_measured"] == {}
    assert all(figure["value"] >= 0 for figure in record["figures"])
    assert {figure["name"][:2] for figure in record["figures"]} == {"G0", "G1", "G3", "G4", "G5", "G6", "G7", "G8"}
    assert record["ways"]


def test_without_a_gpu_full_size_is_refused_with_what_to_do():
    command = [sys.executable, "-m", "benchmarks.gpu"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True, timeout=400)
    assert done.returncode == 2
    assert "--tiny" in done.stderr


def test_the_simulation_of_many_ranks_comes_out_right_at_a_few(tmp_path, monkeypatch):
    """What it counts follows the number of ranks as docs/large_clusters.md says."""
    monkeypatch.setattr(simulation, "REPEATS", 2)
    monkeypatch.setattr(simulation, "UNIT_S", 0.02)
    chosen = ["--ranks", "4", "16", "--out", str(tmp_path), "--plot", str(tmp_path / "plot.png")]
    assert simulation.main(chosen) == 0
    record = json.loads((tmp_path / "simulation.json").read_text())
    assert record["right"]
    for row in record["rows"]:
        count = row["ranks"]
        assert row["plan"]["requests_of_an_epoch"] == record["rows"][0]["plan"]["requests_of_an_epoch"]
        assert count <= row["checkpoints"]["files"] <= count + 1
        assert row["checkpoints"]["opened_by_a_rank_of_half"] <= 2
        assert row["evaluation"]["units"] == simulation.UNITS_EACH * count
    assert simulation.main(["--ranks", "7"]) == 2
