"""Checkpoints that cannot be lost: killed at any moment of a save, damaged in any file, on a disk that is full."""

import os
import random
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from tests.integration.jobs import loaded_state, train_job
from tests.integration.s3_fixtures import BUCKET, credentials, s3_server  # noqa: F401 - fixtures
from tests.ranks import run_ranks
from tests.tiny import losses, same_tensors, saved_state, tiny_config, traces
from uvit_dist import checkpoint

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
POINTS = {
    "begin": 1, "copied": 0, "prepared": 1, "block": 0, "flushed": 1, "written": 0, "voted": 0, "after_manifest": 0,
    "before_rename": 0, "renamed": 0, "committed": 0, "retiring": 0,
}  # fmt: skip
"""Points of a save, in order → the rank that is killed there. From the vote on rank 0 alone works."""
DEATHS = int(os.environ.get("UVIT_DIST_SOAK", "10"))


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """ZeRO stage → the run directory of an uninterrupted training on two ranks."""
    made = {}

    def run(stage):
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp(f"stage-{stage}")
            config = tiny_config(data_dir, made[stage], f"zero.stage={stage}", "checkpoint.every=2")
            assert run_ranks(train_job, 2, config) == ["complete"] * 2
        return made[stage]

    return run


def assert_same(run_dir, whole):
    assert losses(run_dir) == losses(whole)
    assert traces(run_dir) == traces(whole)
    assert same_tensors(saved_state(run_dir, 10), saved_state(whole, 10))
    assert not list((run_dir / "checkpoints").glob(".tmp-*")), "nothing is left of dead attempts"


def asked(point):
    """The fault at a point of the third save, of step 6 (the second that retires another)."""
    time = {"block": 6, "retiring": 1}.get(point, 3)
    return f"sigkill@rank{POINTS[point]},save:{point}#{time}"


CASES = [(1, point) for point in POINTS] + [(s, p) for s in (0, 2, 3) for p in ("copied", "voted", "after_manifest")]
if "UVIT_DIST_SOAK" in os.environ:
    CASES = [(stage, point) for stage in (0, 1, 2, 3) for point in POINTS]


@pytest.mark.parametrize(("stage", "point"), CASES)
def test_killed_at_any_moment_of_a_save_it_goes_on_bit_for_bit(data_dir, tmp_path, monkeypatch, whole, stage, point):
    config = tiny_config(data_dir, tmp_path, f"zero.stage={stage}", "checkpoint.every=2")
    with monkeypatch.context() as patch:
        patch.setenv("UVIT_FAULT", asked(point))
        with pytest.raises(AssertionError, match="-9"):
            run_ranks(train_job, 2, config)
    assert checkpoint.newest_whole(str(tmp_path), "hash") is not None
    assert run_ranks(train_job, 2, config) == ["complete"] * 2
    assert_same(tmp_path, whole(stage))


def train_or_die(config, seconds):
    threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    return train_job(config)


def test_killed_at_random_times_it_goes_on_bit_for_bit(data_dir, tmp_path, whole):
    draw, died = random.Random(6), 0
    config = tiny_config(data_dir, tmp_path, "checkpoint.every=2")
    while died < DEATHS:
        try:
            run_ranks(train_or_die, 2, config, draw.uniform(0.5, 3.0))
        except AssertionError as error:
            assert "-9" in str(error)  # noqa: PT017 - not every run dies: the last ones may be through before
            died += 1
        else:
            assert_same(tmp_path, whole(1))
            shutil.rmtree(tmp_path)
            config = tiny_config(data_dir, tmp_path, "checkpoint.every=2")
    assert run_ranks(train_job, 2, config) == ["complete"] * 2
    assert_same(tmp_path, whole(1))


def in_full(states):
    """Kind/name → flat tensor, of what the ranks hold together, each element once."""
    pieces = {}
    for key, value in ((key, value) for state in states for key, value in state.items()):
        kind, name, start = key.split("/")
        pieces.setdefault(f"{kind}/{name}", []).append((int(start), value))
    out = {}
    for name, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        assert [start for start, _ in parts] == [sum(len(v) for _, v in parts[:n]) for n in range(len(parts))], name
        out[name] = torch.cat([value for _, value in parts])
    return out


def test_four_two_three_and_one_rank_at_several_stages_are_one_training(data_dir, tmp_path):
    def on(run, ranks, stage, steps):
        return tiny_config(data_dir, tmp_path / run, f"launch.processes_per_node={ranks}", f"zero.stage={stage}",
                           f"train.steps={steps}", "checkpoint.every=100", "train.micro_batch_size=6")  # fmt: skip

    assert run_ranks(train_job, 1, on("one", 1, 1, 12)) == ["complete"]
    before = None
    for ranks, stage, first, last in ((4, 1, 0, 3), (2, 3, 3, 6), (3, 2, 6, 9), (1, 0, 9, 12)):
        if before is not None:
            loaded = in_full(run_ranks(loaded_state, ranks, on("many", ranks, stage, last)))
            assert same_tensors(loaded, {name: value.flatten() for name, value in before.items()}), (
                ranks,
                stage,
                first,
            )
        assert run_ranks(train_job, ranks, on("many", ranks, stage, last)) == ["complete"] * ranks
        before = saved_state(tmp_path / "many", last)
    assert traces(tmp_path / "many") == traces(tmp_path / "one")
    ours, theirs = losses(tmp_path / "many"), losses(tmp_path / "one")
    assert ours.keys() == theirs.keys() == set(range(1, 13))
    assert max(abs(ours[step] - theirs[step]) / theirs[step] for step in theirs) <= 1e-5


