"""Shards: what was written is read, by us and by plain webdataset and tar; every kind of damage is noticed."""

import errno
import hashlib
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from uvit_dist.data.latents import Provenance, Sample, TextProvenance, encode_array, pixels_to_x0, sample_latents
from uvit_dist.data.loader import ShardLoader
from uvit_dist.data.plan import Plan
from uvit_dist.data.reader import SampleReader
from uvit_dist.data.shards import (
    EMPTY_CONTEXT,
    check_shards_present,
    finished_shard,
    read_index,
    write_index,
    write_shard,
)
from uvit_dist.errors import DataError, MissingInputError, OutputError

SHAPE = (8, 4, 4)


def provenance(**changes):
    values = dict(kind="moments", dtype="float16", shape=SHAPE, source="made in a test", image_size=32, crop="none",
                  mirror=False, classes=10, samples=100, class_counts=(10,) * 10, autoencoder="ae",
                  encoder_fingerprint="f" * 64, scale_factor=0.5)  # fmt: skip
    return Provenance(**{**values, **changes})


def moments_of(i):
    return np.random.default_rng(i).standard_normal(SHAPE).astype(np.float16)


@pytest.fixture
def index_path(tmp_path):
    records, first = [], 0
    for s, count in enumerate((30, 11, 59)):
        samples = [Sample(f"{i:06d}", i % 10, moments_of(i)) for i in range(first, first + count)]
        records.append(write_shard(str(tmp_path), f"shard-{s}", samples, provenance()))
        first += count
    write_index(str(tmp_path / "index.json"), records, provenance())
    return tmp_path / "index.json"


def loader(index_path, start_step=0, rank=0, world_size=1, **options):
    index = read_index(str(index_path))
    plan = Plan(index.counts, seed=1, global_batch_size=12, lanes=4, block_size=5)
    return ShardLoader(index, plan, rank, world_size, start_step, **options)


def test_batches_hold_the_samples_that_the_plan_names(index_path):
    batches = loader(index_path)
    for step in range(20):  # two epochs and a half
        batch = next(batches)
        assert np.array_equal(batch.ids, batches.plan.sample_ids(step))
        assert torch.equal(batch.labels, batch.ids % 10)
        assert all(np.array_equal(m, moments_of(int(i))) for i, m in zip(batch.ids, batch.data, strict=True))


@pytest.mark.parametrize("options", [dict(read_threads=1, prefetch_blocks=0), dict(read_threads=8, prefetch_blocks=9)])
def test_resuming_ranks_and_threads_change_nothing(index_path, options):
    whole = loader(index_path)
    expected = [next(whole) for _ in range(15)]
    resumed = loader(index_path, start_step=9, **options)
    halves = [loader(index_path, 9, rank, 2, **options) for rank in range(2)]
    for step in range(9, 15):
        batch, first, second = next(resumed), *(next(half) for half in halves)
        assert torch.equal(batch.data, expected[step].data)
        assert torch.equal(torch.cat([first.data, second.data]), batch.data)
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
    samples = [Sample(f"{i:06d}", i % 10, moments_of(i)) for i in range(30)]
    record = write_shard(str(again), "shard-0", samples, provenance())
    assert (again / "shard-0.tar").read_bytes() == (index_path.parent / "shard-0.tar").read_bytes()
    keys = [sample.key for sample in samples]
    assert finished_shard(str(again), "shard-0", keys, provenance()).record == record
    assert finished_shard(str(again), "shard-0", keys, provenance(scale_factor=0.7)) is None
    assert finished_shard(str(again), "shard-0", keys[::-1], provenance()) is None
    (again / "shard-0.tar").write_bytes(b"")
    assert finished_shard(str(again), "shard-0", keys, provenance()) is None


def test_long_keys_keep_their_samples(tmp_path):
    samples = [Sample(f"{'x' * 90}/{'y' * (60 + i)}", i, moments_of(i)) for i in range(3)]
    record = write_shard(str(tmp_path), "shard-0", samples, provenance(samples=3))
    write_index(str(tmp_path / "index.json"), [record], provenance(samples=3))
    index = read_index(str(tmp_path / "index.json"))
    batch = next(ShardLoader(index, Plan(index.counts, 0, 3, 1, 3), 0, 1))
    assert all(np.array_equal(m, moments_of(int(i))) for i, m in zip(batch.ids, batch.data, strict=True))
    with tarfile.open(tmp_path / "shard-0.tar") as tar:
        assert f"{samples[2].key}.npy" in tar.getnames()


def drain(index_path):
    """Every damage found in an epoch, and the batches."""
    batches = loader(index_path)
    found = [next(batches) for _ in range(8)]
    return {(d.name, d.reason) for batch in found for d in batch.damage}, found


def assert_whole(batches):
    """Each sample is what its id says, substitutes too."""
    for batch in batches:
        assert torch.equal(batch.labels, batch.ids % 10)
        assert all(np.array_equal(m, moments_of(int(i))) for i, m in zip(batch.ids, batch.data, strict=True))


def data_offset(index_path, shard, sample):
    return int(read_index(str(index_path)).rows(shard)["offset"][sample])


