"""What --dry-run prints, for every configuration as it stands, and from what a run has measured."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.tiny import DEMO, ROOT
from tests.unit.test_preflight import CLASSES, EACH, make_index
from uvit_dist.config_cluster import job_directory
from uvit_dist.config_yaml import load_config
from uvit_dist.dry_run import dry_run
from uvit_dist.errors import ConfigError
from uvit_dist.evaluation import sweep

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
H = ROOT / "configs" / "uvit_h_imagenet512.yaml"


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no data, no weights, no profile


def line(text, name):
    (found,) = [line for line in text.splitlines() if line.strip().startswith(name + "  ")]
    return found


@pytest.mark.parametrize("job", ["train", "evaluate", "precompute", "reference"])
@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_configuration_as_it_stands(path, job, tmp_path):
    text = dry_run(load_config(path), job)
    assert "nothing was submitted or written" in text
    if load_config(path).launch.target == "slurm":
        assert "#SBATCH --signal=B:USR2@" in text
    else:
        assert "no batch script" in text
    assert list(tmp_path.iterdir()) == []


def test_figures_say_whence_they_are():
    text = dry_run(load_config(H), "train", ["evaluate"])
    figures = [line for line in text.splitlines() if line.startswith("  ")]
    assert all(line.endswith("]") for line in figures), figures
    assert "500,942,656  [computed]" in line(text, "parameters")
    assert "1024 = 32 images x 1 pass(es) x 32 rank(s)" in line(text, "global batch")
    assert "assumed: the profile's gpu_utilisation" in line(text, "images/s")
    assert "assumed: the profile's mtbf_node_hours" in line(text, "mean time to a failure")
    assert "for each checkpoint" in line(text, "then evaluate")
    assert "warning: data.index data/imagenet512/index.json is not there yet" in text
    assert "goodput at Young-Daly" in text


def test_a_sweep_counts_with_all_of_its_points():
    one = dry_run(load_config(H, ["sample.cfg_scale=0.4", "sample.steps=50"]), "evaluate")
    both = dry_run(load_config(H, sweep.overrides_of(["cfg_scale=0,0.4", "steps=50,100"])), "evaluate")

    def petaflop(text):
        return float(line(text, "sampling").split()[1].replace(",", ""))

    def units(text):
        return int(re.search(r"([\d,]+) units of work", text).group(1).replace(",", ""))

    assert "50,000 in" in line(one, "samples")
    assert "50,000 for each of 4 points of the sweep, in" in line(both, "samples")
    assert units(both) == 4 * units(one)
    # a call without guidance is one of the network, with it two: 50 and 100, 2·50 and 2·100, for the 2·50 of one point
    assert petaflop(both) == pytest.approx(petaflop(one) * 450 / 100, rel=1e-3)


def test_memory_is_held_against_the_profiles_gpu(tmp_path):
    (tmp_path / "small.yaml").write_text("gpu_memory_gb: 8\n")
    text = dry_run(load_config(H, ["launch.cluster=small.yaml"]), "train")
    assert "does NOT fit in 8 GB" in text
    assert "lower train.micro_batch_size" in text
    assert "fits in 80 GB" in dry_run(load_config(H), "train")
    plain = dry_run(load_config(H, ["model.use_checkpoint=false", "train.micro_batch_size=32"]), "train")
    assert "activations, all kept" in plain
    first, second = (line(text, "ZeRO-1") for text in (plain, dry_run(load_config(H, ["launch.nodes=8"]), "train")))
    assert "all kept" in first
    assert first != second, "over more ranks more fits"


def test_what_a_run_has_measured_replaces_what_is_assumed(tmp_path):
    config = load_config(H)
    run_dir = tmp_path / "runs" / "uvit_h_imagenet512"
    directory = job_directory(run_dir, "train")
    directory.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 10, "images_per_s": 5000.0}) + "\n")
    events = [
        {"event": "attempt", "time": 100.0, "attempt": 1},
        {"event": "running", "time": 145.0, "attempt": 1},
        {"event": "ended", "time": 900.0, "attempt": 1, "save_s": 77.0, "cause": "stopped"},
    ]
    (directory / "attempts.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    text = dry_run(config, "train")
    assert "5,000.0  [measured" in line(text, "images/s")
    assert "77.0 s  [measured]" in line(text, "a save")
    assert "45.0 s  [measured]" in line(text, "a restart")
    assert "--signal=B:USR2@261" in text  # three saves and 30 s


def test_an_index_that_is_there_is_read(tmp_path):
    index = make_index(tmp_path / "data", np.arange(CLASSES * EACH) % CLASSES)
    config = load_config(DEMO, [f"data.index={index.path}", "launch.target=slurm"])
    text = dry_run(config, "train")
    total = sum(record.size for record in index.shards)
    assert f"600 in 12 shards, {total / 1e9:,.2f} GB  [measured: {index.path}]" in line(text, "samples")
    assert f"{total / 600 / 1e3:,.1f} kB" in line(text, "a sample")
    assert "contradicts the configuration: shape of a sample" in text


def test_a_server_that_does_not_answer_is_a_warning():
    config = load_config(H, ["data.index=s3://some-bucket/index.json", "storage.endpoint=http://127.0.0.1:9"])
    text = dry_run(config, "train")
    assert "warning: data.index s3://some-bucket/index.json cannot be read" in text


def test_an_array_and_too_few_gpus():
    assert "#SBATCH --array=0-7%8" in dry_run(load_config(H, ["launch.nodes=1"]), "precompute", array=8)
    with pytest.raises(ConfigError, match=r"processes_per_node 16: a node of this cluster has 8 GPUs"):
        dry_run(load_config(H, ["launch.processes_per_node=16"]), "train")


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "uvit_dist.launch", "--dry-run", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_command_needs_neither_torch_nor_a_valid_environment(tmp_path):
    done = command("--config", H, f"run_dir={tmp_path}/run")
    assert done.returncode == 0
    assert "fits in 80 GB" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not imported & {"torch", "deepspeed", "webdataset"}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", ["train.global_batch_size=1000", "launch.cluster=nowhere.yaml"])
def test_only_an_invalid_configuration_is_an_error(wrong):
    done = command("--config", H, wrong)
    assert done.returncode == 78
    assert "error: " in done.stderr


def test_what_becomes_of_a_lost_node_and_what_that_costs(tmp_path):
    (tmp_path / "small.yaml").write_text("gpu_memory_gb: 9\n")
    keys = ["launch.cluster=small.yaml", "launch.target=slurm"]
    assert "a lost node" not in dry_run(load_config(H, keys), "train")
    config = load_config(H, [*keys, "launch.spares=1", "launch.min_nodes=1"])
    text = dry_run(config, "train")
    nodes = config.launch.nodes
    assert sbatch_nodes(text) == nodes + 1
    assert f"{1 / (nodes + 1):.1%} of what the job holds" in line(text, "first a spare")
    assert "32 images x 4 pass(es) x 8 rank(s)" in line(text, "then 1 node(s)")
    assert f"for {nodes + 1} node(s)" in line(text, "then the queue")
    assert "raise it above 1" in text, "the optimizer's state does not fit on fewer GPUs"
    assert "a lost node" not in dry_run(config, "evaluate")
    assert sbatch_nodes(dry_run(config, "evaluate")) == nodes


def sbatch_nodes(text):
    (found,) = [line for line in text.splitlines() if line.startswith("#SBATCH --nodes=")]
    return int(found.partition("=")[2])
