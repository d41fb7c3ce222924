"""Evaluation: the same bits however the work is cut, and after a kill only what is missing."""

import io
import json
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.integration.jobs import evaluate_job, train_job
from tests.ranks import run_ranks
from tests.tiny import DEMO, ROOT, overrides, tiny_config
from uvit_dist import score_log, storage
from uvit_dist.spool import spooled
from uvit_dist.work import WorkDirectory

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
OF_THIS_RUN = {"seconds"}
"""What is told of the run and not of the images."""
LEASE_S = 2.0


@pytest.fixture(scope="module")
def run_dir(data_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    config = tiny_config(data_dir, directory, "launch.processes_per_node=1", "train.steps=10", "checkpoint.keep=2")
    assert run_ranks(train_job, 1, config) == ["complete"]
    return directory


def config_of(data_dir, run_dir, *more):
    return tiny_config(data_dir, run_dir, f"evaluate.lease_s={LEASE_S}", *more)


def clear(run_dir):
    for path in (run_dir / "evaluation").rglob("chunk-*"):
        path.unlink()
    for path in (run_dir / "evaluation").rglob("scores-*.json"):
        path.unlink()


def chunks(run_dir, kind="ema"):
    (directory,) = (run_dir / "evaluation").glob(f"step-*-{kind}-*")
    return {path.name: path.read_bytes() for path in sorted((directory / "chunks").glob("chunk-*.npz"))}


def moments(run_dir, names, count):
    (directory,) = (run_dir / "evaluation").glob("step-*-ema-*")
    with spooled(WorkDirectory(str(directory / "chunks"), names), ["pixels"], count) as spool:
        return spool.moments("pixels").state_dict()


def told(scores):
    return {name: value for name, value in scores.items() if name not in OF_THIS_RUN}


def test_any_number_of_workers_and_kills_give_the_same_bits(data_dir, run_dir):
    config = config_of(data_dir, run_dir)
    (alone,) = run_ranks(evaluate_job, 1, config)
    assert alone["samples"] == 60
    expected = chunks(run_dir)
    names = ["chunk-000000", "chunk-000001", "chunk-000002", "chunk-000003-of-12"]
    assert list(expected) == [f"{name}.npz" for name in names]
    as_one = moments(run_dir, names, 60)

    for workers in (2, 3, 4):
        clear(run_dir)
        several = run_ranks(evaluate_job, workers, config)
        assert all(scores == several[0] for scores in several), "all get what the one that scored wrote"
        assert told(several[0]) == told(alone)
        assert chunks(run_dir) == expected

    clear(run_dir)
    for done in (1, 2):  # killed twice, each time after another chunk
        with pytest.raises(AssertionError, match="-9"):
            run_ranks(evaluate_job, 1, config, "before it stores its second chunk")
        assert len(chunks(run_dir)) == done
    kept = {path: path.stat().st_mtime_ns for path in (run_dir / "evaluation").rglob("chunk-*.npz")}
    resumed = run_ranks(evaluate_job, 3, config)
    assert told(resumed[0]) == told(alone)
    assert chunks(run_dir) == expected
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items()), "done work is not done again"
    assert all(np.array_equal(as_one[key], value) for key, value in moments(run_dir, names, 60).items())
    assert not list((run_dir / "evaluation").rglob("*.lease-*"))


def test_a_worker_lost_in_the_middle_costs_its_chunk(data_dir, run_dir):
    """One of four dies with a chunk in its hands, on a machine that the others cannot see: they wait for its lease."""
    config = config_of(data_dir, run_dir)
    (alone,) = run_ranks(evaluate_job, 1, config)
    clear(run_dir)
    with pytest.raises(AssertionError, match=r"exit codes \[[0, ]*-9[0, ]*\]"):
        run_ranks(evaluate_job, 4, config, "the first that stores chunk 2")
    (directory,) = (run_dir / "evaluation").glob("step-*-ema-*")
    assert told(json.loads((directory / "scores-60.json").read_text())) == told(alone)

    (directory / "scores-60.json").unlink()
    with pytest.raises(AssertionError, match=r"exit codes \[[0, ]*-9[0, ]*\]"):
        run_ranks(evaluate_job, 3, config, "the first that writes scores")
    assert told(json.loads((directory / "scores-60.json").read_text())) == told(alone)