@pytest.mark.parametrize("place", ["in data", "between members", "between samples", "in a header", "at the start"])
def test_a_truncated_shard_is_noticed_wherever_it_is_cut(index_path, place):
    shard, data = index_path.parent / "shard-2.tar", data_offset(index_path, 2, 20)
    with tarfile.open(shard) as tar:
        header = tar.getmember(f"{41 + 20:06d}.npy").offset
    cut = {"in data": data + 99, "between members": header, "in a header": header + 100, "at the start": 0,
           "between samples": header - 1024}[place]  # fmt: skip
    shard.write_bytes(shard.read_bytes()[:cut])
    found, batches = drain(index_path)
    assert {name for name, _ in found} == {"shard-2.tar"}
    assert all("truncated" in reason for _, reason in found)
    assert_whole(batches)
    good = 0 if place == "at the start" else 20
    lost = set(range(41 + good, 100))
    assert not lost & {int(i) for batch in batches for i in batch.ids}, "nothing of what is gone"
    with pytest.raises(DataError, match=r"1 file\(s\) of 3 shards .*(\n.*)*shard-2\.tar: \d+ bytes, the index says"):
        check_shards_present(read_index(str(index_path)))


def test_one_flipped_bit_is_noticed(index_path):
    shard = index_path.parent / "shard-0.tar"
    data = bytearray(shard.read_bytes())
    data[data_offset(index_path, 0, 7) + 3] ^= 4
    shard.write_bytes(data)
    found, batches = drain(index_path)
    assert found == {("shard-0.tar", f"the sample at byte {data_offset(index_path, 0, 7)} differs from its hash in the "
                      "index")}  # fmt: skip
    (used,) = [used for batch in batches for used in batch.substitutes]
    assert used.planned == 7
    assert used.used != 7
    assert_whole(batches)
    with pytest.raises(DataError, match=r"shard-0\.tar: the sample at byte \d+ differs"):
        SampleReader(read_index(str(index_path)), 0).read_ids(np.array([6, 7]))


@pytest.mark.slow
def test_missing_swapped_and_altered_files_are_noticed(index_path):
    directory = index_path.parent
    rows = directory / "shard-0.rows.npy"
    good = rows.read_bytes()
    rows.write_bytes((directory / "shard-1.rows.npy").read_bytes())
    assert drain(index_path)[0] == {("shard-0.tar", "its table of samples is damaged")}
    rows.write_bytes(b"not numpy")
    assert drain(index_path)[0] == {("shard-0.tar", "its table of samples is damaged")}
    rows.write_bytes(good)
    tar = directory / "shard-0.tar"
    tar.rename(directory / "kept")
    found, batches = drain(index_path)
    assert found == {("shard-0.tar", "missing")}
    assert_whole(batches)
    tar.write_bytes((directory / "shard-2.tar").read_bytes())
    found, batches = drain(index_path)
    assert {name for name, _ in found} == {"shard-0.tar"}
    assert all("differs from its hash" in reason for _, reason in found), "swapped with another"
    tar.unlink()
    rows.unlink()
    assert drain(index_path)[0] == {("shard-0.tar", "its table of samples is missing")}
    with pytest.raises(
        DataError, match=r"2 file\(s\) of 3 shards (.*\n)*.*shard-0\.tar: missing\n.*rows\.npy: missing"
    ):
        check_shards_present(read_index(str(index_path)))


def test_shards_that_are_all_gone_end_the_run(index_path):
    batches = loader(index_path, prefetch_blocks=0)
    next(batches)
    for tar in index_path.parent.glob("*.tar"):
        tar.unlink()
    with pytest.raises(DataError, match=r"nor 16 that may stand in for it can be read .* see whether the shards are"):
        [next(batches) for _ in range(8)]


def test_errors_of_the_file_system_that_pass_are_no_damage(index_path, monkeypatch):
    original, calls = os.preadv, []

    def fails_twice(*args):
        calls.append(args)
        if len(calls) in (3, 4):
            raise OSError(errno.EIO, "Input/output error")
        return original(*args)

    monkeypatch.setattr(os, "preadv", fails_twice)
    found, batches = drain(index_path)
    assert found == set()
    assert_whole(batches)


def test_a_missing_damaged_or_foreign_index_is_explained(tmp_path):
    with pytest.raises(MissingInputError, match=r"data_tools\.precompute_latents"):
        read_index(str(tmp_path / "index.json"))
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        read_index(str(tmp_path / "index.json"))
    (tmp_path / "index.json").write_text(json.dumps({"shards": [], "provenance": {"version": 99}}))
    with pytest.raises(DataError, match="version 99 of the shard format; this program reads 2"):
        read_index(str(tmp_path / "index.json"))


def test_a_shard_that_fails_while_it_is_written_leaves_nothing(tmp_path):
    def samples():
        yield Sample("a", 0, moments_of(0))
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


