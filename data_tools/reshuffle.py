"""Shuffle a set of shards anew, whatever its size: for one that is sorted, by class for example.

    python -m data_tools.reshuffle sorted/index.json shuffled/index.json
    python -m data_tools.reshuffle s3://bucket/sorted/index.json shuffled/index.json --seed 1 --scratch /scratch

Originals go into shards in a seeded permutation, mirror images in another into shards of their own. The source is read
once, to files on a scratch disk that take as much room as its samples; each of these fits in --memory-gb. The result
depends on the source, the seed and the number of samples in a shard alone.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import xxhash

from data_tools.shard_job import positive
from data_tools.shard_set import (
    FOREIGN,
    RawSample,
    TarSamples,
    progress_of,
    require_space,
    same_place,
    tool_parser,
    use_storage,
)
from data_tools.units import STEMS, claim_directory
from uvit_dist import storage
from uvit_dist.data.latents import MIRROR_SUFFIX, Provenance, Sample
from uvit_dist.data.shards import (
    EMPTY_CONTEXT,
    ShardIndex,
    ShardRecord,
    check_shards_present,
    read_index,
    write_index,
    write_shard,
)
from uvit_dist.errors import ConfigError, DataError, OutputError, explained_exit

_HEAD = struct.Struct("<QQiIQQQ")
"""Of a sample in a bucket: random word, id in the source, label; bytes of its key, captions, contexts and data."""


class _Buckets:
    """Samples on a scratch disk, cut by their random word into files that each fit in memory."""

    def __init__(self, directory: str, count: int, memory: int) -> None:
        self._directory, self._count, self._memory = directory, count, memory
        self._pending: dict[str, bytearray] = {}
        self._waiting = 0
        self.samples = {False: 0, True: 0}

    def _path(self, mirrored: bool, number: int) -> str:
        return os.path.join(self._directory, f"{'mirror' if mirrored else 'original'}-{number}")

    def add(self, mirrored: bool, word: int, number: int, label: int, parts: list[bytes]) -> None:
        """parts: key, captions, contexts, data. word: 64 random bits; number: id in the source."""
        path = self._path(mirrored, word * self._count >> 64)
        kept = self._pending.setdefault(path, bytearray())
        before = len(kept)
        kept += _HEAD.pack(word, number, label, *map(len, parts))
        for part in parts:
            kept += part
        self._waiting += len(kept) - before
        self.samples[mirrored] += 1
        if self._waiting > self._memory // 4:
            self.flush()

    def flush(self) -> None:
        """Write what waits in memory. Raises ``OutputError``."""
        try:
            for path, kept in self._pending.items():
                with open(path, "ab") as file:
                    file.write(kept)
        except OSError as error:
            raise OutputError(
                f"--scratch {self._directory}: cannot be written ({error.strerror or error}); make room, or give "
                "another directory"
            ) from None
        self._pending, self._waiting = {}, 0

    def ordered(self, mirrored: bool, made: Provenance) -> Iterator[Sample]:
        """All samples in the order of their words; one bucket at a time is in memory."""
        for number in range(self._count):
            path = self._path(mirrored, number)
            if os.path.exists(path):
                yield from _ordered(memoryview(storage.read_bytes(path)), made)
                os.unlink(path)


def _ordered(bucket: memoryview, made: Provenance) -> Iterator[Sample]:
    places, at = [], 0
    while at < len(bucket):
        word, number, _, *sizes = _HEAD.unpack_from(bucket, at)
        places.append((word, number, at))
        at += _HEAD.size + sum(sizes)
    for _, _, place in sorted(places):
        _, _, label, *sizes = _HEAD.unpack_from(bucket, place)
        parts, at = [], place + _HEAD.size
        for size in sizes:
            parts.append(bucket[at : at + size])
            at += size
        key, captions, contexts, data = parts
        array = np.frombuffer(data, np.dtype(made.dtype).newbyteorder("<")).reshape(made.shape)
        sample = Sample(bytes(key).decode(), label, array)
        if made.text is not None:
            stacked = np.frombuffer(contexts, np.dtype(made.text.dtype).newbyteorder("<"))
            texts = json.loads(bytes(captions))["captions"]
            sample = Sample(sample.key, label, array, texts, stacked.reshape(-1, *made.text.shape))
        yield sample


def _text_parts(raw: RawSample) -> tuple[bytes, bytes]:
    """The captions of a sample, as JSON, and its contexts, as they lie in memory."""
    contexts = np.lib.format.read_array(io.BytesIO(raw.members["contexts.npy"][1]), allow_pickle=False)
    return raw.members["json"][1], contexts.tobytes()


def _scatter(index: ShardIndex, seed: int, buckets: _Buckets, advance: Callable[[int], None]) -> None:
    """Read each shard once, check it, and put its samples into buckets. Raises ``DataError`` where one is damaged."""
    made, random = index.provenance, np.random.Philox(key=seed)
    size = int(np.prod(made.shape)) * np.dtype(made.dtype).itemsize
    foreign = made.source.startswith(f"{FOREIGN} ")
    for shard, record in enumerate(index.shards):
        rows, path = index.rows(shard), index.shard_path(shard)
        words = random.random_raw(record.samples).tolist()
        columns = zip(words, *(rows[name].tolist() for name in ("offset", "xxh3", "label")), strict=True)
        tar = TarSamples(path, record.size, advance)
        samples = 0
        for raw, (word, offset, expected, label) in zip(tar, columns, strict=False):
            data = raw.at(offset, size)
            if data is None or xxhash.xxh3_64_intdigest(data) != expected:
                break
            mirrored = raw.key.endswith(MIRROR_SUFFIX)
            key = f"{record.name.removesuffix('.tar')}/{raw.key}" if foreign else raw.key
            text = (b"", b"") if made.text is None else _text_parts(raw)
            buckets.add(mirrored, word, int(index.starts[shard]) + samples, label, [key.encode(), *text, data])
            samples += 1
        if samples < record.samples or tar.sha256 != record.sha256:
            raise DataError(
                f"{path}: damaged ({'its sha256 differs' if samples == record.samples else f'at sample {samples}'}); "
                "copy or make this shard again, then give the same command again"
            )
    buckets.flush()


def reshuffle(
    index: ShardIndex,
    destination: str,
    seed: int = 0,
    per_shard: int | None = None,
    scratch: str | None = None,
    memory: int = 2 * 10**9,
) -> list[ShardRecord]:
    """Write the samples of a set to the directory of another index, in a seeded permutation.

    destination: of the new index; per_shard: samples in a shard, none: those of the largest there; memory: bytes that
    may be in use at once. Raises ``ConfigError`` or ``OutputError`` where the destination will not do, ``DataError``
    where the source is damaged.
    """
    directory, made = storage.parent(destination), index.provenance
    if same_place(storage.parent(index.path), directory):
        raise ConfigError(
            f"DST {destination}: lies beside SRC {index.path}, whose shards it would replace; give another"
        )
    if seed < 0:
        raise ConfigError(f"--seed {seed}: must be 0 or more; give another")
    claim_directory(destination)
    if storage.exists(destination):
        raise OutputError(f"DST {destination}: is there already; delete that set, or give another directory")
    check_shards_present(index)
    empty = None if made.text is None else index.empty_context()
    per_shard = per_shard or max(index.counts)
    total = sum(record.size for record in index.shards)
    scratch = scratch or (tempfile.gettempdir() if storage.is_remote(directory) else directory)
    require_space(scratch, total, "--scratch")
    records: list[ShardRecord] = []
    with tempfile.TemporaryDirectory(prefix="reshuffle-", dir=scratch) as own:
        buckets = _Buckets(own, -(-2 * total // memory), memory)
        with progress_of(total, "read") as advance:
            _scatter(index, seed, buckets, advance)
        with progress_of(made.samples, "write", "sample") as advance:
            for mirrored in (False, True):
                samples = _counted(buckets.ordered(mirrored, made), advance)
                for _ in range(0, buckets.samples[mirrored], per_shard):
                    name = f"{STEMS[made.kind]}-{len(records):06d}"
                    records.append(write_shard(directory, name, islice(samples, per_shard), made))
    if empty is not None:
        path = storage.join(storage.parent(index.path), EMPTY_CONTEXT)
        storage.write_bytes(storage.join(directory, EMPTY_CONTEXT), storage.read_bytes(path))
    write_index(destination, records, made)
    return records


def _counted(samples: Iterator[Sample], advance: Callable[[int], None]) -> Iterator[Sample]:
    for sample in samples:
        yield sample
        advance(1)


def _gigabytes(text: str) -> int:
    """Bytes of a positive number of 10^9, for argparse. Raises ``ValueError``."""
    size = int(float(text) * 1e9)
    if size < 1:
        raise ValueError
    return size


def main() -> None:
    """The command line."""
    parser = tool_parser("reshuffle", __doc__)
    parser.add_argument("source", metavar="SRC", help="path or URL of the index of the set")
    parser.add_argument("destination", metavar="DST", help="path or URL of the new index, in a directory of its own")
    parser.add_argument("--samples-per-shard", type=positive, help="default: those of the largest shard of SRC")
    parser.add_argument("--seed", type=int, default=0, help="of the permutation (default: 0)")
    parser.add_argument("--scratch", metavar="DIR", help="local directory with room for the set (default: that of DST)")
    parser.add_argument(
        "--memory-gb", dest="memory", type=_gigabytes, default="2", help="memory to use, 10^9 bytes (default: 2)"
    )
    args = parser.parse_args()
    with explained_exit():
        use_storage(args)
        index = read_index(args.source, "SRC")
        records = reshuffle(index, args.destination, args.seed, args.samples_per_shard, args.scratch, args.memory)
        size = sum(record.size for record in records)
        print(f"{args.destination}: {index.provenance.samples} samples in {len(records)} shards, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
