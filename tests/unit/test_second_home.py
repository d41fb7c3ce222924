"""Checkpoints in a second place: whole there or not committed, whole here or not taken, and never in training's way."""

import logging
import threading
import uuid

import pytest
import torch
import xxhash

from uvit_dist import checkpoint, second_home, storage
from uvit_dist.copier import Copier
from uvit_dist.errors import CheckpointError, OutputError, UnavailableError
from uvit_dist.safetensors_stream import write_flat

RANKS = 3


@pytest.fixture(params=["folder", "memory URL"])
def home(request, tmp_path):
    return str(tmp_path / "home") if request.param == "folder" else f"memory://{uuid.uuid4().hex}/home"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(second_home, "PAUSE_S", 0.0)


def make(run_dir, step, ranks=RANKS, seed=0):
    """A committed checkpoint of several ranks."""
    directory = checkpoint.checkpoints_dir(run_dir) / f"step-{step:08d}"
    directory.mkdir(parents=True)
    torch.manual_seed(step + seed)
    files = []
    for rank in range(ranks):
        name = f"rank-{rank:05d}.safetensors"
        size, xxh3 = write_flat(directory / name, [(f"ema/w/{1000 * rank}", 1000)], torch.randn(1000))
        files.append({"name": name, "size": size, "xxh3": xxh3})
    manifest = {
        "version": checkpoint.VERSION,
        "step": step,
        "shapes": {"w": [1000 * ranks]},
        "config": {},
        "files": files,
    }
    (directory / "manifest.json").write_bytes(checkpoint.sealed(manifest))
    assert checkpoint.defect(directory, "hash") is None
    return directory


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def at(home, step, name="manifest.json"):
    return storage.join(home, f"step-{step:08d}", name)


def test_what_is_copied_out_comes_back_byte_for_byte(home, tmp_path):
    assert second_home.bring_back(home, tmp_path / "b") is None
    for step in (5, 10):
        second_home.copy_out(make(tmp_path / "a", step), home)
    assert second_home.names_at(home) == ["step-00000010", "step-00000005"]
    assert second_home.newest_at(home, "hash") == "step-00000010"
    leftover = tmp_path / "b/checkpoints/.tmp-step-00000010"
    leftover.mkdir(parents=True)
    (leftover / "junk").write_text("of a fetch that was killed")
    brought = second_home.bring_back(home, tmp_path / "b", "hash")
    assert brought == tmp_path / "b/checkpoints/step-00000010"
    assert content(brought) == content(tmp_path / "a/checkpoints/step-00000010")
    assert checkpoint.newest_whole(str(tmp_path / "b"), "hash") == brought
    early = second_home.fetch(home, "step-00000005", tmp_path / "b")
    assert content(early) == content(tmp_path / "a/checkpoints/step-00000005")
    assert sorted(path.name for path in early.parent.iterdir()) == ["step-00000005", "step-00000010"]


def test_one_that_is_there_is_not_copied_again_but_another_of_its_step_is(home, tmp_path, monkeypatch):
    directory = make(tmp_path / "a", 5, ranks=4)
    second_home.copy_out(directory, home)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "upload", lambda *_: pytest.fail("copied again"))
        second_home.copy_out(directory, home)
    storage.remove(at(home, 5, "rank-00001.safetensors"))
    second_home.copy_out(directory, home)
    other = make(tmp_path / "b", 5, ranks=2, seed=1)
    second_home.copy_out(other, home)
    assert content(second_home.bring_back(home, tmp_path / "c")) == content(other)
    assert len(storage.sizes_in(storage.parent(at(home, 5)))) == 3, "the files of more ranks are gone"


