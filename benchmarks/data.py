"""C1 and C2: batches of latents from local shards on one core, and from S3 behind a shaped link.

    make bench-data OFFICIAL=DIR     DIR: a checkout of https://github.com/baofff/U-ViT

C1, warm cache: our checked and shuffled float16 batches against reading the same shards in order in pieces of 8 MiB,
the official dataset of .npy files and a plain webdataset pipeline. That dataset is imported as it is. Its writer fails
on numpy 2; the files are written here: object arrays of (moments, label), float32 as its writer makes them, and also
float16. C2: ours against the link's own rate, one ``pipe:curl`` and s3fs read in order; and ours where one GET in
twenty fails. Sides take turns within each round; a ratio is the median over rounds. The gates run first. Exit code 1
below "pass" or where a gate fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import s3fs
import torch
import webdataset
import xxhash
from torch.utils.data import DataLoader, Dataset, Subset

from benchmarks import ROOT, commit_of
from benchmarks.rounds import AT_LEAST, Side, keep, ratios, result, rounds, show, timed
from benchmarks.shaped_link import CONNECTION_BYTES_S, FAULT_SHARE, FIRST_BYTE_S, LINK_BYTES_S, counts, shaped_link
from uvit_dist import storage
from uvit_dist.config_data import StorageConfig
from uvit_dist.data.latents import Provenance, Sample
from uvit_dist.data.loader import ShardLoader
from uvit_dist.data.plan import Plan
from uvit_dist.data.shards import read_index, write_index, write_shard

SHAPE, CLASSES, SHARDS, PER_SHARD = (8, 64, 64), 1000, 3, 2060
SAMPLES = SHARDS * PER_SHARD
BATCH, LANES, BLOCK, SEED = 256, 4, 512, 1
STEPS = SAMPLES // BATCH
COMMAND = "make bench-data OFFICIAL=DIR"
SETTING: dict[str, Any] = {"samples": SAMPLES, "shape": SHAPE, "dtype": "float16", "shards": SHARDS, "batch": BATCH,
                           "lanes": LANES, "block": BLOCK}  # fmt: skip
PIECE = 8 << 20
REPEATS = 4
"""Epochs or passes of a fast side in a round of C1."""
READ_THREADS, PREFETCH_BLOCKS, PERIODS = 16, 2, 8
PERIOD = BLOCK * LANES // BATCH
"""Steps after which all lanes take up their next block. C2 times whole periods, PERIODS of them, after the first."""
LIMITS = {
    "C1": {"vs_raw": (0.5, 0.65), "vs_npy": (10, 20), "vs_webdataset": (10, 20)},
    "C2": {
        "vs_link": (0.90, 0.97),
        "vs_pipe": (4.5, 4.9),
        "vs_s3fs_sequential": (6, 7.5),
        "vs_link_faulty": (0.85, 0.85),
    },
}
"""Of each ratio, pass and stretch."""


def moments_of(sample: int) -> np.ndarray:
    """The moments of a sample."""
    return np.random.default_rng(sample).standard_normal(SHAPE, dtype=np.float32).astype(np.float16)


def label_of(sample: int) -> int:
    """The label of a sample."""
    return sample * 7 % CLASSES


def write_data(directory: Path) -> None:
    """The same samples as shards, float16, and as .npy files of the official kind, float32 and float16."""
    made = Provenance(kind="moments", dtype="float16", shape=SHAPE, source="drawn", image_size=512, crop="none",
                      mirror=False, classes=CLASSES, samples=SAMPLES)  # fmt: skip
    for dtype in ("float32", "float16"):
        (directory / dtype).mkdir()

    def samples(shard: int) -> Iterator[Sample]:
        for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
            data = moments_of(number)
            for dtype in ("float32", "float16"):
                pair = np.empty(2, dtype=object)
                pair[:] = [data.astype(dtype), np.int64(label_of(number))]
                np.save(directory / dtype / f"{number}.npy", pair, allow_pickle=True)
            yield Sample(f"{number:08d}", label_of(number), data)

    folder = str(directory / "shards")
    records = [write_shard(folder, f"latents-{shard:06d}", samples(shard), made) for shard in range(SHARDS)]
    write_index(f"{folder}/index.json", records, made)


def loader(index: str, read_threads: int, prefetch_blocks: int = 0) -> ShardLoader:
    """Ours, from the first step."""
    read = read_index(index)
    plan = Plan(read.counts, SEED, BATCH, LANES, BLOCK)
    return ShardLoader(read, plan, 0, 1, read_threads=read_threads, prefetch_blocks=prefetch_blocks)


def forget_pages(directory: Path) -> None:
    """Put every file on the disk and out of the page cache, so that the warm-up rounds bring it back by reading.

    Pages that a writer left in many small pieces are slower to read than those that a reader's read-ahead made; what
    training reads was not written by its own machine a moment ago.
    """
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def shards_in(directory: Path) -> list[Path]:
    """The tars."""
    return sorted((directory / "shards").glob("*.tar"))


# -- C1 ----------------------------------------------------------------------------------------------------------------


def official_dataset(official: Path, files: Path) -> Dataset[Any]:
    """The official dataset of the features; it counts ImageNet's images, of which the first are here."""
    spec = importlib.util.spec_from_file_location("official_datasets", official / "datasets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Subset(module.FeatureDataset(str(files)), range(SAMPLES))


def gates_of_c1(directory: Path) -> dict[str, bool]:
    """What must hold before any time of C1 counts."""
    index = str(directory / "shards" / "index.json")
    ours = loader(index, 0)
    epoch = [next(ours) for _ in range(STEPS)]
    ids = torch.cat([batch.ids for batch in epoch])
    equal = all(
        np.array_equal(data.numpy(), moments_of(sample)) and label == label_of(sample)
        for batch in epoch
        for sample, label, data in zip(batch.ids.tolist(), batch.labels.tolist(), batch.data, strict=True)
    )
    clean = not any(batch.damage for batch in epoch)
    del epoch
    shard, victim = shards_in(directory)[0], int(ids[ids < PER_SHARD][0])
    offset = int(read_index(index).rows(0)["offset"][victim]) + 4321
    _flip(shard, offset)
    again = loader(index, 0)
    found = [damage.name for batch in (next(again) for _ in range(STEPS)) for damage in batch.damage]
    _flip(shard, offset)
    return {
        "values and labels equal": equal and clean,
        "no id twice, all but the remainder": len(set(ids.tolist())) == len(ids) == SAMPLES // BATCH * BATCH,
        "one flipped byte is noticed": found == [shard.name],
    }


def _flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@contextmanager
def one_core() -> Iterator[None]:
    """This thread, and what it starts, on one core."""
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {max(before)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)


def sides_of_c1(directory: Path, official: Path) -> dict[str, Side]:
    """Samples in a second of each. Ours goes on from epoch to epoch as a training does."""
    tars = shards_in(directory)
    ours = loader(str(directory / "shards" / "index.json"), read_threads=0)
    buffer = memoryview(bytearray(PIECE))

    def batches() -> int:
        return sum(len(next(ours).ids) for _ in range(REPEATS * STEPS))

    def raw() -> int:
        for tar in tars * REPEATS:
            with open(tar, "rb", buffering=0) as file:
                while file.read(PIECE):
                    pass
        return REPEATS * SAMPLES

    def raw_reused() -> int:
        for tar in tars * REPEATS:
            with open(tar, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        return REPEATS * SAMPLES

    def npy(dtype: str) -> int:
        dataset = official_dataset(official, directory / dtype)
        return sum(len(labels) for _, labels in DataLoader(dataset, BATCH, shuffle=True, drop_last=True))

    def plain_webdataset() -> int:
        urls = [str(tar) for tar in tars]
        pipeline = webdataset.WebDataset(urls, shardshuffle=SHARDS).shuffle(1000).decode().to_tuple("npy", "cls")
        return sum(len(labels) for _, labels in pipeline.batched(BATCH, partial=False))

    return {
        "ours": lambda: timed(batches),
        "raw": lambda: timed(raw),
        "raw_reused_buffer": lambda: timed(raw_reused),
        "npy": lambda: timed(lambda: npy("float32")),
        "npy_float16": lambda: timed(lambda: npy("float16")),
        "webdataset": lambda: timed(plain_webdataset),
    }


def measure_c1(directory: Path, official: Path, count: int) -> dict[str, Any]:
    """The result of C1."""
    gates = gates_of_c1(directory)
    with one_core():
        found = rounds(sides_of_c1(directory, official), max(count, AT_LEAST))
    against = {f"vs_{name}": ratios(found["ours"], found[name]) for name in found if name != "ours"}
    setting = SETTING | {"cores": 1, "read_threads": 0, "raw_piece_bytes": PIECE, "webdataset_shuffle": 1000,
               "npy": "DataLoader(num_workers=0, shuffle=True); vs_npy: float32"}  # fmt: skip
    return result(
        "C1",
        LIMITS["C1"],
        against,
        gates,
        {"unit": "samples/s", **found},
        setting,
        COMMAND,
        official=commit_of(official),
    )


# -- C2 ----------------------------------------------------------------------------------------------------------------


def stream_of(ours: ShardLoader, steps: int, after_first_period: Callable[[], None] = lambda: None) -> str:
    """Take steps of a loader and close it. Returns the hash of all ids, labels and data."""
    stream = xxhash.xxh3_128()
    for step in range(steps):
        batch = next(ours)
        for tensor in (batch.ids, batch.labels, batch.data):
            stream.update(memoryview(tensor.numpy().reshape(-1)).cast("B"))
        if step == PERIOD:
            after_first_period()
    ours.close()
    return stream.hexdigest()


def sides_of_c2(directory: Path, url: str, equal: list[bool]) -> dict[str, Side]:
    """Bytes of shards in a second of each. equal: gets, of each stream of ours, whether its hash is that of files."""
    tar, steps = shards_in(directory)[0], 1 + (1 + PERIODS) * PERIOD
    size = sum(path.stat().st_size for path in shards_in(directory))
    expected = stream_of(loader(str(tar.parent / "index.json"), 0), steps)

    def passed() -> np.ndarray:
        return np.array([counts(url)["bytes"], storage.COUNTS.snapshot().bytes])

    def ours(bucket: str) -> float:
        """The least of what was sent, what came and what was handed over as batches, in whole periods."""
        begin, before = 0.0, passed()

        def warm() -> None:
            nonlocal begin, before
            begin, before = time.perf_counter(), passed()

        read = loader(f"s3://{bucket}/index.json", READ_THREADS, PREFETCH_BLOCKS)
        equal.append(stream_of(read, steps, warm) == expected)
        moved = [*(passed() - before), PERIODS * PERIOD * BATCH * size / SAMPLES]
        return float(min(moved)) / (time.perf_counter() - begin)

    def pipe() -> int:
        urls = " ".join(f"{url}/steady/{path.name}" for path in shards_in(directory))  # one connection for all
        with webdataset.gopen(f"pipe:curl -s {urls}") as file:
            got = sum(len(piece) for piece in iter(lambda: file.read(PIECE), b""))
        assert got == size
        return got

    server = s3fs.S3FileSystem(
        anon=True, endpoint_url=url, client_kwargs={"region_name": "us-east-1"}, skip_instance_cache=True
    )

    def sequential(**options: int) -> int:
        with server.open(f"steady/{tar.name}", "rb", **options) as file:
            got = sum(len(piece) for piece in iter(lambda: file.read(PIECE), b""))
        assert got == tar.stat().st_size
        return got

    return {
        "ours": lambda: ours("steady"),
        "pipe": lambda: timed(pipe),
        "faulty": lambda: ours("faulty"),
        "s3fs_sequential": lambda: timed(lambda: sequential(block_size=PIECE)),
        "s3fs_default_block": lambda: timed(sequential),
    }


def measure_c2(directory: Path, count: int) -> dict[str, Any]:
    """The result of C2."""
    equal: list[bool] = []
    with shaped_link(directory / "shards") as url:
        storage.configure(StorageConfig(endpoint=url, region="us-east-1", anonymous=True))
        sides = sides_of_c2(directory, url, equal)
        before = counts(url)["gets"]
        sides["ours"]()
        gets = (counts(url)["gets"] - before) / ((1 + (1 + PERIODS) * PERIOD) * BATCH)
        found = rounds(sides, count)
        served = counts(url)
    storage.configure(StorageConfig())
    link = [LINK_BYTES_S] * count
    against = {
        f"vs_{name}": ratios(found["ours"], found[name]) for name in ("pipe", "s3fs_sequential", "s3fs_default_block")
    }
    against |= {"vs_link": ratios(found["ours"], link), "vs_link_faulty": ratios(found["faulty"], link)}
    gates = {"hash of every stream, timed ones too": all(equal), "GETs of one per sample <= 1/32": gets <= 1 / 32}
    setting = SETTING | {
        "first_byte_s": FIRST_BYTE_S,
        "connection_bytes_s": CONNECTION_BYTES_S,
        "link_bytes_s": LINK_BYTES_S,
        "fault_share": FAULT_SHARE,
        "read_threads": READ_THREADS,
        "prefetch_blocks": PREFETCH_BLOCKS,
        "blocks_in_a_round": PERIODS * LANES,
        "s3fs_block_bytes": PIECE,
    }
    extra = {"gets_per_sample": gets, "served": served}
    return result("C2", LIMITS["C2"], against, gates, {"unit": "bytes of shards/s", **found}, setting, COMMAND, **extra)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--official", default="", help="checkout of the official code")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds")
    parser.add_argument("--only", choices=sorted(LIMITS), help="one of the two")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    arguments = parser.parse_args()
    if not arguments.official or not Path(arguments.official, "datasets.py").is_file():
        print(f"OFFICIAL={arguments.official}: no official code there; git clone https://github.com/baofff/U-ViT DIR, "
              "then make bench-data OFFICIAL=DIR", file=sys.stderr)  # fmt: skip
        return 2
    warnings.filterwarnings("ignore", module="webdataset")
    records = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_data(directory)
        forget_pages(directory)
        if arguments.only != "C2":
            records.append(measure_c1(directory, Path(arguments.official).resolve(), arguments.rounds))
            show(records[-1])
        if arguments.only != "C1":
            records.append(measure_c2(directory, arguments.rounds))
            show(records[-1])
    for record in records:
        keep(record, arguments.out)
    return 0 if all(record["passed"] for record in records) else 1


if __name__ == "__main__":
    raise SystemExit(main())
