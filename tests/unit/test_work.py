"""Leases: one live worker for each unit, told by files alone; who falls silent or dies loses it."""

import json
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from uvit_dist import storage, work
from uvit_dist.errors import DataError
from uvit_dist.work import Leases, SharedWork, holders, newest_leases

LEASE_S = 600.0
"""Longer than any test: signs of life are given here by hand."""


@pytest.fixture(params=["path", "URL"])
def directory(request, tmp_path):
    return str(tmp_path / "leases") if request.param == "path" else f"memory://{tmp_path.name}/leases"


@pytest.fixture
def workers(directory):
    """Makes workers on one directory, each as if on a machine of its own."""
    made = []

    def make(**identity):
        leases = Leases(directory, LEASE_S)
        leases.us = {**leases.us, "machine": f"machine {len(made)}", **identity}
        made.append(leases)
        return leases

    yield make
    for leases in made:
        leases.close()


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the workers think have passed."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(work, "time", clock)
    return clock


def names(directory):
    return list(storage.sizes_in(directory))


def test_of_many_workers_one_gets_a_unit(workers, directory):
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda leases: leases.claim("unit-1", []), [workers() for _ in range(8)]))
    assert got.count(True) == 1
    assert newest_leases(names(directory)) == {"unit-1": 0}


def test_who_shows_life_keeps_its_unit_for_ever(workers, directory, clock):
    holder, other = workers(), workers()
    assert holder.claim("unit-1", names(directory))
    for _ in range(5):
        assert not other.claim("unit-1", names(directory))
        clock.now += 0.9 * LEASE_S
        holder.show_life()
    assert not other.claim("unit-1", names(directory))


def test_who_is_silent_for_the_lease_loses_its_unit_to_one_other(workers, directory, clock):
    holder, others = workers(), [workers(), workers()]
    assert holder.claim("unit-1", names(directory))
    listed = names(directory)
    assert not any(other.claim("unit-1", listed) for other in others)
    clock.now += 0.99 * LEASE_S
    assert not any(other.claim("unit-1", listed) for other in others)
    clock.now += 0.02 * LEASE_S
    assert [other.claim("unit-1", listed) for other in others] == [True, False]
    assert newest_leases(names(directory)) == {"unit-1": 1}

    holder.show_life()  # it was only slow, and does not know
    assert not others[1].claim("unit-1", names(directory)), "the newest lease counts"
    others[0].release("unit-1")
    assert names(directory) == []


def test_a_worker_that_has_seen_nothing_yet_waits_the_whole_lease(workers, directory, clock):
    holder = workers()
    assert holder.claim("unit-1", names(directory))
    clock.now += 100 * LEASE_S
    late = workers()
    assert not late.claim("unit-1", names(directory)), "clocks of machines are not compared"


def test_a_holder_known_to_be_dead_is_not_waited_for(workers, directory):
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead = workers(machine="here", pid=ended.pid, started="12345")
    assert dead.claim("unit-1", names(directory))
    assert not workers(machine="elsewhere").claim("unit-1", names(directory)), "its processes are not to be seen"
    assert workers(machine="here").claim("unit-1", names(directory))


def test_a_live_process_of_this_machine_is_not_taken_for_dead(directory):
    one, two = Leases(directory, LEASE_S), Leases(directory, LEASE_S)
    try:
        assert one.us["machine"] == two.us["machine"]
        assert one.claim("unit-1", [])
        assert not two.claim("unit-1", names(directory))
    finally:
        one.close()
        two.close()


def test_a_released_unit_is_free_and_a_closed_worker_holds_none(workers, directory):
    one, two = workers(), workers()
    assert one.claim("unit-1", [])
    assert one.claim("unit-2", names(directory))
    one.release("unit-1")
    assert two.claim("unit-1", names(directory))
    one.close()
    assert newest_leases(names(directory)) == {"unit-1": 0}


def test_a_holder_tells_how_far_it_is(workers, directory):
    holder = workers()
    holder.claim("unit-1", [])
    assert holders(directory, names(directory))["unit-1"]["progress"] == {}
    holder.note("unit-1", images=7)
    holder.note("unit-2", images=9)
    holder.show_life()
    told = holders(directory, [*names(directory), "unit-3.lease-0", "other.txt"])
    assert told.keys() == {"unit-1"}
    assert told["unit-1"]["progress"] == {"images": 7}
    assert told["unit-1"]["token"] == holder.us["token"]