def test_the_sub_batch_is_the_protocol_and_the_distance_hardly_depends_on_it(data_dir, run_dir):
    (eight,) = run_ranks(evaluate_job, 1, config_of(data_dir, run_dir))
    (six,) = run_ranks(evaluate_job, 1, config_of(data_dir, run_dir, "evaluate.sub_batch_size=6",
                                                  "evaluate.chunk_size=12"))  # fmt: skip
    assert six["protocol"] != eight["protocol"]
    assert six["frechet_distance"] == pytest.approx(eight["frechet_distance"], rel=1e-3)


def test_more_images_later_cost_only_the_rest(data_dir, run_dir):
    """60 images, then 64: the first three chunks are the same files, and an image has the same bits in both."""
    run_ranks(evaluate_job, 1, config_of(data_dir, run_dir))
    before = {path: path.stat().st_mtime_ns for path in (run_dir / "evaluation").rglob("chunk-*.npz")}
    (more,) = run_ranks(evaluate_job, 1, config_of(data_dir, run_dir, "evaluate.samples=64"))
    assert more["samples"] == 64
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    (directory,) = {path.parent for path in before if path.name.endswith("-of-12.npz")}
    short, full = (dict(np.load(directory / f"chunk-000003{end}.npz")) for end in ("-of-12", ""))
    assert (len(short["labels"]), len(full["labels"])) == (12, 16)
    for name in ("pixels", "labels"):
        assert np.array_equal(short[name], full[name][:12])


def test_scores_and_picture_are_written_and_say_what_they_are_of(data_dir, run_dir):
    (scores,) = run_ranks(evaluate_job, 1, config_of(data_dir, run_dir))
    assert {"frechet_distance", "frechet_distance_real_halves", "class_accuracy", "recall"} <= scores.keys()
    expected = {
        "step": 10, "weights": "ema", "samples": 60, "cfg_scale": 1.5, "solver": "dpm_solver_pp", "solver_steps": 4,
        "sample_precision": "fp32", "seed": 1234, "labels": "classes, uniform", "sub_batch_size": 8, "of_run": True,
        "reference": f"{data_dir}/reference.npz", "checkpoint": f"{run_dir}/checkpoints/step-00000010",
    }  # fmt: skip
    assert {name: scores[name] for name in expected} == expected
    (directory,) = {path.parent for path in (run_dir / "evaluation").rglob("grid.png") if str(path) == scores["grid"]}
    assert json.loads((directory / "scores-60.json").read_text()) == scores
    assert scores in score_log.records(run_dir)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {"step": 10, "evaluation": scores} in lines
    with Image.open(scores["grid"]) as picture:
        assert picture.size == (10 * 34 + 2, 2 * 34 + 2)


def test_other_weights_and_other_protocols_are_kept_apart(data_dir, run_dir):
    changes = [[], ["evaluate.weights=untrained"], ["sample.cfg_scale=3"], ["sample.precision=bf16_autocast"]]
    scored = [run_ranks(evaluate_job, 1, config_of(data_dir, run_dir, *change))[0] for change in changes]
    assert len({scores["frechet_distance"] for scores in scored}) == 4
    assert len({scores["grid"] for scores in scored}) == 4
    ema, untrained, _, half = scored
    assert half["frechet_distance"] == pytest.approx(ema["frechet_distance"], rel=0.02)
    assert (untrained["step"], untrained["checkpoint"], untrained["of_run"]) == (0, None, False)


