"""The cache of parts: bounded, least recently used first, shared; a disk that refuses turns it off, no more."""

import errno
import logging
import multiprocessing
import os
import time

import pytest

from uvit_dist.storage import remote
from uvit_dist.storage.part_cache import PartCache

PART = 1000


def part(number):
    return memoryview(bytes([number % 256]) * PART)


def name(number):
    return f"{number:040x}"


def held(directory):
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and path.name != "ledger")


def test_a_part_is_read_back_and_the_limit_holds(tmp_path):
    cache = PartCache(str(tmp_path), 10 * PART)
    before = remote.COUNTS.snapshot()
    view = memoryview(bytearray(PART))
    assert not cache.read_into(name(0), view)
    for number in range(8):
        cache.write(name(number), part(number))
    assert cache.read_into(name(0), view)
    assert view == part(0)
    now = remote.COUNTS.snapshot()
    assert (now.cache_hits - before.cache_hits, now.cache_misses - before.cache_misses) == (1, 1)
    for number in range(8, 40):
        cache.write(name(number), part(number))
        assert held(tmp_path) <= 10 * PART
    assert cache.read_into(name(39), view)
    assert not cache.read_into(name(39), memoryview(bytearray(PART - 1))), "of another size"
    cache.drop(name(39))
    assert not cache.read_into(name(39), view)


def test_what_was_used_last_stays(tmp_path):
    cache = PartCache(str(tmp_path), 10 * PART)
    view = memoryview(bytearray(PART))
    for number in range(9):
        cache.write(name(number), part(number))
        os.utime(cache._path(name(number)), (number, number))
    assert cache.read_into(name(2), view)
    for number in range(9, 13):
        cache.write(name(number), part(number))
    there = [number for number in range(13) if cache._path(name(number)).exists()]
    assert 2 in there
    assert 0 not in there
    assert 12 in there


def test_a_ledger_that_a_killed_process_left_wrong_is_corrected(tmp_path):
    cache = PartCache(str(tmp_path), 10 * PART)
    cache.write(name(0), part(0))
    (tmp_path / "parts/ledger").write_bytes(b"9900")
    abandoned = cache._path(name(1)).with_name("x.tmp-1")
    abandoned.write_bytes(b"x" * PART)
    for number in range(1, 9):
        cache.write(name(number), part(number))
    assert all(cache._path(name(number)).exists() for number in range(1, 9))
    for number in range(9, 12):
        cache.write(name(number), part(number))
    assert not abandoned.exists()
    (tmp_path / "parts/ledger").write_bytes(b"nonsense")
    cache.write(name(50), part(50))
    assert cache._path(name(50)).exists()


def fill(directory, first):
    cache = PartCache(directory, 20 * PART)
    view = memoryview(bytearray(PART))
    for number in range(first, first + 200):
        cache.write(name(number % 60), part(number % 60))
        if cache.read_into(name((number * 7) % 60), view):
            assert view == part((number * 7) % 60), "a part is whole or not there"


def test_processes_share_it_and_keep_the_limit_together(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(str(tmp_path), 17 * k)) for k in range(4)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        assert held_or_less(tmp_path) <= 20 * PART
        time.sleep(0.01)
    assert [process.exitcode for process in processes] == [0] * 4
    assert 0 < held(tmp_path) <= 20 * PART


def held_or_less(directory):
    total = 0
    for path in list(directory.rglob("*")):
        try:
            total += path.stat().st_size if path.is_file() and path.name != "ledger" else 0
        except FileNotFoundError:
            continue
    return total


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_refuses_turns_it_off_with_one_warning(tmp_path, monkeypatch, caplog, number):
    cache = PartCache(str(tmp_path), 10 * PART)

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache, "_make_room", refuse)
    with caplog.at_level(logging.WARNING, "uvit_dist"):
        cache.write(name(0), part(0))
        cache.write(name(1), part(1))
    assert caplog.text.count("cannot be written") == 1
    assert os.strerror(number) in caplog.text
    assert not cache.read_into(name(0), memoryview(bytearray(PART)))
    assert held(tmp_path) == 0


def test_a_disk_that_is_really_full(tmp_path):
    """/dev/full refuses every byte as a full disk does."""
    cache = PartCache(str(tmp_path), 10 * PART)
    cache._path(name(0)).parent.mkdir(parents=True)
    (tmp_path / "parts" / "ledger").symlink_to("/dev/full")
    cache.write(name(0), part(0))
    assert held(tmp_path) == 0
    assert not cache._on