def test_a_lease_that_cannot_be_read_is_waited_for(workers, directory, clock):
    storage.make_directory(directory)
    storage.write_bytes(storage.join(directory, "unit-1.lease-0"), json.dumps(["half"]).encode()[:3])
    other = workers()
    assert not other.claim("unit-1", names(directory))
    clock.now += 1.01 * LEASE_S
    assert other.claim("unit-1", names(directory))


@pytest.fixture
def shared(directory):
    """Makes workers on one set of units, each as if on a machine of its own."""
    made = []

    def make(units=("a", "b", "c"), beside=()):
        worker = SharedWork(directory, units, LEASE_S, beside)
        worker._leases.us = {**worker._leases.us, "machine": f"machine {len(made)}"}
        worker._poll_s = 0.01
        made.append(worker)
        return worker

    yield make
    for worker in made:
        worker.close()


def result(number):
    return {"n": np.array(number)}


def test_units_are_dealt_to_whoever_is_free_each_once(shared):
    workers, done = [shared([f"unit-{n}" for n in range(20)]) for _ in range(4)], []

    def work(worker):
        while (unit := worker.claim()) is not None:
            worker.put(unit, result(int(unit.split("-")[1])))
            done.append(unit)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, workers))
    assert sorted(done) == sorted(workers[0].units), "each once"
    assert workers[0].missing() == []
    assert [int(found["n"]) for found in workers[0].results()] == list(range(20)), "in order of the units"
    assert newest_leases(names(workers[0].directory)) == {}


def test_a_unit_is_done_when_all_its_files_are_there(shared):
    worker = shared(["a"], [".tar"])
    assert worker.claim() == "a"
    worker.put("a", result(1))
    assert worker.claim() == "a", "without its shard it is done again"
    storage.write_bytes(worker.path("a", ".tar"), b"")
    worker.put("a", result(1))
    assert worker.claim() is None


def test_a_listing_that_lags_behind_costs_a_look_at_each_unit_and_no_more(shared, monkeypatch):
    units = [f"unit-{n}" for n in range(5)]
    worker, late = shared(units), shared(units)
    while (unit := worker.claim()) is not None:
        worker.put(unit, result(1))
    listings = []
    monkeypatch.setattr(storage, "names_in", lambda directory: listings.append(directory) or set())
    assert late.claim() is None
    assert len(listings) == len(units) + 1
    left = sorted(storage.sizes_in(late.directory))
    assert left == [f"{unit}.npz" for unit in units], "no lease is left"


def test_what_is_made_of_all_is_made_once_and_by_another_if_its_maker_fails(shared):
    made, workers = [], [shared() for _ in range(6)]
    path = workers[0].path("whole", ".txt")

    def found():
        return storage.read_bytes(path).decode() if storage.exists(path) else None

    def make():
        made.append(1)
        if len(made) == 1:
            raise DataError("the first one fails")
        storage.write_bytes(path, b"made")
        return "made"

    def ask(worker):
        try:
            return worker.once("whole", found, make)
        except DataError:
            return "failed"

    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(ask, workers))
    assert sorted(got) == ["failed", *["made"] * 5]
    assert len(made) == 2


def test_a_worker_with_nothing_to_do_looks_after_a_few_units_at_a_time_and_finds_the_dead_one(
    workers, clock, directory
):
    units = [f"unit-{number:02d}" for number in range(3 * work.WATCHED)]
    holder, dead, idle = workers(), workers(), workers()
    assert sorted(holder.claims(units[:-1], [])) == units[:-1]
    assert list(dead.claims(units[-1:], [])) == units[-1:]
    read = Counter()

    def look():
        before = idle._is_silent
        idle._is_silent = lambda unit, generation: read.update([unit]) or before(unit, generation)
        taken = list(idle.claims(units, names(directory)))
        idle._is_silent = before
        return taken

    for _ in range(40):
        read.clear()
        taken = look()
        assert len(read) <= work.WATCHED
        if taken:
            break
        holder.show_life()
        clock.now += LEASE_S / 4
    assert taken == units[-1:], "its holder showed no life, all others did"


def test_a_worker_whose_claims_fail_looks_again_at_what_is_free(workers, directory, monkeypatch):
    units = [f"unit-{number:03d}" for number in range(100)]
    early, late = workers(), workers()
    before = early.claims(units, [])
    assert len({next(before) for _ in range(90)}) == 90
    tried = []
    create = storage.create
    monkeypatch.setattr(storage, "create", lambda path, content: tried.append(path) or create(path, content))
    assert len(list(late.claims(units, []))) == 10, "its list was of before"
    assert len(tried) < 10 + 2 * work.MISSES