@pytest.mark.parametrize("after", [0, 2, RANKS])
def test_a_copy_that_was_killed_is_not_committed_and_is_overwritten(home, tmp_path, monkeypatch, after):
    second_home.copy_out(make(tmp_path / "a", 5), home)
    newer = make(tmp_path / "a", 10)
    upload, write_bytes, done = storage.upload, storage.write_bytes, []

    def killed(local, url):
        if len(done) >= after:
            raise KeyboardInterrupt
        upload(local, url)
        done.append(url)

    def killed_at_the_end(url, data):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(second_home, "AT_ONCE", 1)
        patch.setattr(storage, "upload", killed)
        patch.setattr(storage, "write_bytes", killed_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            second_home.copy_out(newer, home)
    assert len(done) == after
    assert second_home.newest_at(home) == "step-00000005"
    if after:
        write_bytes(at(home, 10, "rank-00000.safetensors"), b"half")
        write_bytes(at(home, 10, "rank-00007.safetensors"), b"of more ranks")
    second_home.copy_out(newer, home)
    assert content(second_home.bring_back(home, tmp_path / "b", "hash")) == content(newer)
    assert len(storage.sizes_in(storage.parent(at(home, 10)))) == RANKS + 1


def damage(home, step, how):
    file, manifest = at(home, step, "rank-00001.safetensors"), at(home, step)
    data, told = bytearray(storage.read_bytes(file)), checkpoint.unsealed(storage.read_bytes(manifest))
    if how == "flipped":
        data[-5] ^= 1
        storage.write_bytes(file, bytes(data))
    elif how == "truncated":
        storage.write_bytes(file, bytes(data[:-7]))
    elif how == "no file":
        storage.remove(file)
    elif how == "bad manifest":
        storage.write_bytes(manifest, b"{")
    elif how == "other step":
        storage.write_bytes(manifest, checkpoint.sealed({**told, "step": 7}))
    elif how == "other version":
        storage.write_bytes(manifest, checkpoint.sealed({**told, "version": 1}))
    elif how == "leads elsewhere":
        told["files"][0]["name"] = "../elsewhere"
        storage.write_bytes(manifest, checkpoint.sealed(told))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("flipped", r"rank-00001\.safetensors differs from its hash in the manifest"),
        ("truncated", r"rank-00001\.safetensors has \d+ bytes, the manifest says"),
        ("no file", r"rank-00001\.safetensors is missing"),
        ("bad manifest", "the manifest cannot be read"),
        ("other step", "it is of step 7"),
        ("other version", "version 1 of the format"),
        ("leads elsewhere", "name leads elsewhere"),
    ],
)
def test_damage_at_home_is_named_and_the_one_before_is_taken(home, tmp_path, how, reason, caplog):
    directories = {step: make(tmp_path / "a", step) for step in (5, 10)}
    for directory in directories.values():
        second_home.copy_out(directory, home)
    damage(home, 10, how)
    assert second_home.newest_at(home, "hash") == "step-00000005"
    assert (second_home.newest_at(home, "size") == "step-00000010") == (how == "flipped")
    with pytest.raises(CheckpointError, match=rf"step-00000010: .*{reason}.*; use the one before it, or copy"):
        second_home.fetch(home, "step-00000010", tmp_path / "b")
    brought = second_home.bring_back(home, tmp_path / "b")
    assert content(brought) == content(directories[5])
    assert [path.name for path in brought.parent.iterdir()] == ["step-00000005"], "nothing half is left"
    assert any("step-00000010" in line for line in caplog.messages)
    damage(home, 5, how)
    with pytest.raises(CheckpointError, match=rf"2 checkpoint\(s\), none of them whole:(\n.*)*{reason}"):
        second_home.bring_back(home, tmp_path / "c")


def test_a_local_one_of_the_same_step_is_set_aside(home, tmp_path):
    directory = make(tmp_path, 5)
    second_home.copy_out(directory, home)
    before = content(directory)
    (directory / "rank-00000.safetensors").write_bytes(b"damaged")
    assert content(second_home.bring_back(home, tmp_path)) == before
    assert (directory.parent / "damaged-step-00000005-0/rank-00000.safetensors").read_bytes() == b"damaged"


def test_a_reading_that_is_wrong_is_read_again_before_it_is_called_damaged(home, tmp_path, monkeypatch):
    directory, read_range, faults = make(tmp_path / "a", 5), storage.files.read_range, {}

    def unsteady(path, offset, length, cache_as=None):
        data = read_range(path, offset, length, cache_as)
        number = faults[path] = faults.get(path, 0) + 1
        if not path.startswith(home):
            return data
        if number == 1:
            return bytes([data[0] ^ 1, *data[1:]])
        if number == 2:
            raise second_home.NoSuchFileError("it is said not to be there")
        return data

    monkeypatch.setattr(storage.files, "read_range", unsteady)
    second_home.copy_out(directory, home)
    faults.clear()
    assert content(second_home.bring_back(home, tmp_path / "b")) == content(directory)


