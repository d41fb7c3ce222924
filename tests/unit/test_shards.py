"""Shards: what was written is read, by us and by plain webdataset and tar; every kind of damage is noticed."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from uvit_dist.data.latents import Provenance, sample_latents
from uvit_dist.data.loader import LatentLoader
from uvit_dist.data.plan import Plan
from uvit_dist.data.shards import check_shards_present, finished_shard, read_index, write_index, write_shard
from uvit_dist.errors import DataError, MissingInputError, OutputError

SHAPE = (8, 4, 4)


def provenance(**changes):
    values = dict(autoencoder="ae", encoder_fingerprint="f" * 64, scale_factor=0.5, source="made in a test",
                  image_size=32, crop="none", mirror=False, moments_dtype="float16", moments_shape=SHAPE,
                  classes=10, samples=100)  # fmt: skip
    return Provenance(**{**values, **changes})


def moments_of(i):
    return np.random.default_rng(i).standard_normal(SHAPE).astype(np.float16)


@pytest.fixture
def index_path(tmp_path):
    records, first = [], 0
    for s, count in enumerate((30, 11, 59)):
        samples = [(f"{i:06d}", i % 10, moments_of(i)) for i in range(first, first + count)]
        records.append(write_shard(str(tmp_path), f"shard-{s}", samples, provenance()))
        first += count
    write_index(str(tmp_path / "index.json"), records, provenance())
    return tmp_path / "index.json"


def loader(index_path, start_step=0, rank=0, world_size=1, **options):
    index = read_index(str(index_path))
    plan = Plan(index.counts, seed=1, global_batch_size=12, lanes=4, block_size=5)
    return LatentLoader(index, plan, rank, world_size, start_step, **options)


def test_batches_hold_the_samples_that_the_plan_names(index_path):
    batches = loader(index_path)
    for step in range(20):  # two epochs and a half
        batch = next(batches)
        assert np.array_equal(batch.ids, batches.plan.sample_ids(step))
        assert torch.equal(batch.labels, batch.ids % 10)
        assert all(np.array_equal(m, moments_of(int(i))) for i, m in zip(batch.ids, batch.moments, strict=True))


@pytest.mark.parametrize("options", [dict(read_threads=1, prefetch_blocks=0), dict(read_threads=8, prefetch_blocks=9)])
def test_resuming_ranks_and_threads_change_nothing(index_path, options):
    whole = loader(index_path)
    expected = [next(whole) for _ in range(15)]
    resumed = loader(index_path, start_step=9, **options)
    halves = [loader(index_path, 9, rank, 2, **options) for rank in range(2)]
    for step in range(9, 15):
        batch, first, second = next(resumed), *(next(half) for half in halves)
        assert torch.equal(batch.moments, expected[step].moments)
        assert torch.equal(torch.cat([first.moments, second.moments]), batch.moments)
        assert torch.equal(torch.cat([first.ids, second.ids]), expected[step].ids)


def test_memory_holds_only_the_blocks_in_use(index_path):
    batches = loader(index_path, prefetch_blocks=1)
    for _ in range(60):
        next(batches)
        assert len(batches._blocks) <= 4 * 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset closes no file
def test_plain_webdataset_and_tar_read_the_shards(index_path):
    shard = index_path.parent / "shard-1.tar"
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode())
    assert [s["__key__"] for s in samples] == [f"{i:06d}" for i in range(30, 41)]
    assert all(np.array_equal(s["npy"], moments_of(30 + i)) for i, s in enumerate(samples))
    assert [s["cls"] for s in samples] == [i % 10 for i in range(30, 41)]
    names = subprocess.run(["tar", "tf", shard], capture_output=True, text=True, check=True).stdout.split()
    assert names[:2] == ["000030.cls", "000030.npy"]


def test_the_same_samples_give_the_same_bytes(index_path, tmp_path):
    again = tmp_path / "again"
    samples = [(f"{i:06d}", i % 10, moments_of(i)) for i in range(30)]
    record = write_shard(str(again), "shard-0", samples, provenance())
    assert (again / "shard-0.tar").read_bytes() == (index_path.parent / "shard-0.tar").read_bytes()
    keys = [key for key, *_ in samples]
    assert finished_shard(str(again), "shard-0", keys, provenance()) == record
    assert finished_shard(str(again), "shard-0", keys, provenance(scale_factor=0.7)) is None
    assert finished_shard(str(again), "shard-0", keys[::-1], provenance()) is None
    (again / "shard-0.tar").write_bytes(b"")
    assert finished_shard(str(again), "shard-0", keys, provenance()) is None


def test_long_keys_keep_their_samples(tmp_path):
    samples = [(f"{'x' * 90}/{'y' * (60 + i)}", i, moments_of(i)) for i in range(3)]
    record = write_shard(str(tmp_path), "shard-0", samples, provenance(samples=3))
    write_index(str(tmp_path / "index.json"), [record], provenance(samples=3))
    index = read_index(str(tmp_path / "index.json"))
    batch = next(LatentLoader(index, Plan(index.counts, 0, 3, 1, 3), 0, 1))
    assert all(np.array_equal(m, moments_of(int(i))) for i, m in zip(batch.ids, batch.moments, strict=True))
    with tarfile.open(tmp_path / "shard-0.tar") as tar:
        assert f"{samples[2][0]}.npy" in tar.getnames()


def drain(index_path):
    batches = loader(index_path)
    for _ in range(9):
        next(batches)


@pytest.mark.parametrize("cut", [100, 512 * 7, 512 * 8, 512 * 8 + 5, 30_000])
def test_a_truncated_shard_is_noticed_wherever_it_is_cut(index_path, cut):
    shard = index_path.parent / "shard-2.tar"
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"shard-2\.tar: ends at byte .* truncated"):
        drain(index_path)
    with pytest.raises(DataError, match=r"1 file\(s\) of 3 shards .*(\n.*)*shard-2\.tar: \d+ bytes, the index says"):
        check_shards_present(read_index(str(index_path)))


def test_one_flipped_bit_is_noticed(index_path):
    shard = index_path.parent / "shard-0.tar"
    data = bytearray(shard.read_bytes())
    data[int(read_index(str(index_path)).rows(0)["offset"][7]) + 3] ^= 4
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-0\.tar: the sample at byte \d+ differs"):
        drain(index_path)


def test_missing_swapped_and_altered_files_are_noticed(index_path):
    directory = index_path.parent
    rows = directory / "shard-0.rows.npy"
    good = rows.read_bytes()
    rows.write_bytes((directory / "shard-1.rows.npy").read_bytes())
    with pytest.raises(DataError, match=r"shard-0\.rows\.npy: differs"):
        drain(index_path)
    rows.write_bytes(b"not numpy")
    with pytest.raises(DataError, match="not a table of samples"):
        drain(index_path)
    rows.write_bytes(good)
    (directory / "shard-0.tar").unlink()
    with pytest.raises(MissingInputError, match=r"shard-0\.tar: no such file"):
        drain(index_path)
    rows.unlink()
    with pytest.raises(
        DataError, match=r"2 file\(s\) of 3 shards (.*\n)*.*shard-0\.tar: missing\n.*rows\.npy: missing"
    ):
        check_shards_present(read_index(str(index_path)))


def test_a_missing_damaged_or_foreign_index_is_explained(tmp_path):
    with pytest.raises(MissingInputError, match=r"data_tools\.precompute_latents"):
        read_index(str(tmp_path / "index.json"))
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        read_index(str(tmp_path / "index.json"))
    (tmp_path / "index.json").write_text(json.dumps({"shards": [], "provenance": {"version": 99}}))
    with pytest.raises(DataError, match="version 99 of the shard format; this program reads 1"):
        read_index(str(tmp_path / "index.json"))


def test_a_shard_that_fails_while_it_is_written_leaves_nothing(tmp_path):
    def samples():
        yield "a", 0, moments_of(0)
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        write_shard(str(tmp_path), "shard-0", samples(), provenance())
    assert list(Path(tmp_path).iterdir()) == []


def test_latents_are_sampled_as_in_the_official_code():
    moments = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    moments[:, 4:] *= 40  # logvar beyond the clamp on both sides
    noise = torch.randn(2, 4, 4, 4)
    mean, logvar = moments[:, :4].float(), moments[:, 4:].float().clamp(-30, 20)
    assert torch.equal(sample_latents(moments, noise, 0.18215), (mean + (0.5 * logvar).exp() * noise) * 0.18215)


def test_npy_members_are_plain_numpy_files(index_path):
    with tarfile.open(index_path.parent / "shard-0.tar") as tar:
        member = tar.extractfile("000007.npy")
        assert np.array_equal(np.load(io.BytesIO(member.read()), allow_pickle=False), moments_of(7))
