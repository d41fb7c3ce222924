"""Ranges of files: read where they belong, checked one by one, the same in C and in Python."""

import os

import numpy as np
import pytest
import xxhash

from uvit_dist.data import ranges
from uvit_dist.data.ranges import DIFFERENT, SHORT, WHOLE, Ranges, read_ranges
from uvit_dist.errors import NoSuchFileError

SIZES = (1, 16, 240, 241, 1000, 65_536, 200_001, 400_003)
"""On both sides of where XXH3 changes its ways, and of what is read to its place at once."""


AMOUNTS = {"C": (320 << 10, 1 << 10), "C, as on an AMD": (2 << 20, 4 << 10)}


@pytest.fixture(params=[*AMOUNTS, "Python"])
def way(request, monkeypatch):
    if request.param == "Python":
        monkeypatch.setattr(ranges, "kernel", lambda: None)
    else:
        assert ranges.kernel() is not None, "no C compiler, or an xxhash that shows no XXH3"
        assert ranges.amounts() in AMOUNTS.values()
        monkeypatch.setattr(ranges, "amounts", lambda: AMOUNTS[request.param])
    return request.param


GAPS = (0, 1, 4096, 4097, 0, 511, 60_000)
"""Between ranges: some are read together, some are too far from each other."""


@pytest.fixture(params=["in order", "backwards", "many in order", "each at a line of the cache"])
def case(tmp_path, request):
    """A file, ranges of it, and the memory they go to."""
    content = np.random.default_rng(1).bytes(4 * sum(SIZES) + 100_000)
    path = tmp_path / "file"
    path.write_bytes(content)
    sizes = np.array([300] * 45 if request.param == "many in order" else SIZES)
    gaps = np.resize(GAPS[:3] if request.param == "many in order" else GAPS, len(sizes))
    starts = 7 + np.cumsum(gaps) + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    if request.param == "backwards":
        sizes, starts = sizes[::-1].copy(), starts[::-1].copy()
    rooms = -(-sizes // 64) * 64 if request.param == "each at a line of the cache" else sizes
    memory = np.zeros(rooms.sum() + 64, dtype=np.uint8)
    begin = -memory.ctypes.data % 64
    to = np.uint64(memory.ctypes.data + begin) + np.concatenate([[0], np.cumsum(rooms)[:-1]]).astype(np.uint64)
    hashes = [xxhash.xxh3_64_intdigest(content[a : a + n]) for a, n in zip(starts, sizes, strict=True)]
    wanted = Ranges(starts, sizes, np.array(hashes, dtype=np.uint64), to, np.arange(len(sizes)))
    return path, content, wanted, memory


def test_each_range_goes_to_its_place(case, way):
    path, content, wanted, memory = case
    assert read_ranges(str(path), wanted).tolist() == [WHOLE] * len(wanted)
    expected, base = np.zeros_like(memory), memory.ctypes.data
    for begin, end, to in zip(wanted.starts, wanted.ends, wanted.to.tolist(), strict=True):
        expected[to - base : to - base + end - begin] = np.frombuffer(content[begin:end], dtype=np.uint8)
    assert np.array_equal(memory, expected)


def test_a_flipped_bit_and_the_end_of_the_file_are_told_of_the_range_they_are_in(case, way):
    path, content, wanted, _ = case
    for number, (begin, end) in enumerate(zip(wanted.starts.tolist(), wanted.ends.tolist(), strict=True)):
        for place in {begin, (begin + end) // 2, end - 1}:
            flipped = bytearray(content)
            flipped[place] ^= 1
            path.write_bytes(flipped)
            assert np.flatnonzero(read_ranges(str(path), wanted) == DIFFERENT).tolist() == [number]
    for number in range(len(wanted)):
        path.write_bytes(content[: wanted.ends[number] - 1])
        short = np.flatnonzero(wanted.ends > wanted.ends[number] - 1).tolist()
        assert number in short
        assert np.flatnonzero(read_ranges(str(path), wanted) == SHORT).tolist() == short


def test_what_cannot_be_read_is_an_error_of_the_system(case, way, tmp_path):
    _, _, wanted, _ = case
    with pytest.raises(NoSuchFileError):
        read_ranges(str(tmp_path / "absent"), wanted)
    with pytest.raises(IsADirectoryError):
        read_ranges(str(tmp_path), wanted)


def test_without_a_compiler_python_reads(monkeypatch, tmp_path):
    monkeypatch.setenv("UVIT_DIST_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", os.path.join(tmp_path, "no-compiler"))
    assert ranges.kernel.__wrapped__() is None
