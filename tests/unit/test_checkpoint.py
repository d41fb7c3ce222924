"""Checkpoints: whole or not there, the newest whole one chosen, never a silent fresh start."""

import json
import threading
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from uvit_dist import checkpoint, dist, faults, saving, score_log
from uvit_dist.config import CheckpointConfig
from uvit_dist.dist import Ranks
from uvit_dist.errors import CheckpointError, ConfigError, MissingInputError, OutputError
from uvit_dist.export_weights import export_weights
from uvit_dist.models.uvit import UViT
from uvit_dist.safetensors_stream import write_flat
from uvit_dist.saving import Saver, save_now

ALONE = Ranks()


@pytest.fixture(autouse=True)
def process_group():
    dist.start(ALONE, 10)
    yield
    dist.stop()


NETWORK = {"img_size": 8, "patch_size": 2, "in_chans": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture
def fault(monkeypatch):
    """Asks for a fault; times are counted from then on."""

    def ask(text):
        monkeypatch.setenv("UVIT_FAULT", text)
        monkeypatch.setattr(faults, "_reached", Counter())

    return ask


def save(run_dir, step, keep=2, config=None, **more):
    torch.manual_seed(step)
    net = UViT(**NETWORK)
    state = {}
    for name, value in net.state_dict().items():
        cut = value.numel() // 3  # in two pieces, as two ranks would hold it
        for kind in ("master", "ema"):
            state[f"{kind}/{name}/0"] = value.flatten()[:cut].clone()
            state[f"{kind}/{name}/{cut}"] = value.flatten()[cut:].clone()
    manifest = {
        "step": step,
        "shapes": {k: list(v.shape) for k, v in net.state_dict().items()},
        "config": {"model": NETWORK},
    }
    save_now(str(run_dir), config or CheckpointConfig(every=1, keep=keep), ALONE, state, {**manifest, **more})
    return net


def steps(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_what_is_saved_is_read_in_any_cut(tmp_path):
    net = save(tmp_path, 5)
    reader = checkpoint.CheckpointReader(checkpoint.newest_whole(str(tmp_path), "hash"))
    full = reader.full("ema")
    assert all(torch.equal(full[name], value) for name, value in net.state_dict().items())
    flat = net.pos_embed.flatten()
    for first, numel in ((0, 1), (3, 200), (len(flat) - 2, 2)):
        assert torch.equal(reader.read("master", "pos_embed", first, numel), flat[first : first + numel])
    with pytest.raises(CheckpointError, match="master of pos_embed lacks elements"):
        reader.read("master", "pos_embed", len(flat) - 1, 2)


def saved_by(run_dir, world_size, numel=1000):
    """A checkpoint of two tensors that lie one after the other in the ranks' files, as ZeRO-1 cuts them."""
    values = {"a": torch.arange(numel, dtype=torch.float32), "b": -torch.arange(2 * numel, dtype=torch.float32)}
    directory, flat, records = checkpoint.temporary(run_dir, 5), torch.cat([*values.values()]), []
    directory.mkdir(parents=True)
    bounds = [round(rank * len(flat) / world_size) for rank in range(world_size + 1)]
    for rank, (first, last) in enumerate(pairwise(bounds)):
        layout = [(f"master/a/{first}", min(last, numel) - first)] if first < numel else []
        if last > numel:
            start = max(first, numel)
            layout.append((f"master/b/{start - numel}", last - start))
        path = directory / f"rank-{rank:05d}.safetensors"
        records.append(checkpoint.FileRecord(path.name, *write_flat(path, layout, flat[first:last])))
    shapes = {name: [len(value)] for name, value in values.items()}
    return checkpoint.commit(run_dir, {"step": 5, "world_size": world_size, "shapes": shapes}, records), flat


@pytest.mark.parametrize(("readers", "most"), [(12, 1), (24, 1), (6, 2), (5, 4), (1, 12)])
def test_a_rank_opens_only_the_files_that_its_part_is_in(tmp_path, readers, most):
    """12 ranks have saved: on as many each opens its own file; else those around its place."""
    path, flat = saved_by(tmp_path, 12)
    for rank in range(readers):
        reader = checkpoint.open_on_all(path, Ranks(rank=rank, world_size=readers))
        first, last = (round(edge * len(flat) / readers) for edge in (rank, rank + 1))
        got = [reader.read("master", "a", first, min(last, 1000) - first)] if first < 1000 else []
        if last > 1000:
            start = max(first, 1000)
            got.append(reader.read("master", "b", start - 1000, last - start))
        assert torch.equal(torch.cat(got), flat[first:last])
        assert len(reader.opened) <= most


def test_what_lies_far_from_a_ranks_place_is_found(tmp_path):
    path, flat = saved_by(tmp_path, 12)
    reader = checkpoint.CheckpointReader(path, place=0.0)
    assert torch.equal(reader.full("master")["b"], flat[1000:])


def test_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 100):
        save(tmp_path, step, keep=2)
    assert steps(tmp_path) == ["step-00000015", "step-00000100"]
    assert checkpoint.newest_whole(str(tmp_path)).name == "step-00000100"


def test_the_best_by_their_scores_are_kept(tmp_path):
    def scored(step, fid):
        told = {"step": step, "fid": fid, "samples": 100, "weights": "ema", "of_run": True}
        score_log.append_line(score_log.path_of(tmp_path), told)

    rules = CheckpointConfig(every=1, keep=2, keep_best_scores=1)
    for step in (10, 20, 30):
        save(tmp_path, step, config=rules)
        if step == 10:
            scored(10, 3.0)
    assert steps(tmp_path) == ["step-00000010", "step-00000020", "step-00000030"]
    scored(20, 2.0)
    scored(30, 2.5)
    for step in (40, 50):
        save(tmp_path, step, config=rules)
    assert steps(tmp_path) == ["step-00000020", "step-00000040", "step-00000050"]


def damage(path, how):
    file = path / "rank-00000.safetensors"
    if how == "flipped":
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
    elif how == "no file":
        file.unlink()
    elif how == "no manifest":
        (path / "manifest.json").unlink()
    elif how == "bad manifest":
        (path / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "verify", "reason"),
    [
        ("truncated", "size", "bytes, the manifest says"),
        ("no file", "size", r"rank-00000\.safetensors is missing"),
        ("no manifest", "size", r"manifest\.json is missing"),
        ("bad manifest", "size", "the manifest cannot be read"),
        ("flipped", "hash", "differs from its hash"),
    ],
)
def test_damage_is_noticed_and_the_one_before_is_taken(tmp_path, how, verify, reason):
    save(tmp_path, 5)
    save(tmp_path, 10)
    damage(tmp_path / "checkpoints/step-00000010", how)
    assert checkpoint.newest_whole(str(tmp_path), verify).name == "step-00000005"
    damage(tmp_path / "checkpoints/step-00000005", how)
    with pytest.raises(CheckpointError, match=rf"2 checkpoint\(s\), none of them whole:(\n.*)*{reason}"):
        checkpoint.newest_whole(str(tmp_path), verify)
    assert steps(tmp_path) == ["step-00000005", "step-00000010"], "nothing is deleted"
    save(tmp_path, 10)
    assert checkpoint.newest_whole(str(tmp_path), verify).name == "step-00000010"


