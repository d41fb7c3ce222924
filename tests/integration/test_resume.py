"""Whatever happens to a run, it goes on to the same losses: bit for bit on the same ranks."""

import pytest

from tests.integration.jobs import train_job
from tests.ranks import run_ranks
from tests.tiny import losses, same_tensors, saved_state, tiny_config, traces

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(data_dir, tmp_path, stage):
    whole = tiny_config(data_dir, tmp_path / "whole", f"zero.stage={stage}")
    assert run_ranks(train_job, 2, whole) == ["complete"] * 2

    broken = tiny_config(data_dir, tmp_path / "broken", f"zero.stage={stage}")
    with pytest.raises(AssertionError, match="-9"):
        run_ranks(train_job, 2, broken, "kill one rank after step 7")
    assert sorted(p.name for p in (tmp_path / "broken/checkpoints").glob("step-*")) == ["step-00000005"]
    assert run_ranks(train_job, 2, broken) == ["complete"] * 2

    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert traces(tmp_path / "broken") == traces(tmp_path / "whole")
    assert list(losses(tmp_path / "whole")) == list(range(1, 11))
    assert same_tensors(saved_state(tmp_path / "broken", 10), saved_state(tmp_path / "whole", 10))
    assert not same_tensors(saved_state(tmp_path / "whole", 5), saved_state(tmp_path / "whole", 10))


@pytest.fixture(scope="module")
def one_rank(data_dir, tmp_path_factory):
    """The uninterrupted run of one process alone."""
    run_dir = tmp_path_factory.mktemp("one")
    config = tiny_config(data_dir, run_dir, "launch.processes_per_node=1", "train.micro_batch_size=24")
    assert run_ranks(train_job, 1, config) == ["complete"]
    return run_dir


def assert_same_run(run_dir, one_rank):
    """The same samples, timesteps, labels and noise in the same order; losses within 1e-5."""
    assert traces(run_dir) == traces(one_rank)
    ours, theirs = losses(run_dir), losses(one_rank)
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[step] - theirs[step]) / theirs[step] for step in theirs) <= 1e-5


def test_two_ranks_equal_one(data_dir, tmp_path, one_rank):
    config = tiny_config(data_dir, tmp_path, "zero.stage=1")
    assert run_ranks(train_job, 2, config) == ["complete"] * 2
    assert_same_run(tmp_path, one_rank)
    rows = traces(tmp_path)[1]
    assert len({row[0] for row in rows}) == 24, "24 different samples"
    assert len({row[3] for row in rows}) == 24, "24 different noises"
    steps = traces(tmp_path)
    assert {row[2] for step in steps.values() for row in step} == set(range(11)), "every label, and the null label"


def test_killed_on_two_ranks_and_resumed_on_three_and_one_at_other_stages(data_dir, tmp_path, one_rank):
    """Saved at any stage on any number of ranks, loaded at any other: nothing is lost and the run goes on."""

    def on(ranks, stage, *more):
        return tiny_config(
            data_dir, tmp_path, f"zero.stage={stage}", f"launch.processes_per_node={ranks}", "train.micro_batch_size=4",
            *more,
        )  # fmt: skip

    with pytest.raises(AssertionError, match="-9"):
        run_ranks(train_job, 2, on(2, 2), "kill all ranks as the checkpoint of step 10 is committed")
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000005"], "half a save is no save"
    assert run_ranks(train_job, 3, on(3, 3, "train.steps=7")) == ["complete"] * 3
    before = saved_state(tmp_path, 7)
    assert run_ranks(train_job, 1, on(1, 0, "train.steps=7")) == ["complete"]
    assert same_tensors(saved_state(tmp_path, 7), before)
    assert run_ranks(train_job, 1, on(1, 0)) == ["complete"]
    assert_same_run(tmp_path, one_rank)


def test_a_signal_to_one_rank_saves_and_stops_all(data_dir, tmp_path):
    config = tiny_config(data_dir, tmp_path)
    assert run_ranks(train_job, 2, config, "SIGTERM to one rank in step 7") == ["stopped"] * 2
    assert (tmp_path / "checkpoints/step-00000007/manifest.json").exists()
    assert run_ranks(train_job, 2, config) == ["complete"] * 2
    assert list(losses(tmp_path)) == list(range(1, 11))
