"""A training that is profiled writes its trace and its page, and trains as one that is not."""

import gzip
import json

import pytest

from tests.integration.jobs import train_job
from tests.ranks import run_ranks
from tests.tiny import losses, records, tiny_config
from uvit_dist.forecast import forward_flop
from uvit_dist.profile_summary import summary

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def steps_of(path):
    with gzip.open(path) as file:
        trace = json.load(file)
    return trace, [event["name"] for event in trace["traceEvents"] if str(event.get("name")).startswith("step ")]


def test_a_profile_is_written_and_changes_nothing(data_dir, tmp_path):
    plain = tiny_config(data_dir, tmp_path / "plain")
    assert run_ranks(train_job, 2, plain) == ["complete"] * 2
    assert not (tmp_path / "plain/profile").exists()

    options = ["profile.steps=3:6", "profile.ranks=[0, 1]", "speed.peak_tflops=0.5"]
    config = tiny_config(data_dir, tmp_path / "run", *options)
    assert run_ranks(train_job, 2, config) == ["complete"] * 2
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")

    folder = tmp_path / "run" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        "summary-rank0.md", "summary-rank1.md", "trace-rank0-steps3-6.json.gz", "trace-rank1-steps3-6.json.gz"
    ]  # fmt: skip
    for rank in range(2):
        trace, names = steps_of(folder / f"trace-rank{rank}-steps3-6.json.gz")
        assert names == ["step 3", "step 4", "step 5"]
        page = (folder / f"summary-rank{rank}.md").read_text()
        assert page == summary(trace, f"Steps 3 to 5, rank {rank}")
        cells = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("|")]
        found = {first.strip(): rest for first, *rest in cells}
        assert {"compute", "communication", "data wait", "host", "forward", "backward", "agree", "update"} <= set(found)
        shares = [float(line.split("|")[3].strip(" %")) for line in page.splitlines() if line.rstrip().endswith("% |")]
        assert sum(shares) == pytest.approx(100, abs=0.3)
        assert all(float(found[name][0]) > 0 for name in ("compute", "communication", "host"))
        longest = [float(rest[0]) for name, rest in found.items() if name.startswith("aten::")]
        assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
        assert longest
        assert longest == sorted(longest, reverse=True)
        assert min(longest) > 0

    record = records(tmp_path / "run", "metrics.jsonl")[10]
    needed = 3 * forward_flop(config.model) * record["images_per_s"] / 2 / 1e12
    assert record["tflops_per_rank"] == pytest.approx(needed)
    assert record["mfu"] == pytest.approx(needed / 0.5)
    told = records(tmp_path / "plain", "metrics.jsonl")[10]
    assert "tflops_per_rank" in told
    assert not {"mfu", "memory_gb"} & told.keys(), "no peak is known of a CPU, nor has it a GPU's memory"


def test_a_refused_step_is_in_the_profile_and_a_stopped_run_leaves_what_there_is(data_dir, tmp_path):
    config = tiny_config(data_dir, tmp_path / "run", "profile.steps=5:9", "guard.skip_nonfinite=1")
    ended = run_ranks(train_job, 2, config, "SIGTERM to one rank in step 7", {5: float("nan")})
    assert ended == ["stopped"] * 2
    _, names = steps_of(tmp_path / "run/profile/trace-rank0-steps5-9.json.gz")
    assert names == ["step 5", "step 5", "step 6"]