def test_pixels_become_the_network_range_and_are_mirrored_where_asked():
    pixels = torch.arange(2 * 3 * 2 * 4, dtype=torch.uint8).reshape(2, 3, 2, 4)
    x0 = pixels_to_x0(pixels, torch.tensor([False, True]))
    assert torch.equal(x0[0], pixels[0].float() / 127.5 - 1)
    assert torch.equal(x0[1], pixels[1].flip(-1).float() / 127.5 - 1)
    assert pixels_to_x0(torch.tensor([[[[0, 255]]]], dtype=torch.uint8), torch.tensor([False])).tolist() == [
        [[[-1, 1]]]
    ]


def context_of(i, k):
    return np.random.default_rng([i, k]).standard_normal((5, 6)).astype(np.float16)


def captions_of(i):
    return 1 + i % 4


@pytest.fixture
def text_index_path(tmp_path):
    empty = encode_array(context_of(99, 99))[0]
    (tmp_path / EMPTY_CONTEXT).write_bytes(empty)
    text = TextProvenance("t" * 64, "float16", (5, 6), hashlib.sha256(empty).hexdigest())
    made = provenance(samples=24, classes=0, class_counts=(), text=text)
    records = []
    for s in range(2):
        samples = [
            Sample(
                f"{i:06d}", -1, moments_of(i), [f"caption {k} of {i}, größer" for k in range(captions_of(i))],
                np.stack([context_of(i, k) for k in range(captions_of(i))]),
            )
            for i in range(12 * s, 12 * s + 12)
        ]  # fmt: skip
        records.append(write_shard(str(tmp_path), f"shard-{s}", samples, made))
    write_index(str(tmp_path / "index.json"), records, made)
    return tmp_path / "index.json"


def drawn(batch):
    """Which caption's context each sample of a batch has."""
    found = []
    for i, context in zip(batch.ids.tolist(), batch.contexts, strict=True):
        (k,) = [k for k in range(captions_of(i)) if np.array_equal(context, context_of(i, k))]
        found.append((i, k))
    return found


def test_a_caption_is_drawn_for_each_sample_and_epoch(text_index_path):
    whole = loader(text_index_path)
    batches = [next(whole) for _ in range(120)]  # sixty epochs
    assert all(np.array_equal(m, moments_of(int(i))) for b in batches for i, m in zip(b.ids, b.data, strict=True))
    epochs = [dict(drawn(one) + drawn(two)) for one, two in zip(batches[::2], batches[1::2], strict=True)]
    assert all(len(epoch) == 24 for epoch in epochs)
    for i in range(24):
        counts = np.bincount([epoch[i] for epoch in epochs], minlength=captions_of(i))
        assert counts.min() > 0, "every caption has its turn"
        assert counts.max() < 60 / captions_of(i) + 22
    halves = [loader(text_index_path, 40, rank, 2, read_threads=1, prefetch_blocks=0) for rank in range(2)]
    for step in range(40, 50):
        both = [next(half) for half in halves]
        assert drawn(both[0]) + drawn(both[1]) == drawn(batches[step]), "ranks and resuming change no caption"


def test_any_samples_are_read_by_their_ids(text_index_path):
    reader = SampleReader(read_index(str(text_index_path)), seed=3)
    ids = np.array([17, 2, 23, 2, 0])
    batch = reader.read_ids(ids, epoch=5)
    assert batch.ids.tolist() == ids.tolist()
    assert all(np.array_equal(m, moments_of(int(i))) for i, m in zip(ids, batch.data, strict=True))
    assert drawn(batch)[1] == drawn(batch)[3]


def test_damaged_contexts_are_noticed(text_index_path):
    index = read_index(str(text_index_path))
    assert np.array_equal(index.empty_context(), context_of(99, 99))
    shard = text_index_path.parent / "shard-1.tar"
    data = bytearray(shard.read_bytes())
    for row in index.context_rows(1):
        data[int(row["offset"])] ^= 1
    shard.write_bytes(data)
    batches = loader(text_index_path)
    found = [next(batches) for _ in range(2)]
    assert {damage.name for batch in found for damage in batch.damage} == {"shard-1.tar"}
    assert all(i < 12 for batch in found for i, _ in drawn(batch)), "none of the damaged, and each with its own context"
    (text_index_path.parent / EMPTY_CONTEXT).write_bytes(encode_array(context_of(1, 0))[0])
    with pytest.raises(DataError, match=r"empty_context\.npy: differs"):
        index.empty_context()
    (text_index_path.parent / "shard-0.contexts.npy").unlink()
    with pytest.raises(DataError, match=r"shard-0\.contexts\.npy: missing"):
        check_shards_present(index)


def test_shards_with_captions_are_plain_webdataset(text_index_path):
    with tarfile.open(text_index_path.parent / "shard-0.tar") as tar:
        names = tar.getnames()[:4]
        assert names == ["000000.cls", "000000.json", "000000.contexts.npy", "000000.npy"]
        texts = json.loads(tar.extractfile("000003.json").read())
        contexts = np.load(io.BytesIO(tar.extractfile("000003.contexts.npy").read()), allow_pickle=False)
    assert texts == {"captions": [f"caption {k} of 3, größer" for k in range(4)]}
    assert np.array_equal(contexts, np.stack([context_of(3, k) for k in range(4)]))