def test_a_run_that_goes_on_from_an_earlier_one_never_loses_it(tmp_path):
    for step in (5, 8, 10):
        save(tmp_path, step, keep=3)
    for step in (8, 10):
        damage(tmp_path / f"checkpoints/step-{step:08d}", "flipped")
    chosen = checkpoint.newest_whole(str(tmp_path), "hash")
    assert chosen.name == "step-00000005"
    checkpoint.set_aside_newer(chosen)
    for step, kept in ((6, [5, 6]), (7, [6, 7]), (8, [7, 8])):
        save(tmp_path, step, keep=2)
        assert [name for name in steps(tmp_path) if name.startswith("step")] == [f"step-{k:08d}" for k in kept]
        assert checkpoint.newest_whole(str(tmp_path), "hash").name == f"step-{step:08d}"
    assert [name for name in steps(tmp_path) if name.startswith("damaged")] == [
        "damaged-step-00000008-0", "damaged-step-00000010-0"
    ]  # fmt: skip
    for name in ("step-00000007", "step-00000008"):
        (tmp_path / "checkpoints" / name).rename(tmp_path / name)
    with pytest.raises(CheckpointError, match="set aside earlier"):
        checkpoint.newest_whole(str(tmp_path), "hash")


def test_a_damaged_header_is_explained_even_if_only_sizes_are_checked(tmp_path):
    save(tmp_path, 5)
    file = tmp_path / "checkpoints/step-00000005/rank-00000.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    path = checkpoint.newest_whole(str(tmp_path), "size")
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors cannot be read"):
        checkpoint.CheckpointReader(path)