def test_another_reference_is_scored_against_without_new_images(data_dir, run_dir, tmp_path):
    (scores,) = run_ranks(evaluate_job, 1, config_of(data_dir, run_dir))
    before = {path: path.stat().st_mtime_ns for path in (run_dir / "evaluation").rglob("chunk-*.npz")}
    reference = dict(np.load(data_dir / "reference.npz"))
    np.savez(tmp_path / "other.npz", **{**reference, "mu": reference["mu"] + 1})
    other = config_of(data_dir, run_dir, f"evaluate.reference={tmp_path}/other.npz")
    (further,) = run_ranks(evaluate_job, 1, other)
    moved = len(reference["mu"]) + 2 * float((reference["mu"] - mean_of(run_dir)).sum())
    assert further["frechet_distance"] - scores["frechet_distance"] == pytest.approx(moved, rel=1e-9)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def mean_of(run_dir):
    names = ["chunk-000000", "chunk-000001", "chunk-000002", "chunk-000003-of-12"]
    directory = next(path.parent for path in (run_dir / "evaluation").glob("*/scores-60.json")
                     if json.loads(path.read_text())["cfg_scale"] == 1.5 and "-ema-" in str(path)
                     and json.loads(path.read_text())["sample_precision"] == "fp32"
                     and json.loads(path.read_text())["sub_batch_size"] == 8)  # fmt: skip
    with spooled(WorkDirectory(str(directory / "chunks"), names), ["pixels"], 60) as spool:
        return spool.moments("pixels").mean


