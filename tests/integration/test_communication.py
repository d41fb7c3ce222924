"""What ranks send: bytes on the wire against theory, the dtype of sums, and that the sums are right however cut."""

import json
import subprocess
import sys

import pytest

from benchmarks import step as benchmark
from tests.integration.test_engine import OPTIONS, engine_job, reference, whole
from tests.ranks import run_ranks
from tests.tiny import ROOT, tiny_config
from uvit_dist import forecast

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
SMALLER = ["model.embed_dim=256", "model.depth=4"]


def losses_and_bytes(out, *options):
    """Of the ranks of benchmark C10 at a smaller size, one rank and two: losses; bytes of a rank and step."""
    ranks = f"{sys.executable} -m benchmarks.step --ranks-of-c10 {out} {' '.join([*SMALLER, *options])}"
    subprocess.run(["unshare", "--net", "sh", "-c", f"ip link set lo up && exec {ranks}"], cwd=ROOT, check=True)
    one, two = (json.loads((out.parent / f"{out.name}-{n}-0.json").read_text())["rows"] for n in (1, 2))
    return [row["loss"] for row in one], [row["loss"] for row in two], [row["wire"] for row in two[1:]]


@pytest.mark.parametrize(("stage", "dtype"), [(1, "null"), (1, "bf16"), (2, "fp32")])
def test_bytes_on_the_wire_are_those_of_theory(tmp_path, stage, dtype):
    options = [f"zero.stage={stage}", f"zero.reduce_dtype={dtype}"]
    alone, together, wire = losses_and_bytes(tmp_path / "rank", *options)
    config = benchmark.configuration(*SMALLER, "data.lanes=2", *options)
    theory = forecast.traffic(config.model, config.train, config.zero, 2).total
    # of some steps more is counted: on a busy machine TCP sends a segment again, whatever sits above it
    assert min(wire) == pytest.approx(theory, rel=0.03)
    assert max(wire) < 1.25 * theory, "an all-reduce of the gradients would send 1.5 times as much"
    off = max(abs(a - b) / a for a, b in zip(alone, together, strict=True))
    assert off <= 1e-5 if dtype != "bf16" else 0 < off < 1e-2


@pytest.mark.parametrize(("stage", "bucket"), [(1, 25_000_000), (1, 2_000), (2, 25_000_000), (2, 2_000)])
def test_sums_are_right_on_three_ranks_however_gradients_are_cut(data_dir, tmp_path, stage, bucket):
    """Buckets smaller than some gradients, or larger than all; three ranks cut parameters apart."""
    options = ["launch.processes_per_node=3", f"zero.stage={stage}", f"zero.bucket_size={bucket}",
               "train.precision=fp32", "train.micro_batch_size=4"]  # fmt: skip
    config = tiny_config(data_dir, tmp_path, *OPTIONS, *options)
    told = run_ranks(engine_job, 3, config)
    results, state = reference(config)
    assert [loss for loss, *_ in told[0][0]] == pytest.approx([loss for loss, _ in results], rel=2e-6)
    assert [norm for _, norm, _ in told[0][0]] == pytest.approx([norm for _, norm in results], rel=1e-5)
    ours = whole([state for _, state, _ in told])
    for key, value in state.items():
        assert (ours[key] - value).abs().max() <= 3e-6, key