def test_a_run_that_never_saved_starts_anew(tmp_path):
    assert checkpoint.newest_whole(str(tmp_path)) is None
    (tmp_path / "checkpoints/.tmp-step-00000005").mkdir(parents=True)
    assert checkpoint.newest_whole(str(tmp_path)) is None, "a save that never ended was never a checkpoint"
    checkpoint.clean(tmp_path)
    save(tmp_path, 5)
    assert steps(tmp_path) == ["step-00000005"]


@pytest.mark.parametrize("point", ["prepared", "block", "flushed", "written", "after_manifest", "before_rename"])
def test_a_full_disk_leaves_the_last_checkpoint_as_it_was(tmp_path, fault, point):
    save(tmp_path, 5)
    before = {p.name: p.read_bytes() for p in (tmp_path / "checkpoints/step-00000005").iterdir()}
    fault(f"nospace@all,save:{point}")
    with pytest.raises(OutputError, match=r"the checkpoint of step 10 cannot be written: .*No space left on device"):
        save(tmp_path, 10)
    assert checkpoint.newest_whole(str(tmp_path), "hash").name == "step-00000005"
    assert steps(tmp_path) == ["step-00000005"], "nothing of the failed one is left"
    assert {p.name: p.read_bytes() for p in (tmp_path / "checkpoints/step-00000005").iterdir()} == before
    save(tmp_path, 15)
    assert steps(tmp_path) == ["step-00000005", "step-00000015"]


def test_room_is_looked_for_before_any_of_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match=r"0 MB are needed, 0 MB are free"):
        save(tmp_path, 10)
    assert steps(tmp_path) == []


def test_a_fault_that_cannot_be_read_is_explained(tmp_path, fault):
    fault("sigkill@1,save:begin")
    with pytest.raises(ConfigError, match="UVIT_FAULT=sigkill@1,save:begin: not ACTION@rankN,POINT, as sigkill@rank1"):
        save(tmp_path, 10)


def test_every_kth_and_the_best_are_kept_beside_the_newest(tmp_path):
    config = CheckpointConfig(every=1, keep=2, keep_every=20, keep_best=2)
    losses = {5: 0.5, 10: 0.1, 15: 0.4, 20: 0.3, 25: 0.2, 30: 0.9, 35: None, 40: 0.8, 45: 0.7, 50: 0.6}
    for step, loss in losses.items():
        save(tmp_path, step, config=config, **({} if loss is None else {"validation_loss": loss}))
    assert steps(tmp_path) == [f"step-{step:08d}" for step in (10, 20, 25, 40, 45, 50)]


def state_of(value, numel=100_000):
    return {"master/w/0": torch.full((numel,), value), "ema/w/0": torch.full((numel,), -value)}


def test_what_is_saved_is_the_state_at_begin_whatever_training_does_to_it_then(tmp_path, monkeypatch):
    go_on, written = threading.Event(), []

    def slow(path, parts, flat):
        go_on.wait(10)
        written.append(path)
        return write_flat(path, parts, flat)

    monkeypatch.setattr(saving, "write_flat", slow)
    saver = Saver(str(tmp_path), CheckpointConfig(every=1), ALONE)
    manifest = {"shapes": {"w": [100_000]}, "config": {}}
    state = state_of(1.0)
    saver.begin(state, {**manifest, "step": 1})
    state["master/w/0"].fill_(7.0)
    assert saver.busy
    saver.after_step(any_busy=True)
    assert checkpoint.newest_whole(str(tmp_path)) is None
    go_on.set()
    saver.begin(state_of(2.0), {**manifest, "step": 2})
    assert checkpoint.newest_whole(str(tmp_path), "hash").name == "step-00000001", "the first was waited for"
    saver.finish()
    saver.close()
    for step, value in ((1, 1.0), (2, 2.0)):
        reader = checkpoint.CheckpointReader(tmp_path / f"checkpoints/step-{step:08d}")
        assert torch.equal(reader.full("master")["w"], torch.full((100_000,), value))
        assert torch.equal(reader.full("ema")["w"], torch.full((100_000,), -value))


