"""The arithmetic of the scaling model against cases worked out by hand."""

import json

import pytest

from benchmarks import scaling
from tests.tiny import ROOT
from uvit_dist import forecast
from uvit_dist.config_yaml import load_config

H = ROOT / "configs" / "uvit_h_imagenet512.yaml"


def sent(world_size, *overrides, passes=1):
    config = load_config(H, overrides)
    return forecast.traffic(config.model, config.train, config.zero, world_size, passes)


def test_bytes_of_a_step_of_the_h_network_on_64_gpus():
    bf16 = sent(64, "train.precision=bf16")
    assert bf16.total == pytest.approx(2 * 63 / 64 * 500_942_656 * 2, rel=1e-9)
    assert bf16.total / 50e9 == pytest.approx(39e-3, rel=0.015)
    assert bf16.total / 400e9 == pytest.approx(4.9e-3, rel=0.015)
    for overrides in (["train.precision=bf16", "zero.stage=3"], ["train.precision=bf16", "zero.reduce_dtype=fp32"]):
        assert sent(64, *overrides).total == pytest.approx(1.5 * bf16.total)
    assert sent(64).total == pytest.approx(2 * bf16.total), "fp32 weights and sums"
    assert sent(64, "zero.reduce_dtype=bf16").total == pytest.approx(1.5 * bf16.total)


def test_what_stages_and_passes_change():
    one = sent(8)
    assert sent(8, passes=4) == one, "ZeRO-1 sums once"
    assert sent(8, "zero.stage=0", passes=4).total == one.total, "an all-reduce is a scatter and a gather"
    assert sent(8, "zero.stage=2", passes=4) == forecast.Traffic(4 * one.gradients, one.weights)
    assert sent(8, "zero.stage=3", passes=4) == forecast.Traffic(4 * one.gradients, 8 * one.weights)
    assert sent(1).total == 0


def test_latents_of_a_gpu():
    assert 600 * forecast.sample_bytes(load_config(H)) == pytest.approx(39e6, rel=0.01)


def test_the_slower_link_counts():
    assert scaling.bus_bandwidth(8, 1, 450.0, 50.0, 0.5) == 225
    assert scaling.bus_bandwidth(64, 1, 450.0, 50.0, 1.0) == 50
    assert scaling.bus_bandwidth(64, 8, 450.0, 50.0, 1.0) == 400
    assert scaling.bus_bandwidth(64, 16, 450.0, 50.0, 1.0) == 450


def step(images=20, micro=10, gradients=4e9, buckets=4, latency_s=0.0, sample=1e6):
    compute = scaling.Compute(fixed_s=0.01, images_per_s=1000)  # 20 ms for 10 images
    links = scaling.Links(bus=100e9, storage=1e9, latency_s=latency_s)
    traffic = forecast.Traffic(gradients, 2e9)
    return scaling.project(compute, traffic, links, images, micro, 64, buckets, sample, 0.5)


def test_a_step_by_hand():
    # Sums take 40 ms, of which 10 beside the last backward pass; weights take 20 ms.
    assert step() == scaling.Step(pytest.approx(0.04), pytest.approx(0.01), pytest.approx(0.05), pytest.approx(0.02))
    assert step().total == pytest.approx(0.09)
    # Of 8 ms in 4 buckets the last bucket's 2 come after the pass.
    assert step(gradients=0.8e9).exposed == pytest.approx(0.022)
    assert step(gradients=0.8e9, buckets=1).hidden == 0
    # 64 ranks are 6 doublings; 5 collectives.
    assert step(latency_s=1e-3).exposed == pytest.approx(step().exposed + 5 * 6e-3)
    # Data that come at 50 images/s take 400 ms.
    assert step(sample=20e6).total == pytest.approx(0.4)


def test_compute_is_a_line_through_what_was_measured():
    ways = [{"batch": 16, "images_per_s": 16 / 0.026}, {"batch": 128, "images_per_s": 128 / 0.138},
            {"batch": 16, "images_per_s": 100.0}]  # fmt: skip
    line = scaling.fitted(ways)
    assert line.fixed_s == pytest.approx(0.01)
    assert line.images_per_s == pytest.approx(1000)
    assert scaling.fitted(ways[:1]) is None


def test_without_a_gpu_compute_is_assumed_and_said_to_be(tmp_path):
    compute, named = scaling.compute_of(tmp_path, 799e9)
    assert 128 / compute.seconds(128) == pytest.approx(0.4 * 989e12 / 799e9)
    assert 16 / compute.seconds(16) == pytest.approx(0.85 * 0.4 * 989e12 / 799e9)
    assert {one.whence for one in named.values()} == {"published", "assumed"}
    record = {"setting": {"tiny": True}, "ways": [{"batch": b, "images_per_s": 1.0} for b in (1, 2)]}
    (tmp_path / "gpu.json").write_text(json.dumps(record))
    assert scaling.compute_of(tmp_path, 799e9)[0] == compute, "a tiny run is no measurement"
    record |= {"setting": {"tiny": False}, "device": "a GPU", "date": "today", "commit": "abcdefgh"}
    record["ways"] = [{"batch": b, "images_per_s": b / (0.01 + b / 1000)} for b in (16, 64, 128)]
    (tmp_path / "gpu.json").write_text(json.dumps(record))
    compute, named = scaling.compute_of(tmp_path, 799e9)
    assert (compute.fixed_s, compute.images_per_s) == (pytest.approx(0.01), pytest.approx(1000))
    assert {one.whence for one in named.values()} == {"measured"}


def test_every_row_is_there_and_more_bytes_are_never_faster(tmp_path):
    config = load_config(H, ["model.use_checkpoint=false"])
    compute, _ = scaling.compute_of(tmp_path, forecast.training_flop(config.model))
    rows = scaling.projections(config, compute, scaling.inputs(tmp_path))
    assert len(rows) == 3 * 2 * 2 * 3
    assert all(0 < row["efficiency"] <= 1 for row in rows)
    by = {(row["reduction"], row["adapters"], row["scaling"], row["gpus"]): row for row in rows}
    for (reduction, adapters, kind, gpus), row in by.items():
        assert row["images_per_s"] <= by[reduction, 8, kind, gpus]["images_per_s"]
        assert row["images_per_s"] <= by["bf16 sums and weights", adapters, kind, gpus]["images_per_s"]
    assert by["bf16 sums and weights", 1, "strong", 64]["images"] == 16