@pytest.mark.parametrize("how", ["truncated", "flipped", "removed"])
def test_every_file_damaged_in_turn_is_noticed_before_any_weight_is_used(data_dir, tmp_path, whole, how):
    draw = random.Random(how)
    names = [path.name for path in (whole(1) / "checkpoints/step-00000010").iterdir()]
    assert len(names) == 3
    for name in names:
        run_dir = tmp_path / name
        shutil.copytree(whole(1) / "checkpoints", run_dir / "checkpoints")
        file = run_dir / "checkpoints/step-00000010" / name
        data = bytearray(file.read_bytes())
        if how == "truncated":
            file.write_bytes(data[: draw.randrange(len(data))])
        elif how == "flipped":
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            file.write_bytes(data)
        else:
            file.unlink()
        states = run_ranks(loaded_state, 2, tiny_config(data_dir, run_dir, "checkpoint.every=2"))
        before = {name: value.flatten() for name, value in saved_state(whole(1), 8).items()}
        assert same_tensors(in_full(states), before), "the one before it is used"
        (aside,) = (run_dir / "checkpoints").glob("damaged-*")
        assert (aside / "reason.txt").read_text().strip()


@pytest.mark.s3
def test_a_machine_that_never_saw_the_run_goes_on_from_its_second_home(
    data_dir,
    tmp_path,
    whole,
    s3_server,  # noqa: F811
    credentials,  # noqa: F811
):
    def on(run, *more):
        endpoint = f"storage.endpoint=http://127.0.0.1:{s3_server.port}"
        return tiny_config(data_dir, tmp_path / run, "checkpoint.every=2", f"checkpoint.copy_to=s3://{BUCKET}/home",
                           endpoint, "storage.region=us-east-1", *more)  # fmt: skip

    assert run_ranks(train_job, 2, on("here", "train.steps=6")) == ["complete"] * 2
    home = s3_server.client().ls(f"{BUCKET}/home")
    assert sorted(path.rsplit("/", 1)[1] for path in home)[-1] == "step-00000006"
    shutil.rmtree(tmp_path / "here")
    assert run_ranks(train_job, 2, on("elsewhere")) == ["complete"] * 2
    ours, theirs = losses(tmp_path / "elsewhere"), losses(whole(1))
    assert ours == {step: loss for step, loss in theirs.items() if step > 6}
    assert same_tensors(saved_state(tmp_path / "elsewhere", 10), saved_state(whole(1), 10))
    home = s3_server.client().ls(f"{BUCKET}/home")
    assert sorted(path.rsplit("/", 1)[1] for path in home) == ["step-00000008", "step-00000010"], "the newest two"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MB."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        told = f"mount: {done.stderr.strip()}; run as root on a machine that may mount"
        pytest.fail(told) if os.environ.get("CI") else pytest.skip(told)
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("told_before", [True, False])
def test_a_disk_that_fills_during_a_save_loses_nothing_and_training_goes_on(
    data_dir, small_disk, monkeypatch, caplog, told_before
):
    config = tiny_config(data_dir, small_disk / "run", "launch.processes_per_node=1", "train.micro_batch_size=24",
                         "model.embed_dim=160", "model.num_heads=4", "checkpoint.every=2", "train.steps=8",
                         "checkpoint.most_failures=1", "checkpoint.keep=2")  # fmt: skip
    if not told_before:  # another job takes the room that was there when it was looked for
        monkeypatch.setenv("UVIT_TEST_NO_LOOK", "1")
    (told,) = run_ranks(train_on_a_filling_disk, 1, config, str(small_disk))
    assert told.startswith("complete, after 1 failed save"), told
    assert sorted(path.name for path in (small_disk / "run/checkpoints").iterdir()) == [
        "step-00000006",
        "step-00000008",
    ]
    assert checkpoint.newest_whole(str(small_disk / "run"), "hash").name == "step-00000008"
    assert list(losses(small_disk / "run")) == list(range(1, 9))


def train_on_a_filling_disk(config, place):
    """Fills the disk as the save of step 4 begins, but for a little; makes room again when that has failed."""
    from uvit_dist import saving

    begin, failed, filler = saving.Saver.begin, saving.Saver._failed, Path(place, "filler")
    count = []
    if "UVIT_TEST_NO_LOOK" in os.environ:
        saving._require_space = lambda directory, needed: None

    def fill(self, state, manifest):
        if manifest["step"] == 4:
            with open(filler, "wb") as file:
                free = shutil.disk_usage(place).free
                file.write(bytes(max(0, free - (4 << 20))))
        begin(self, state, manifest)

    def make_room(self, why):
        assert "No space left" in why or "are needed" in why, why
        count.append(why)
        assert checkpoint.newest_whole(config.run_dir, "hash").name == "step-00000002", "the last one lives"
        filler.unlink(missing_ok=True)
        failed(self, why)

    saving.Saver.begin, saving.Saver._failed = fill, make_room
    return f"{train_job(config)}, after {len(count)} failed save"