def test_failures_are_told_and_borne_so_many_times(tmp_path, fault):
    saver = Saver(str(tmp_path), CheckpointConfig(every=1, most_failures=2), ALONE)
    manifest = {"shapes": {"w": [100_000]}, "config": {}}

    def save_step(step):
        saver.begin(state_of(1.0), {**manifest, "step": step})
        saver.finish()

    fault("nospace@all,save:block#1;nospace@all,save:after_manifest#1;nospace@all,save:block#9")
    save_step(1)
    assert (saver.failures, saver.saved) == (1, -1)
    save_step(2)
    assert saver.failures == 2
    save_step(3)
    assert (saver.failures, saver.saved) == (0, 3)
    fault(";".join(f"nospace@all,save:prepared#{n}" for n in (1, 2, 3)))
    save_step(4)
    save_step(5)
    with pytest.raises(OutputError, match="the checkpoint of step 6 cannot be written"):
        save_step(6)
    assert checkpoint.newest_whole(str(tmp_path), "hash").name == "step-00000003"
    saver.close()


def test_exported_weights_load_without_the_run(tmp_path):
    net = save(tmp_path, 5)
    assert export_weights(str(tmp_path), tmp_path / "ema.safetensors", "ema") == 5
    loaded = UViT.from_file(tmp_path / "ema.safetensors")
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 900.0])
    assert torch.equal(loaded(x, t), net.eval()(x, t))
    with pytest.raises(MissingInputError, match="holds no checkpoint; train first"):
        export_weights(str(tmp_path / "none"), tmp_path / "x", "ema")


def test_a_run_whose_last_save_fails_does_not_end_well_though_it_waits_for_each(tmp_path, fault):
    saver = Saver(str(tmp_path), CheckpointConfig(every=1, background=False, most_failures=3), ALONE)
    fault("nospace@all,save:block")
    saver.begin(state_of(1.0), {"shapes": {"w": [100_000]}, "config": {}, "step": 1})
    with pytest.raises(OutputError, match="the checkpoint of step 1 cannot be written"):
        saver.finish(must_succeed=True)
    saver.close()


def test_a_bit_flipped_anywhere_in_a_manifest_is_noticed(tmp_path):
    save(tmp_path, 5)
    directory = tmp_path / "checkpoints/step-00000005"
    whole = (directory / "manifest.json").read_bytes()
    assert checkpoint.defect(directory, "hash") is None
    for place in range(0, len(whole), 3):
        data = bytearray(whole)
        data[place] ^= 1 << (place % 8)
        (directory / "manifest.json").write_bytes(data)
        try:
            same = checkpoint.unsealed(bytes(data)) == checkpoint.unsealed(whole)
        except (ValueError, KeyError, TypeError):
            same = False
        assert same or checkpoint.defect(directory, "hash") is not None, (place, bytes(data[place - 9 : place + 9]))


def test_a_file_that_the_committing_rank_does_not_see_is_no_commit(tmp_path, monkeypatch):
    def elsewhere(path, parts, flat):
        record = write_flat(path, parts, flat)
        path.unlink()
        return record

    monkeypatch.setattr(saving, "write_flat", elsewhere)
    with pytest.raises(OutputError, match="run_dir must be where all ranks see the same"):
        save(tmp_path, 5)


def test_the_manifest_says_what_is_there(tmp_path):
    save(tmp_path, 5)
    manifest = json.loads((tmp_path / "checkpoints/step-00000005/manifest.json").read_text())
    assert (manifest["step"], manifest["world_size"], manifest["version"]) == (5, 1, checkpoint.VERSION)
    (file,) = manifest["files"]
    assert file["size"] == (tmp_path / "checkpoints/step-00000005" / file["name"]).stat().st_size
