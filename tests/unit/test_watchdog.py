"""A rank's watchdog and the supervisor's end of it: real processes, real connections."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.tiny import ROOT
from uvit_dist.beats import BeatServer, serve
from uvit_dist.errors import HANG_EXIT_CODE

RANK = """
import os, sys, threading, time
from uvit_dist import watchdog
rank, log = int(os.environ["RANK"]), os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
asked = threading.Event()
watchdog.register_stacks(log)
watchdog.start(rank, log, asked.set)
def stand_still_here():
    while not asked.wait(0.05):
        if os.path.exists(sys.argv[1] + ".go"):
            watchdog.progress("training", 3)
stand_still_here()
watchdog.end(75, "stopped, as asked")
"""


class Ranks:
    def __init__(self, directory):
        self.directory, self.processes = directory, []
        self.server = BeatServer("127.0.0.1", fence_s=3.0)

    def start(self, *ranks, token="token"):
        for rank in ranks:
            environment = {**os.environ, "RANK": str(rank), "SLURMD_NODENAME": f"n{rank}",
                           "UVIT_DIST_SUPERVISOR": f"127.0.0.1:{self.server.port}:{token}"}  # fmt: skip
            command = [sys.executable, "-c", RANK, str(self.log(rank))]
            self.processes.append(subprocess.Popen(command, env=environment, cwd=ROOT))

    def log(self, rank):
        return self.directory / f"rank-{rank}.log"

    def wait_for(self, condition, what):
        deadline = time.monotonic() + 120
        while not condition(self.server.views()):
            assert time.monotonic() < deadline, (what, self.server.views())
            time.sleep(0.05)
        return self.server.views()


@pytest.fixture
def ranks(tmp_path):
    with contextlib.ExitStack() as held:
        made = Ranks(tmp_path)
        held.callback(made.server.close)
        held.callback(lambda: [(process.kill(), process.wait()) for process in made.processes])
        yield made


@pytest.mark.slow
def test_progress_is_told_and_stop_reaches_all_also_those_that_come_later(ranks):
    ranks.server.expect("token", 2)
    ranks.start(0)
    (first, second) = ranks.wait_for(lambda views: views[0].count == 0, "a beat")
    assert (first.host, first.pid, first.phase, first.step) == ("n0", ranks.processes[0].pid, "starting", None)
    assert not second.connected
    ranks.log(0).with_name("rank-0.log.go").touch()
    moving = ranks.wait_for(lambda views: views[0].count > 2, "progress")[0]
    assert (moving.phase, moving.step) == ("training", 3)
    ranks.server.ask_to_stop()
    ranks.start(1)
    ends = ranks.wait_for(lambda views: all(view.end for view in views), "the last words")
    assert [view.end for view in ends] == [(75, "stopped, as asked", False)] * 2
    assert [process.wait() for process in ranks.processes] == [0, 0]
    assert [view.gone_at for view in ranks.server.views()] == [None, None]


@pytest.mark.slow
def test_a_killed_rank_is_gone_at_once_and_a_stopped_one_falls_silent(ranks):
    ranks.server.expect("token", 2)
    ranks.start(0, 1)
    ranks.wait_for(lambda views: all(view.count == 0 for view in views), "beats")
    ranks.processes[0].kill()
    gone = ranks.wait_for(lambda views: views[0].gone_at is not None, "its end")[0]
    assert (gone.end, gone.connected) == (None, False)
    os.kill(ranks.processes[1].pid, signal.SIGSTOP)
    views = ranks.wait_for(lambda views: time.monotonic() - views[1].heard_at > 2.5, "silence")
    assert views[1].connected


def test_stacks_are_shown_when_asked_and_by_a_signal_also_of_a_stopped_rank(ranks):
    ranks.server.expect("token", 2)
    ranks.start(0, 1)
    ranks.wait_for(lambda views: all(view.count == 0 for view in views), "beats")
    os.kill(ranks.processes[1].pid, signal.SIGSTOP)
    os.waitid(os.P_PID, ranks.processes[1].pid, os.WSTOPPED | os.WNOWAIT)  # all its threads
    ranks.server.tell_all(stacks=True)
    ranks.wait_for(lambda views: views[0].dumped, "the stacks of rank 0")
    assert not ranks.server.views()[1].dumped
    os.kill(ranks.processes[1].pid, signal.SIGUSR1)
    os.kill(ranks.processes[1].pid, signal.SIGCONT)
    ranks.wait_for(lambda views: views[1].dumped, "the stacks of rank 1")
    for rank in (0, 1):
        text = ranks.log(rank).read_text()
        assert "in stand_still_here" in text
        assert f"rank {rank}: the stacks of all threads, as the supervisor asked" in text


@pytest.mark.slow
def test_a_rank_that_nobody_answers_ends_itself(ranks):
    ranks.server.expect("token", 1)
    ranks.start(0)
    ranks.wait_for(lambda views: views[0].count == 0, "a beat")
    time.sleep(1.5)
    ranks.server.close()
    assert ranks.processes[0].wait(timeout=30) == HANG_EXIT_CODE
    text = ranks.log(0).read_text()
    assert "no supervisor has answered for 3 s: this rank ends itself" in text
    assert "in stand_still_here" in text


@pytest.mark.slow
def test_a_connection_that_breaks_is_made_anew(ranks):
    ranks.server.expect("token", 1)
    ranks.start(0)
    before = ranks.wait_for(lambda views: views[0].count == 0, "a beat")[0]
    ranks.server.expect("token", 1)  # drops all connections
    again = ranks.wait_for(lambda views: views[0].count == 0, "a beat on a new connection")[0]
    assert again.pid == before.pid
    assert ranks.processes[0].poll() is None


def test_told_to_die_it_does(ranks):
    ranks.server.expect("token", 1)
    ranks.start(0)
    ranks.wait_for(lambda views: views[0].count == 0, "a beat")
    ranks.server.tell_all(die=True)
    assert ranks.processes[0].wait(timeout=30) == HANG_EXIT_CODE


@pytest.mark.slow
def test_strangers_and_ranks_of_an_older_round_are_not_heard(ranks):
    ranks.server.expect("new", 1)
    ranks.start(0, token="old")
    for words in (
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"hello": "new", "rank": 7, "host": "n7", "pid": 1}\n',
        b"x" * (1 << 17),
    ):
        with socket.create_connection(("127.0.0.1", ranks.server.port)) as stranger, contextlib.suppress(OSError):
            stranger.sendall(words)
            stranger.settimeout(30)
            assert stranger.recv(1) == b"", "it is hung up on"
    time.sleep(1.0)
    assert not ranks.server.views()[0].connected
    assert ranks.processes[0].poll() is None, "it ends only when its fencing time is over"


def test_the_server_listens_where_the_hosts_reach_it():
    name, server = serve("localhost", ["localhost"], 1.0)
    with contextlib.closing(server):
        assert name == "localhost"
        assert server._listener.getsockname()[0] == "127.0.0.1"