def test_flips_in_any_part_of_any_reading_are_mended_part_by_part(home, tmp_path, monkeypatch):
    directory, read_range, readings = make(tmp_path / "a", 5), storage.files.read_range, {}

    def unsteady(path, offset, length, cache_as=None):
        data = read_range(path, offset, length, cache_as)
        number = readings[path, offset] = readings.get((path, offset), -1) + 1
        wrong = every == 1 or (offset // 64 + number) % every == 0
        return bytes([data[0] ^ (1 + number), *data[1:]]) if path.endswith("1.safetensors") and wrong else data

    second_home.copy_out(directory, home)
    monkeypatch.setattr(storage.files, "PART", 64)
    monkeypatch.setattr(storage.files, "read_range", unsteady)
    every = 3
    assert content(second_home.bring_back(home, tmp_path / "b")) == content(directory)
    every = 1
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors cannot be read to its byte \d+"):
        second_home.fetch(home, "step-00000005", tmp_path / "c")


def test_a_damaged_one_is_not_copied_and_a_storage_that_changes_bytes_is_told(home, tmp_path, monkeypatch):
    directory = make(tmp_path / "a", 5)
    upload = storage.upload

    def changes(local, url):
        upload(local, url)
        data = storage.read_bytes(url)
        storage.write_bytes(url, bytes([data[0] ^ 1, *data[1:]]))

    with monkeypatch.context() as patch:
        patch.setattr(storage, "upload", changes)
        with pytest.raises(OutputError, match=r"differs from its hash in the manifest after 2 uploads; see to the"):
            second_home.copy_out(directory, home)
    file = directory / "rank-00002.safetensors"
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(CheckpointError, match=r"step-00000005: rank-00002\.safetensors differs .* is not copied"):
        second_home.copy_out(directory, home)
    assert second_home.names_at(home) == []


def test_a_server_that_does_not_answer_is_no_reason_to_take_an_older_one(home, tmp_path, monkeypatch):
    for step in (5, 10):
        second_home.copy_out(make(tmp_path / "a", step), home)

    def down(*_, **__):
        raise UnavailableError("nothing came")

    monkeypatch.setattr(storage, "stream", down)
    with pytest.raises(UnavailableError):
        second_home.bring_back(home, tmp_path / "b")
    assert list((tmp_path / "b/checkpoints").iterdir()) == []


def test_retention_deletes_the_manifest_first(home, tmp_path, monkeypatch):
    for step in (5, 10, 15):
        second_home.copy_out(make(tmp_path / "a", step), home)
    storage.write_bytes(storage.join(home, "notes.txt"), b"of the user")
    storage.remove(at(home, 5))
    removed, remove = [], storage.remove

    def killed(path):
        if len(removed) == 3:
            raise KeyboardInterrupt
        removed.append(path)
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(second_home, "AT_ONCE", 1)
        patch.setattr(storage, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            second_home.retain(home, {"step-00000015"})
    assert removed[0] == at(home, 10)
    assert second_home.names_at(home) == ["step-00000015"]
    second_home.retain(home, {"step-00000015"})
    names = {path.split("/")[0] for path in storage.tree(home)}
    assert names == {"notes.txt", "step-00000015"}
    assert second_home.newest_at(home, "hash") == "step-00000015"


@pytest.fixture
def held_copies(monkeypatch):
    """Copies wait until they are let go; the names of those begun."""
    begun, go, started, copy_out = [], threading.Event(), threading.Event(), second_home.copy_out

    def held(directory, home):
        begun.append(directory.name)
        started.set()
        assert go.wait(20)
        copy_out(directory, home)

    monkeypatch.setattr(second_home, "copy_out", held)
    return begun, started, go


def test_of_those_that_wait_the_newest_is_copied(home, tmp_path, held_copies, caplog):
    caplog.set_level(logging.INFO)
    begun, started, go = held_copies
    copier = Copier(home, lambda names: names[:1])
    for step in (5, 10, 15, 20):
        copier.submit(make(tmp_path, step))
        assert started.wait(20)
    go.set()
    assert copier.close()
    assert begun == ["step-00000005", "step-00000020"]
    assert copier.last_error is None
    assert second_home.names_at(home) == ["step-00000020"], "those before are deleted as chosen"
    assert sum("not copied to" in line and "is newer" in line for line in caplog.messages) == 2


def test_what_waits_is_dropped_where_the_end_does_not_wait(home, tmp_path, held_copies):
    begun, started, go = held_copies
    copier = Copier(home)
    copier.submit(make(tmp_path, 5))
    assert started.wait(20)
    copier.submit(make(tmp_path, 10))
    assert not copier.close(wait=False)
    assert not copier.close(timeout_s=0.01)
    go.set()
    assert copier.close()
    assert begun == ["step-00000005"]


def test_one_that_retention_deletes_meanwhile_is_dropped_without_an_error(home, tmp_path, held_copies, caplog):
    caplog.set_level(logging.INFO)
    _, started, go = held_copies
    copier = Copier(home)
    directory = make(tmp_path, 5)
    copier.submit(directory)
    assert started.wait(20)
    storage.remove_tree(directory)
    go.set()
    assert copier.close()
    assert copier.last_error is None
    assert any("deleted here while it was copied" in line for line in caplog.messages)
    assert second_home.names_at(home) == []


def test_one_that_is_deleted_between_its_files_is_dropped(home, tmp_path, monkeypatch):
    directory, upload = make(tmp_path, 5), storage.upload

    def deletes(local, url):
        upload(local, url)
        storage.remove_tree(directory)

    monkeypatch.setattr(second_home, "AT_ONCE", 1)
    monkeypatch.setattr(storage, "upload", deletes)
    copier = Copier(home)
    copier.submit(directory)
    assert copier.close()
    assert copier.last_error is None
    assert second_home.names_at(home) == []


def test_errors_are_kept_and_the_next_copy_is_tried(home, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OutputError("No space left on device")

    copier = Copier(home)
    directory = make(tmp_path, 5)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "upload", full)
        copier.submit(directory)
        while copier.last_error is None:
            threading.Event().wait(0.01)
    assert isinstance(copier.last_error, OutputError)
    assert any("No space left on device" in line for line in caplog.messages)
    copier.submit(directory)
    assert copier.close()
    assert copier.last_error is None
    assert second_home.newest_at(home, "hash") == "step-00000005"


def test_the_hash_is_the_one_that_checkpoints_have(tmp_path):
    file = make(tmp_path, 5) / "rank-00000.safetensors"
    record = checkpoint.FileRecord(file.name, file.stat().st_size, xxhash.xxh3_128_hexdigest(file.read_bytes()))
    assert second_home._read(str(file), record) is None