def test_a_sweep_scores_every_point_and_makes_a_table_and_a_plot(data_dir, run_dir):
    config = config_of(data_dir, run_dir, "evaluate.sweep.cfg_scale=[0,1.5]", "evaluate.sweep.steps=[3,4]")
    (one_point,) = run_ranks(evaluate_job, 1, config_of(data_dir, run_dir))  # its scores serve the sweep too
    first, second = run_ranks(evaluate_job, 2, config)
    assert first["points"] == second["points"]
    asked = [(point["cfg_scale"], point["solver_steps"]) for point in first["points"]]
    assert asked == [(0.0, 3), (0.0, 4), (1.5, 3), (1.5, 4)]
    assert told(first["points"][3]) == told(one_point)
    table = Path(first["table"]).read_text()
    assert table.startswith("60 images, ema weights of step 10, fp32, seed 1234, against ")
    lowest = min(point["frechet_distance"] for point in first["points"])
    assert re.findall(r"\*\*(.*?)\*\*", table) == [f"{lowest:.4f}"]
    assert json.loads(Path(first["json"]).read_text()) == first["points"]
    with Image.open(first["plot"]) as picture:
        assert picture.size == (900, 600)
    times = {path: path.stat().st_mtime_ns for path in (run_dir / "evaluation").rglob("scores-60.json")}
    command = [sys.executable, "-m", "uvit_dist.launch", "--config", str(DEMO), "--job", "evaluate", "--local", "1"]
    command += [*overrides(data_dir, run_dir), "--sweep", "cfg_scale=0,1.5", "steps=3,4"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert f'"table": "{first["table"]}"' in done.stderr
    assert {path: path.stat().st_mtime_ns for path in times} == times, "finished points are not done again"


def test_every_image_can_be_kept_in_shards(data_dir, run_dir):
    """Asked for after the scores, too: the PNGs are the very images that were scored."""
    config = config_of(data_dir, run_dir, "sample.steps=3", "evaluate.samples=20")
    (plain,) = run_ranks(evaluate_job, 1, config)
    kept = config_of(data_dir, run_dir, "sample.steps=3", "evaluate.samples=20", "evaluate.save_samples=true")
    (scores,) = run_ranks(evaluate_job, 2, kept)[:1]
    assert told(scores) == told(plain)
    directory = next(path.parent for path in (run_dir / "evaluation").rglob("grid.png") if str(path) == scores["grid"])
    found = {}
    for path in sorted((directory / "chunks").glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    assert list(found) == [f"{number:08d}.{kind}" for number in range(20) for kind in ("cls", "png")]
    chunk = dict(np.load(directory / "chunks" / "chunk-000001-of-4.npz"))
    assert [int(found[f"{number:08d}.cls"]) for number in range(16, 20)] == chunk["labels"].tolist()
    picture = np.asarray(Image.open(io.BytesIO(found["00000019.png"])))
    assert np.array_equal(picture.transpose(2, 0, 1), chunk["images"][3])
    grey = torch.from_numpy(picture.astype(np.float64)).mean(2)[None, None] / 127.5 - 1
    assert np.allclose(torch.nn.functional.avg_pool2d(grey, 4).flatten().numpy(), chunk["pixels"][3])


def test_checkpoints_are_scored_on_few_images_and_the_best_on_all(data_dir, run_dir, tmp_path):
    """What a job that follows training does at each checkpoint; the best by it is what retention keeps."""
    evaluations = {}
    for step in (10, 5, 10):
        config = config_of(data_dir, run_dir, f"evaluate.checkpoint={run_dir}/checkpoints/step-{step:08d}",
                           "evaluate.small_samples=32", "evaluate.seed=7")  # fmt: skip
        found = run_ranks(evaluate_job, 2, config)
        assert found[0] == found[1]
        evaluations.setdefault(step, []).append(found[0])
    assert told(evaluations[10][0]) == told(evaluations[10][1]), "scored once"
    small = {r["step"]: r for r in score_log.records(run_dir) if r["seed"] == 7 and r["samples"] == 32}
    ranked = sorted(small, key=lambda step: small[step]["frechet_distance"])
    assert evaluations[10][0]["samples"] == 60, "the first is the best so far"
    assert evaluations[5][0]["samples"] == (60 if ranked[0] == 5 else 32)
    assert small[5]["best_so_far"] == (ranked[0] == 5)


def test_what_is_missing_is_named(data_dir, run_dir, tmp_path):
    def message(where, *more):
        return run_ranks(evaluate_job, 1, config_of(data_dir, where, *more))[0]

    assert message(tmp_path).startswith(f"MissingInputError 66: {tmp_path}: holds no checkpoint")
    missing = message(run_dir, "evaluate.reference=nowhere.npz")
    assert missing.startswith("MissingInputError 66: evaluate.reference nowhere.npz: no such file; make it")
    other = message(run_dir, "model.depth=4")
    assert other.startswith("DataError 65")
    assert "model.depth: trained with 2, the configuration says 4" in other
    for change in ("model.num_heads=4", "autoencoder.scale_factor=2"):  # would load without a word
        assert message(run_dir, change).startswith("DataError 65"), change
    swept = message(run_dir, "diffusion.schedule=vpsde", "evaluate.sweep.solver=[dpm_solver]", "sample.cfg_scale=0")
    assert "trained with discrete_sd" in swept
    wrong = message(run_dir, "evaluate.sweep.solver=[dpm_solver,euler_maruyama_ode]")
    assert "sample.solver euler_maruyama_ode needs diffusion.schedule vpsde" in wrong


def test_a_damaged_checkpoint_is_found_before_any_image_is_made(data_dir, run_dir, tmp_path):
    damaged = tmp_path / "damaged" / "step-00000010"
    damaged.mkdir(parents=True)
    for path in (run_dir / "checkpoints" / "step-00000010").iterdir():
        content = bytearray(path.read_bytes())
        if path.suffix == ".safetensors":
            content[-1] ^= 1
        (damaged / path.name).write_bytes(content)
    config = config_of(data_dir, tmp_path, f"evaluate.checkpoint={damaged}")
    assert "differs from its hash in the manifest" in run_ranks(evaluate_job, 1, config)[0]
    assert not list((tmp_path / "evaluation").rglob("chunk-*"))


def test_the_launched_job_stops_when_asked_and_goes_on(data_dir, run_dir):
    """Through the command line, while a training holds the run directory; SIGTERM gives all leases back."""
    more = ["evaluate.lease_s=600", "evaluate.samples=320", "sample.steps=40", "evaluate.seed=9"]
    command = [sys.executable, "-m", "uvit_dist.launch", "--config", str(DEMO), "--job", "evaluate", "--local", "2"]
    begun, deadline = time.time(), time.monotonic() + 400

    def here():
        found = (run_dir / "evaluation").glob("*/chunks/chunk-*.npz")
        return {path: path.stat().st_mtime_ns for path in found if path.stat().st_mtime > begun}

    with storage.locked(str(run_dir)):
        process = subprocess.Popen(
            [*command, *overrides(data_dir, run_dir, *more)], cwd=ROOT, text=True, stderr=subprocess.PIPE
        )
        while len(here()) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, message = process.communicate(timeout=400)
    assert process.returncode == 75, message
    assert "Traceback" not in message
    assert not list((run_dir / "evaluation").rglob("*.lease-*"))
    kept = here()
    assert len(kept) < 20
    (scores,) = run_ranks(evaluate_job, 1, config_of(data_dir, run_dir, *more))
    assert scores["samples"] == 320
    assert kept.items() <= here().items(), "done work is not done again"
