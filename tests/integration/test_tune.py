"""The real command of the autotuner, at tiny size on what is here."""

import os
import subprocess
import sys

import pytest
from ruamel.yaml import YAML

from tests.tiny import DEMO, ROOT
from uvit_dist.config_yaml import load_config

pytestmark = pytest.mark.slow
TINY = ["model.embed_dim=32", "model.depth=2", "model.num_heads=2", "train.global_batch_size=16",
        "train.micro_batch_size=2"]  # fmt: skip


def command(*arguments):
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-m", "uvit_dist.tune", "--config", str(DEMO), *arguments],
                          cwd=ROOT, env=hidden, capture_output=True, text=True, timeout=300)  # fmt: skip


def test_it_finds_a_setting_by_measuring_and_says_why(tmp_path):
    done = command(*TINY, f"run_dir={tmp_path}/run", "--seconds", "90")
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout
    assert "CPU, 80.0 GB [assumed: the profile's gpu_memory_gb]; 2 rank(s) of 8 images each" in text
    lines = text.splitlines()
    rows = [line.split() for line in lines if " all kept " in line and "%" in line]
    assert {row[0] for row in rows} >= {"2", "8"}, "the configuration's own setting and the largest"
    assert all(row[-5] == "-" for row in rows), "a CPU's memory is not measured"
    pasted = YAML(typ="safe").load("\n".join(lines[lines.index("for the configuration:") + 1 :]).partition("or ")[0])
    (overrides,) = (line.partition(": ")[2].split() for line in lines if line.startswith("or behind a command"))
    config = load_config(DEMO, [*TINY, *overrides])
    assert pasted["train"]["micro_batch_size"] == config.train.micro_batch_size
    assert pasted["zero"]["stage"] == config.zero.stage
    micro, passes = config.train.micro_batch_size, 8 // config.train.micro_batch_size
    assert f"16 = {micro} images x {passes} pass(es) x 2 rank(s): the global batch stays" in text
    best = max(rows, key=lambda row: float(row[-1].replace(",", "")))
    assert int(best[0]) == config.train.micro_batch_size, "the fastest of the table"
    assert not (tmp_path / "run").exists(), "nothing is written"


def test_what_does_not_fit_is_refused_with_what_would():
    done = command(*TINY, "--memory-gb", "2.4")
    assert done.returncode == 78
    assert "error: nothing fits" in done.stderr
    assert "Traceback" not in done.stderr


def test_too_little_time_is_said():
    done = command(*TINY, "--seconds", "2.5")
    assert done.returncode == 69
    assert "see --seconds" in done.stderr
