"""A webdataset made elsewhere: its samples are found where they lie, and what cannot be read so is named."""

import io
import tarfile

import numpy as np
import pytest

import data_tools.index_shards
from data_tools.copy_shards import copy
from data_tools.index_shards import index_shards
from data_tools.reshuffle import reshuffle
from data_tools.verify_shards import verify
from tests.tiny import DEMO, overrides, tiny_config
from tests.unit.test_shard_tools import all_samples, make_set, moments_of, run
from uvit_dist import storage
from uvit_dist.data.reader import SampleReader
from uvit_dist.data.shards import read_index
from uvit_dist.errors import ConfigError, DataError, MissingInputError, OutputError

FOREIGN_SHAPE = (8, 8, 8)


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def npz(store=np.savez, **arrays):
    out = io.BytesIO()
    store(out, **arrays)
    return out.getvalue()


def foreign_tar(path, members, directories=()):
    """A tar as others write it: with times, owners and directories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in directories:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(data), 1.5e9 + 0.25, "somebody"
            tar.addfile(info, io.BytesIO(data))


def foreign_moments(i):
    return moments_of(i, FOREIGN_SHAPE)


def foreign_config(directory, tmp_path, *more):
    return tiny_config(directory, tmp_path / "run", *more)


def foreign_set(directory):
    """12 samples in three tars: of .npy, of .npz that holds more, and with other members and a long name."""
    foreign_tar(
        directory / "a.tar",
        [
            (f"./{i:04d}.{end}", data)
            for i in range(5)
            for end, data in (("npy", npy(foreign_moments(i))), ("cls", b"%d\n" % i))
        ],
        ["./"],
    )
    foreign_tar(
        directory / "b.tar",
        [
            (f"{i:04d}.{end}", data)
            for i in range(5, 9)
            for end, data in (("cls", b"%d" % i), ("npz", npz(features=np.ones(i), moments=foreign_moments(i))))
        ],
    )
    foreign_tar(directory / "c.tar", [(f"{'x' * 120}/{i:04d}.{end}", data) for i in range(9, 12) for end, data in (
        ("jpg", b"pixels"), ("latent.npz", npz(anything=foreign_moments(i))), ("cls", b"%d" % (i % 10)))])  # fmt: skip


@pytest.mark.parametrize("where", ["local", "remote"])
def test_a_webdataset_made_elsewhere_is_read_where_it_lies(tmp_path, monkeypatch, where):
    directory = tmp_path / "set"
    foreign_set(directory)
    if where == "remote":
        url = f"memory://{tmp_path.name}-foreign"
        for path in directory.iterdir():
            storage.write_bytes(f"{url}/{path.name}", path.read_bytes())
        directory = url
    changes = [change for change in overrides(tmp_path, tmp_path) if not change.startswith("data.index")]
    changes.append(f"data.index={directory}/index.json")
    assert run(monkeypatch, data_tools.index_shards, "--config", DEMO, "--shards", directory, *changes) == 0
    index = read_index(f"{directory}/index.json")
    batch = SampleReader(index, 0).read_ids(np.arange(12)[::-1])
    assert batch.labels.tolist() == [i % 10 for i in range(12)][::-1]
    assert all(np.array_equal(data, foreign_moments(i)) for i, data in zip(range(11, -1, -1), batch.data, strict=True))
    assert [record.name for record in index.shards] == ["a.tar", "b.tar", "c.tar"]
    assert verify(index) == []
    made = index.provenance
    assert (made.samples, made.class_counts, made.dtype) == (12, (2, 2, 1, 1, 1, 1, 1, 1, 1, 1), "float16")
    assert len(made.encoder_fingerprint) == 64
    name = "set" if where == "local" else f"{tmp_path.name}-foreign"
    assert made.source.startswith(f"webdataset {name} ")
    assert run(monkeypatch, data_tools.index_shards, "--config", DEMO, "--shards", directory, *changes) == 0, "again"


def test_an_indexed_set_can_be_copied_and_shuffled(tmp_path):
    foreign_set(tmp_path / "set")
    config = foreign_config(tmp_path / "set", tmp_path)
    index_shards(config, str(tmp_path / "set"))
    index = copy(read_index(config.data.index), str(tmp_path / "copy"))
    reshuffle(index, str(tmp_path / "new" / "index.json"))
    new = read_index(str(tmp_path / "new" / "index.json"))
    batch = SampleReader(new, 0).read_ids(np.arange(12))
    keys = [key for key, *_ in all_samples(new)]
    assert {key.split("/")[0] for key in keys} == {"a", "b", "c"}, "keys may be the same in several tars"
    numbers = [int(key[-4:]) for key in keys]
    assert sorted(numbers) == list(range(12))
    assert batch.labels.tolist() == [n % 10 for n in numbers]
    assert all(np.array_equal(data, foreign_moments(n)) for n, data in zip(numbers, batch.data, strict=True))


GOOD = npy(foreign_moments(0))
WRONG = {
    "no label": ([("k.npy", GOOD)], r"k: members npy, no \.cls; store the label"),
    "half a sample": ([("k.cls", b"1"), ("j.npy", GOOD)], r"k: members cls; a sample has one \.npy or \.npz"),
    "two arrays": ([("k.npy", GOOD), ("k.x.npy", GOOD), ("k.cls", b"1")], r"k: members npy, x\.npy, cls; .*one \.npy"),
    "twice": ([("k.npy", GOOD), ("k.npy", GOOD)], r"k\.npy is there twice"),
    "label beyond": ([("k.npy", GOOD), ("k.cls", b"10")], r"k: \.cls: label 10, .*leave 10 classes, 0…9"),
    "label no number": ([("k.npy", GOOD), ("k.cls", b"cat")], r"k: \.cls: b'cat' is no whole number"),
    "shape": ([("k.npy", npy(foreign_moments(0)[:4])), ("k.cls", b"1")], r"k: \.npy: shape \(4, 8, 8\), .*\(8, 8, 8\)"),
    "type": ([("k.npy", npy(foreign_moments(0).astype("f4"))), ("k.cls", b"1")], r"set data\.moments_dtype float32"),
    "bytes swapped": ([("k.npy", npy(foreign_moments(0).astype(">f2"))), ("k.cls", b"1")], r"store little-endian"),
    "order": ([("k.npy", npy(np.asfortranarray(foreign_moments(0)))), ("k.cls", b"1")], r"in Fortran order; store"),
    "objects": ([("k.npy", npy(np.array([None]))), ("k.cls", b"1")], r"holds Python objects"),
    "not finite": ([("k.npy", npy(foreign_moments(0) * np.inf)), ("k.cls", b"1")], r"not finite"),
    "no array": ([("k.npy", b"what"), ("k.cls", b"1")], r"k: \.npy: not an array as np\.save writes it"),
    "short": ([("k.npy", GOOD[:-2]), ("k.cls", b"1")], r"1022 bytes of numbers where 1024 are expected"),
    "compressed": (
        [("k.npz", npz(np.savez_compressed, moments=foreign_moments(0))), ("k.cls", b"1")],
        r"k: \.npz: compressed; store it with np\.savez,",
    ),
    "which array": ([("k.npz", npz(a=np.ones(1), b=np.ones(1))), ("k.cls", b"1")], r"arrays a, b; store one alone"),
    "damaged zip": ([("k.npz", npz(a=foreign_moments(0))[:-30]), ("k.cls", b"1")], r"k: \.npz: not a whole \.npz"),
    "empty": ([], r"a\.tar: holds no samples; remove it"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_read_in_place_is_named_with_its_remedy(tmp_path, name):
    members, said = WRONG[name]
    foreign_tar(tmp_path / "set" / "a.tar", members)
    config = foreign_config(tmp_path / "set", tmp_path)
    with pytest.raises(DataError, match=rf"set/a\.tar: (.*: )?{said}" if name == "twice" else said) as caught:
        index_shards(config, str(tmp_path / "set"))
    assert str(caught.value).startswith(f"{tmp_path}/set/a.tar: ")
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["a.tar"]


@pytest.mark.parametrize("harm", ["cut in a sample", "cut between samples", "header"])
def test_a_damaged_foreign_tar_is_noticed(tmp_path, harm):
    foreign_set(tmp_path / "set")
    path = tmp_path / "set" / "b.tar"
    with tarfile.open(path) as tar:
        second = [member for member in tar.getmembers() if member.name.endswith(".cls")][1].offset
    data = bytearray(path.read_bytes())
    if harm == "header":
        with tarfile.open(path) as tar:
            begin = [member for member in tar.getmembers() if member.name.endswith(".npz")][2].offset_data
        data[begin - 512 + 3] ^= 1
    else:
        del data[second - (harm == "cut in a sample") * 700 :]
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"set/b\.tar: not a whole tar file \("):
        index_shards(foreign_config(tmp_path / "set", tmp_path), str(tmp_path / "set"))


def test_where_an_index_cannot_be_is_explained(tmp_path):
    index = make_set(tmp_path / "set")
    foreign_set(tmp_path / "foreign")
    with pytest.raises(ConfigError, match=r"must lie beside the tars .*add data\.index=.*foreign/index\.json"):
        index_shards(foreign_config(tmp_path / "elsewhere", tmp_path), str(tmp_path / "foreign"))
    with pytest.raises(OutputError, match="is the index of made in a test, made here"):
        index_shards(foreign_config(tmp_path / "set", tmp_path), storage.parent(index.path))
    with pytest.raises(MissingInputError, match=r"holds no \*\.tar"):
        index_shards(foreign_config(tmp_path / "none", tmp_path), str(tmp_path / "none"))
    pixels = ["data.space=pixels", "autoencoder=null", "model.in_chans=3", "model.img_size=32"]
    with pytest.raises(ConfigError, match="sets of moments and labels alone"):
        index_shards(foreign_config(tmp_path / "foreign", tmp_path, *pixels), str(tmp_path / "foreign"))
