"""A step that the guard refuses: skipped, or gone back before, and the run goes on as if its data had never been."""

import json
import math

import pytest

from tests.integration.jobs import train_job
from tests.ranks import run_ranks
from tests.tiny import losses, records, same_tensors, saved_state, tiny_config, traces

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
NAN = math.nan


def manifest(run_dir, step=10):
    return json.loads((run_dir / f"checkpoints/step-{step:08d}/manifest.json").read_text())


def reports(run_dir):
    return {path.name: json.loads(path.read_text()) for path in sorted(run_dir.glob("divergence-*"))}


def assert_same_run(run_dir, other):
    """Bit for bit: losses, samples, and what is saved of masters, moments, EMA."""
    assert losses(run_dir) == losses(other)
    assert list(losses(run_dir)) == list(range(1, 11))
    by_time = [{step: line["loss_by_timestep"] for step, line in records(at, "metrics.jsonl").items()}
               for at in (run_dir, other)]  # fmt: skip
    assert by_time[0] == by_time[1]
    assert traces(run_dir) == traces(other)
    assert same_tensors(saved_state(run_dir, 10), saved_state(other, 10))
    assert manifest(run_dir)["journal"] == manifest(other)["journal"]
    assert manifest(run_dir)["guard"]["losses"] == manifest(other)["guard"]["losses"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_nan_on_one_rank_is_skipped_by_all_and_leaves_no_trace(data_dir, tmp_path, stage):
    options = [f"zero.stage={stage}", "guard.skip_nonfinite=1"]
    spoilt = tiny_config(data_dir, tmp_path / "spoilt", *options)
    assert run_ranks(train_job, 2, spoilt, "none", {6: NAN}, 1) == ["complete"] * 2
    assert "skipped, with step 6 of the data" in (tmp_path / "spoilt/logs/rank-00001.log").read_text()
    assert reports(tmp_path / "spoilt") == {}
    without = tiny_config(data_dir, tmp_path / "without", *options)
    assert run_ranks(train_job, 2, without, "none", None, None, (6, 6)) == ["complete"] * 2
    assert_same_run(tmp_path / "spoilt", tmp_path / "without")
    assert manifest(tmp_path / "spoilt")["journal"]["skipped_steps"] == [[6, 6]]


def test_killed_after_a_skip_and_after_a_save_with_it_the_run_goes_on_the_same(data_dir, tmp_path):
    """The skips of 3, 4 and 6 are in the checkpoint of step 5, that of 8 comes right after it."""
    spoilt = ({3: NAN, 4: NAN, 6: math.inf, 8: NAN}, 0)
    whole = tiny_config(data_dir, tmp_path / "whole", "guard.skip_nonfinite=2")
    assert run_ranks(train_job, 2, whole, "none", *spoilt) == ["complete"] * 2
    broken = tiny_config(data_dir, tmp_path / "broken", "guard.skip_nonfinite=2")
    for after in (2, 5, 7):
        with pytest.raises(AssertionError, match="-9"):
            run_ranks(train_job, 2, broken, f"kill one rank after step {after}", *spoilt)
    assert run_ranks(train_job, 2, broken, "none", *spoilt) == ["complete"] * 2
    assert_same_run(tmp_path / "broken", tmp_path / "whole")
    assert manifest(tmp_path / "whole")["journal"]["skipped_steps"] == [[3, 4], [6, 6], [8, 8]]


def test_stopped_in_a_skipped_step_the_run_saves_the_skip_and_goes_on_the_same(data_dir, tmp_path):
    whole = tiny_config(data_dir, tmp_path / "whole", "guard.skip_nonfinite=2")
    assert run_ranks(train_job, 2, whole, "none", {6: NAN, 7: NAN}) == ["complete"] * 2
    broken = tiny_config(data_dir, tmp_path / "broken", "guard.skip_nonfinite=2")
    assert run_ranks(train_job, 2, broken, "SIGTERM to one rank in step 7", {6: NAN, 7: NAN}) == ["stopped"] * 2
    assert manifest(tmp_path / "broken", 6)["guard"]["skipped"] == 1
    assert manifest(tmp_path / "broken", 6)["journal"]["skipped_steps"] == [[6, 6]]
    assert run_ranks(train_job, 2, broken, "none", {6: NAN, 7: NAN}) == ["complete"] * 2
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.parametrize(
    ("stage", "factor", "rules"),
    [
        (1, 1000.0, ["guard.spike=50", "guard.window=4", "guard.rollbacks=2"]),
        (3, NAN, ["guard.rollbacks=2"]),
        (0, NAN, ["guard.rollbacks=1", "guard.skip_nonfinite=1"]),
    ],
)
def test_a_poisoned_window_is_passed_over_and_so_it_is_after_a_kill(data_dir, tmp_path, stage, factor, rules):
    options, spoilt = [f"zero.stage={stage}", *rules], ({6: factor, 7: factor}, None)
    whole = tiny_config(data_dir, tmp_path / "whole", *options)
    assert run_ranks(train_job, 2, whole, "none", *spoilt) == ["complete"] * 2
    without = tiny_config(data_dir, tmp_path / "without", *options)
    assert run_ranks(train_job, 2, without, "none", None, None, (5, 7)) == ["complete"] * 2
    assert_same_run(tmp_path / "whole", tmp_path / "without")
    assert manifest(tmp_path / "whole", 5)["journal"]["skipped_steps"] == []
    assert manifest(tmp_path / "whole")["guard"]["rollbacks"] == whole.guard.rollbacks
    told = reports(tmp_path / "whole")
    assert len(told) == whole.guard.rollbacks
    assert all(record["action"].startswith("back to step-00000005") for record in told.values())

    broken = tiny_config(data_dir, tmp_path / "broken", *options)
    with pytest.raises(AssertionError, match="-9"):  # this update is fed by step 9 of the data: the run had gone back
        run_ranks(train_job, 2, broken, "kill one rank after step 7", *spoilt)
    assert [path.name for path in (tmp_path / "broken/checkpoints").glob("step-*")] == ["step-00000005"]
    assert run_ranks(train_job, 2, broken, "none", *spoilt) == ["complete"] * 2
    assert_same_run(tmp_path / "broken", tmp_path / "whole")
    assert manifest(tmp_path / "broken")["guard"] == manifest(tmp_path / "whole")["guard"]
    assert list(reports(tmp_path / "broken")) == list(told)


def test_with_the_rollbacks_used_up_the_run_ends_and_says_who_had_what(data_dir, tmp_path):
    config = tiny_config(data_dir, tmp_path, "guard.rollbacks=1")
    told = run_ranks(train_job, 2, config, "none", {6: NAN, 8: NAN}, 1)
    assert told[0] == told[1]
    assert told[0].startswith("NumericalError 70: step 6: loss nan, gradient norm nan: not finite; the update was not")
    assert "Step 8 of the data, epoch 1; worst is rank 1, loss nan, samples " in told[0]
    assert "Ended: no rollback is left of guard.rollbacks 1. See whether" in told[0]
    first, last = reports(tmp_path).values()
    assert first["action"] == "back to step-00000005, steps 5…6 of the data are left out, rollbacks left: 0"
    assert (last["step"], last["plan_step"], last["epoch"], last["worst_rank"], last["loss"]) == (6, 8, 1, 1, "nan")
    assert [rank["loss"] == "nan" for rank in last["ranks"]] == [False, True]
    assert [len(rank["ids"]) for rank in last["ranks"]] == [12, 12]
    assert len({sample for rank in last["ranks"] for sample in rank["ids"]}) == 24
    assert last["action"].startswith("ended: no rollback is left")


def test_before_the_first_checkpoint_there_is_nothing_to_go_back_to(data_dir, tmp_path):
    config = tiny_config(data_dir, tmp_path, "guard.rollbacks=1", "guard.skip_nonfinite=1")
    told = run_ranks(train_job, 2, config, "none", {2: NAN, 3: NAN}, 0)
    assert told[0] == told[1]
    assert "NumericalError 70: step 2: " in told[0]
    assert "not finite, after 1 skipped in a row" in told[0]
    assert "Ended: no checkpoint yet" in told[0]
