"""Tools for whole sets of shards: what is damaged is named, what is copied is whole, what is shuffled is all there."""

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import data_tools.copy_shards
import data_tools.index_shards
import data_tools.reshuffle
import data_tools.verify_shards
from data_tools.copy_shards import copy
from data_tools.reshuffle import reshuffle
from data_tools.shard_set import TarSamples
from data_tools.verify_shards import extra_tars, how_to_make, verify
from uvit_dist import storage
from uvit_dist.data.latents import Provenance, Sample, TextProvenance, encode_array
from uvit_dist.data.shards import EMPTY_CONTEXT, read_index, write_index, write_shard
from uvit_dist.errors import ConfigError, DataError, OutputError

SHAPE = (8, 4, 4)
CLASSES = 5
IMAGES = 60


def provenance(**changes):
    values = dict(kind="moments", dtype="float16", shape=SHAPE, source="made in a test", image_size=32, crop="none",
                  mirror=True, classes=CLASSES, samples=2 * IMAGES, class_counts=(2 * IMAGES // CLASSES,) * CLASSES,
                  autoencoder="ae", encoder_fingerprint="f" * 64, scale_factor=0.5)  # fmt: skip
    return Provenance(**{**values, **changes})


def moments_of(i, shape=SHAPE):
    return np.random.default_rng(i).standard_normal(shape).astype(np.float16)


def context_of(i):
    return np.random.default_rng([i, 1]).standard_normal((1 + i % 3, 3, 2)).astype(np.float16)


def make_set(directory, text=False, per_shard=25):
    """Sorted by class, each original before its mirror image."""
    empty = encode_array(context_of(99)[0])[0]
    contexts = TextProvenance("t" * 64, "float16", (3, 2), hashlib.sha256(empty).hexdigest())
    made = provenance(text=contexts if text else None)
    samples = []
    for i in range(IMAGES):
        more = ([f"größer {i}.{k}" for k in range(1 + i % 3)], context_of(i)) if text else ()
        samples += [Sample(f"image-{i:03d}", i * CLASSES // IMAGES, moments_of(i), *more)]
        samples += [replace(samples[-1], key=f"image-{i:03d}_m", data=moments_of(1000 + i))]
    records = [
        write_shard(str(directory), f"latents-{n:06d}", samples[first : first + per_shard], made)
        for n, first in enumerate(range(0, len(samples), per_shard))
    ]
    if text:
        storage.write_bytes(storage.join(str(directory), EMPTY_CONTEXT), empty)
    write_index(storage.join(str(directory), "index.json"), records, made)
    return read_index(storage.join(str(directory), "index.json"))


@pytest.fixture
def index(tmp_path):
    return make_set(tmp_path / "set")


def run(monkeypatch, module, *arguments):
    """Run a command as from the command line. Returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    try:
        module.main()
    except SystemExit as end:
        return end.code or 0
    return 0


def tar_of(index, shard):
    return Path(index.shard_path(shard))


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


# verify_shards


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("where", ["local", "remote"])
def test_a_whole_set_is_called_whole(tmp_path, monkeypatch, capsys, text, where):
    directory = tmp_path / "set" if where == "local" else f"memory://{tmp_path.name}-{text}"
    index = make_set(directory, text)
    assert run(monkeypatch, data_tools.verify_shards, index.path, "--threads", 2) == 0
    assert f"{index.path}: whole: 120 samples in 5 shards, " in capsys.readouterr().out


def truncate(index):
    tar_of(index, 1).write_bytes(tar_of(index, 1).read_bytes()[: int(index.rows(1)["offset"][20]) + 7])


def flip_in_a_sample(index):
    for number in (7, 9):
        flip(tar_of(index, 1), int(index.rows(1)["offset"][number]) + 3)


def flip_between_samples(index):
    flip(tar_of(index, 1), 0)


def swap(index):
    one, two = tar_of(index, 1), tar_of(index, 2)
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)


def append(index):
    tar_of(index, 1).write_bytes(tar_of(index, 1).read_bytes() + b"more")


def delete_table(index):
    tar_of(index, 1).with_suffix(".rows.npy").unlink()


def damage_table(index):
    flip(tar_of(index, 1).with_suffix(".rows.npy"), -1)


DAMAGE = {
    truncate: ["bytes, the index says", "truncated; 5 of 25 samples damaged, the first is number 20 of this shard"],
    flip_in_a_sample: ["sha256 differs; 2 of 25 samples damaged, the first is number 7 of this shard (id 32)"],
    flip_between_samples: ["sha256 differs; all samples are whole: what differs lies around them"],
    swap: ["holds what latents-000002.tar should hold: swapped; 25 of 25 samples damaged",
           "holds what latents-000001.tar should hold: swapped"],
    append: ["something was added, or another file put there; all samples are whole"],
    delete_table: ["its table latents-000001.rows.npy is missing"],
    damage_table: ["its table is damaged (", "latents-000001.rows.npy: differs from what"],
    lambda index: tar_of(index, 1).unlink(): ["latents-000001.tar: missing"],
    lambda index: tar_of(index, 1).write_bytes(b""): ["0 bytes, the index says", "truncated; 25 of 25 samples damaged"],
}  # fmt: skip


@pytest.mark.parametrize(("harm", "said"), DAMAGE.items())
def test_every_kind_of_damage_is_named_in_a_line_for_each_shard(index, monkeypatch, capsys, harm, said):
    harm(index)
    damages = verify(index)
    assert [damage.shard for damage in damages] == ([1, 2] if harm is swap else [1])
    assert run(monkeypatch, data_tools.verify_shards, index.path) == 65
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(damage) for damage in damages]
    assert out.startswith(f"{index.shard_path(1)}: ")
    assert all(part in out for part in said)
    assert f"error: {index.path}: {len(damages)} of 5 shards damaged; " in err
    assert "--repair" in err


def test_damaged_contexts_count_as_damage_of_their_sample(tmp_path):
    index = make_set(tmp_path, text=True)
    flip(tar_of(index, 0), int(index.context_rows(0)["offset"][3]))
    (damage,) = verify(index)
    assert "1 of 25 samples damaged, the first is number 2 " in damage.problem, "captions: 1, 1, 2, ..."
    flip(tmp_path / EMPTY_CONTEXT, -1)
    assert str(verify(index)[0]) == f"{tmp_path}/{EMPTY_CONTEXT}: its sha256 differs"


def test_tars_that_the_index_does_not_name_are_a_warning(index, monkeypatch, capsys):
    storage.write_bytes(storage.join(storage.parent(index.path), "latents-000009.tar"), b"old")
    assert extra_tars(index) == ["latents-000009.tar"]
    assert run(monkeypatch, data_tools.verify_shards, index.path) == 0
    assert "warning: latents-000009.tar is not in" in capsys.readouterr().err


def test_repair_deletes_the_records_of_damaged_shards_and_says_what_to_type(index, monkeypatch, capsys):
    flip_in_a_sample(index)
    tar_of(index, 3).unlink()
    assert run(monkeypatch, data_tools.verify_shards, index.path, "--repair") == 65
    present = {path.name for path in Path(index.path).parent.glob("latents-*.json")}
    assert present == {f"latents-{n:06d}.json" for n in (0, 2, 4)}
    out, err = capsys.readouterr()
    assert "to be made again: latents-000001.tar, latents-000003.tar" in out
    assert f"python -m data_tools.precompute_latents --config YOUR_CONFIG.yaml data.index={index.path}" in err


def test_each_kind_of_set_has_its_command():
    text = TextProvenance("t", "float16", (3, 2), "e")
    assert "data_tools.pack_images " in how_to_make(provenance(kind="pixels"), "a/index.json")
    assert "data_tools.precompute_text " in how_to_make(provenance(text=text), "a/index.json")
    official = how_to_make(provenance(source="official features imagenet 12", text=text), "a/index.json")
    assert "data_tools.pack_latents --config YOUR_CONFIG.yaml --features DIR " in official
    assert "copy the damaged ones again" in how_to_make(provenance(source="webdataset set 12"), "a/index.json")


@pytest.mark.parametrize("options", [["--endpoint", "server:9000"], ["--anonymous", "--profile", "me"]])
def test_options_that_contradict_each_other_are_explained(index, monkeypatch, capsys, options):
    assert run(monkeypatch, data_tools.verify_shards, index.path, *options) == 78
    assert "correct --endpoint, --profile or --anonymous" in capsys.readouterr().err


def test_a_missing_index_is_explained(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, data_tools.verify_shards, tmp_path / "index.json") == 66
    assert "no such file" in capsys.readouterr().err


# copy_shards


def contents(directory):
    return {name: storage.read_bytes(storage.join(directory, name)) for name in storage.sizes_in(directory)}


@pytest.mark.parametrize("text", [False, True])
def test_a_set_goes_to_a_server_and_back_with_every_byte(tmp_path, monkeypatch, text):
    index = make_set(tmp_path / "set", text)
    url, back = f"memory://{tmp_path.name}-{text}-copy", str(tmp_path / "back")
    assert run(monkeypatch, data_tools.copy_shards, index.path, url, "--threads", 2) == 0
    assert run(monkeypatch, data_tools.copy_shards, f"{url}/index.json", back) == 0
    assert contents(back) == contents(url) == contents(str(tmp_path / "set"))


def test_a_copy_goes_on_where_it_stopped_and_its_index_comes_last(index, tmp_path, monkeypatch):
    target, written = str(tmp_path / "copy"), []
    atomic_write, write_bytes = storage.atomic_write, storage.write_bytes

    def failing(path):
        written.append(Path(path).name)
        if path.endswith(("latents-000003.tar", "latents-000004.tar")) and len(written) < 20:
            raise OutputError("No space left on device")
        return atomic_write(path)

    def noting(path, data):
        written.append(Path(path).name)
        write_bytes(path, data)

    monkeypatch.setattr(storage, "atomic_write", failing)
    monkeypatch.setattr(storage, "write_bytes", noting)
    with pytest.raises(OutputError, match="No space"):
        copy(index, target, threads=1)
    assert "index.json" not in contents(target)
    written[:] = ["again"] * 20
    copy(index, target, threads=1)
    tars = [name for name in written[20:] if name.endswith(".tar")]
    assert (tars, written[-1]) == (["latents-000003.tar", "latents-000004.tar"], "index.json")
    assert contents(target) == contents(storage.parent(index.path))


@pytest.mark.parametrize("harm", [truncate, flip_in_a_sample, flip_between_samples, delete_table, damage_table, append])
def test_a_damaged_source_is_named_and_not_copied(index, tmp_path, monkeypatch, capsys, harm):
    harm(index)
    assert run(monkeypatch, data_tools.copy_shards, index.path, tmp_path / "copy") == 65
    assert f"1 file(s) of {index.path} are damaged and were not copied:\n  {tar_of(index, 1)}: " in (
        capsys.readouterr().err
    )
    present = contents(str(tmp_path / "copy"))
    assert {name for name in present if name.endswith(".tar")} == {f"latents-{n:06d}.tar" for n in (0, 2, 3, 4)}
    assert not {"index.json", "latents-000001.json", "latents-000001.rows.npy"} & set(present)


def test_what_is_damaged_at_the_destination_is_copied_once_more(index, tmp_path):
    target = copy(index, str(tmp_path / "copy"))
    flip_in_a_sample(target)
    tar_of(target, 2).unlink()
    copy(index, str(tmp_path / "copy"))
    assert contents(str(tmp_path / "copy")) == contents(storage.parent(index.path))
    flip_in_a_sample(target)
    copy(index, str(tmp_path / "copy"), check=False)
    assert [damage.shard for damage in verify(target)] == [1]


def test_a_set_is_not_copied_over_another_or_itself(index, tmp_path):
    with pytest.raises(ConfigError, match=r"is where .*index\.json lies; give another directory"):
        copy(index, str(tmp_path / "else" / ".." / "set"))
    make_set(tmp_path / "other", per_shard=30)
    with pytest.raises(OutputError, match="is the index of another set"):
        copy(index, str(tmp_path / "other"))


# reshuffle


def all_samples(index):
    """Of each sample in the order of ids: key, label, data, captions, contexts."""
    found = []
    for shard, record in enumerate(index.shards):
        for raw in TarSamples(index.shard_path(shard), record.size, lambda amount: None):
            members = {extension: data for extension, (_, data) in raw.members.items()}
            found.append((raw.key, *(members.get(name) for name in ("cls", "npy", "json", "contexts.npy"))))
    return found


@pytest.mark.parametrize("text", [False, True])
def test_a_sorted_set_is_shuffled_with_each_sample_once(tmp_path, monkeypatch, text):
    index = make_set(tmp_path / "set", text)
    path = tmp_path / "new" / "index.json"
    assert run(monkeypatch, data_tools.reshuffle, index.path, path, "--samples-per-shard", 20, "--seed", 3) == 0
    new = read_index(str(path))
    assert new.provenance == index.provenance
    assert new.counts == (20,) * 6
    assert verify(new) == []
    before, after = all_samples(index), all_samples(new)
    assert sorted(before) == sorted(after)
    assert before != after
    assert all(key.endswith("_m") == (place >= 60) for place, (key, *_) in enumerate(after)), "mirror images apart"
    originals, mirrors = ([key.removesuffix("_m") for key, *_ in half] for half in (after[:60], after[60:]))
    assert originals != mirrors, "a permutation of their own"
    for shard in range(6):
        assert len(np.unique(new.rows(shard)["label"])) >= 3, "before: one or two"
    assert not [name for name in path.parent.iterdir() if name.is_dir()], "no scratch is left"


def test_the_result_depends_on_source_and_seed_alone(index, tmp_path):
    remote = f"memory://{tmp_path.name}-shuffled/index.json"
    one, two, three = str(tmp_path / "1" / "index.json"), remote, str(tmp_path / "3" / "index.json")
    reshuffle(index, one, seed=0)
    reshuffle(index, two, seed=0, scratch=str(tmp_path), memory=3000)  # many files, each of a few samples
    reshuffle(index, three, seed=1)
    assert contents(storage.parent(one)) == contents(storage.parent(two))
    assert contents(storage.parent(one)) != contents(storage.parent(three))
    assert read_index(one).counts == (25, 25, 10, 25, 25, 10)


@pytest.mark.parametrize("harm", [flip_in_a_sample, flip_between_samples])
def test_a_damaged_source_is_not_shuffled_and_no_scratch_is_left(index, tmp_path, harm):
    harm(index)
    scratch = tmp_path / "scratch"
    with pytest.raises(DataError, match=r"latents-000001\.tar: "):
        reshuffle(index, str(tmp_path / "new" / "index.json"), scratch=str(scratch))
    assert list(scratch.iterdir()) == []
    assert list((tmp_path / "new").iterdir()) == []


def test_where_a_set_cannot_be_shuffled_to_is_explained(index, tmp_path):
    with pytest.raises(ConfigError, match=r"lies beside SRC .*give another"):
        reshuffle(index, str(tmp_path / "set" / "new.json"))
    reshuffle(index, str(tmp_path / "new" / "index.json"))
    with pytest.raises(OutputError, match="is there already"):
        reshuffle(index, str(tmp_path / "new" / "index.json"))


def test_every_command_explains_itself_with_examples(monkeypatch, capsys):
    for name in ("verify_shards", "copy_shards", "reshuffle", "index_shards"):
        assert run(monkeypatch, getattr(data_tools, name), "--help") == 0
        assert f"    python -m data_tools.{name} " in capsys.readouterr().out
