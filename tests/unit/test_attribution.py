"""What is told apart: bits, ranks whose weights differ, slow ranks, samples that stand out."""

import json
import math
import re

import pytest
import torch

from tests.tiny import tiny_config
from tests.unit.test_attempts import life
from uvit_dist import attempts, faults, health
from uvit_dist.attribution import outliers
from uvit_dist.beats import RankView
from uvit_dist.checksums import checksum, flip_bit
from uvit_dist.config_health import StragglersConfig
from uvit_dist.errors import ConfigError
from uvit_dist.replay import at_fault
from uvit_dist.stragglers import ForwardClock, Stragglers, ratios
from uvit_dist.verdicts import verdict_of_end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (64,), (5, 13)])
def test_one_flipped_bit_anywhere_is_another_checksum(dtype, shape):
    value = torch.randn(shape, dtype=dtype)
    whole = checksum(value)
    assert checksum(value.clone()) == whole
    assert whole.dtype == torch.int64
    for bit in (0, 5, 14):
        assert checksum(flip_bit(value.clone(), bit)) != whole
    if shape:
        last = value.clone()
        flip_bit(last.view(-1)[-1], 3)
        assert checksum(last) != whole


def test_two_flips_of_the_same_bit_do_not_cancel():
    value = torch.randn(2, 1000)
    bits = value.view(torch.int32) & 1
    up, down = int((bits[0] == 0).nonzero()[0, 0]), int((bits[1] == 1).nonzero()[0, 0])
    twice = value.clone()
    flip_bit(twice[0, up], 0)
    flip_bit(twice[1, down], 0)
    assert checksum(twice) != checksum(value)


def test_a_checksum_is_of_the_bits_wherever_they_lie():
    buffer = torch.randn(40)
    assert checksum(buffer[3:30]) == checksum(buffer[3:30].clone()), "at any offset"
    square = torch.randn(6, 6)
    assert checksum(square.t()) == checksum(square.t().contiguous())
    assert checksum(torch.tensor([math.nan, 0.0])) == checksum(torch.tensor([math.nan, 0.0])), "NaN, too, has bits"
    assert checksum(torch.tensor([0.0, 1.0])) != checksum(torch.tensor([-0.0, 1.0]))


@pytest.mark.parametrize(
    ("copies", "masters", "ranks", "sound"),
    [
        ([[1, 2], [1, 2]], [1, 2], [], True),
        ([[1, 2], [9, 2]], [1, 2], [1], True),  # two ranks: the owner of a part tells
        ([[8, 2], [1, 9]], [1, 2], [0, 1], True),
        ([[1, 2], [1, 2]], [1, 9], [1], False),  # the owner itself has changed: all copies say so
        ([[9]], [1], [0], True),
        ([[7], [7], [5]], [None] * 3, [2], True),
        ([[7], [5]], [None] * 2, [0, 1], True),  # no majority: suspects
        ([[7], [7], [5], [5]], [None] * 4, [0, 1, 2, 3], True),
        ([[7], [7], [5], [6]], [None] * 4, [0, 1, 2, 3], True),
        ([[7], [7], [7], [5], [6]], [None] * 5, [3, 4], True),
    ],
)
def test_whose_weights_are_wrong(copies, masters, ranks, sound):
    assert at_fault(copies, masters) == (ranks, sound)


def test_a_rank_is_slow_against_the_others_not_against_itself():
    assert ratios([1.0, 2.0]) == [0.5, 2.0]
    assert ratios([1.0]) == [1.0]
    of_two_nodes = ratios([1.0] * 8 + [2.0] * 8)
    assert max(of_two_nodes[:8]) < 1 < 1.3 < min(of_two_nodes[8:]), "a slow node of two"


def test_a_slow_rank_is_named_once_after_so_many_times_in_a_row():
    watch = Stragglers(StragglersConfig(ratio=1.5, gathers=3), ["n0", "n0", "n1"])
    slow, well = [1.0, 1.0, 1.6], [1.0, 1.0, 1.4]
    named = [sorted(watch.hear(times)) for times in (slow, slow, well, slow, slow, slow, slow, well, slow, slow, slow)]
    assert named == [[], [], [], [], [], [2], [], [], [], [], [2]]
    assert watch.hear(slow) == {}
    (told,) = Stragglers(StragglersConfig(ratio=1.5, gathers=1), ["n0", "n0", "n1"]).hear(slow).values()
    assert told.startswith("rank 2 on n1 is slow") and "1.60 times the median" in told  # noqa: PT018


def test_the_clock_counts_forward_passes_alone_and_takes_the_median_step():
    clock, now = ForwardClock(torch.device("cpu")), iter([0.0, 3.0, 10.0, 11.0, 12.0, 14.0, 20.0, 120.0])
    clock._now = lambda: next(now)

    class Gathers:
        def fetch(self):
            return "weights"

    gathers = Gathers()
    clock.leave_out(gathers, "fetch")
    with clock.forward():
        pass
    assert gathers.fetch() == "weights", "outside of a forward pass it is not timed"
    clock.step_over()  # 3 s
    with clock.forward():
        gathers.fetch()  # 4 s, of which 1 s waits
    clock.step_over()
    with clock.forward():
        pass
    clock.step_over()  # 100 s: a compilation
    assert clock.take() == 3.0
    assert clock.take() == 0.0


def test_samples_that_stand_out():
    plain = [(n, 1.0 + n / 10, 4.0) for n in range(8)]
    assert outliers(plain) == []
    assert outliers([*plain, (8, math.nan, 3.0)]) == [(8, math.nan, 3.0)]
    assert outliers([*plain, (8, 1.0, math.inf), (9, 99.0, 3.0)]) == [(8, 1.0, math.inf)], "nothing is above infinity"
    assert outliers([*plain, (8, 1.0, 5000.0), (9, 99.0, 3.0)]) == [(8, 1.0, 5000.0), (9, 99.0, 3.0)]


def test_findings_are_read_back_and_torn_lines_passed_over(tmp_path):
    assert health.findings(tmp_path) == []
    health.note(str(tmp_path), 4, health.GRADIENT, "wrong", [1], ["n1"])
    health.note(str(tmp_path), 9, health.WEIGHTS, "wrong", [0, 1], ["n1", "n1"])
    health.note(str(tmp_path), 9, health.STRAGGLER, "slow", [2], ["n2"])
    with open(tmp_path / health.FILE, "a") as file:
        file.write('{"kind": "strag')
    assert [one["step"] for one in health.findings(tmp_path)] == [4, 9, 9]
    assert health.disagreements(tmp_path) == {"n1": 2}
    assert health.slow_hosts(tmp_path, since=0.0) == ["n2"]
    assert health.slow_hosts(tmp_path, since=health.findings(tmp_path)[-1]["time"] + 1) == []
    health.note(str(tmp_path / "no" / "such"), 1, health.DATA, "x", [], [], samples=[3])
    assert json.loads((tmp_path / "no/such" / health.FILE).read_text())["samples"] == [3]


def test_a_host_that_computes_wrongly_is_left_out_at_once_and_suspects_are_not():
    ended = RankView(0, "n0", end=(71, "step 3: rank 1 on n1: two results", True), blamed=(1,), ended_at=1.0)
    verdict = verdict_of_end([ended, RankView(1, "n1", gone_at=1.0)], 71, None, False, False)
    assert (verdict.cause, verdict.exit_code, verdict.ranks) == ("hardware", 71, (1,))
    assert attempts.hosts_to_exclude(life("attempt", "hardware")) == ["n1"]
    suspects = life("attempt", "hardware")
    suspects[-1]["hosts"] = ["n1", "n2"]
    assert attempts.hosts_to_exclude(suspects) == []
    slow = life("attempt", "rank_died")
    slow[-1] |= {"hosts": [], "slow_hosts": ["n3"]}
    assert attempts.hosts_to_exclude(slow) == ["n3"]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["attribution.replay=true"], "attribution.replay needs train.deterministic true"),
        (["attribution.replay_every=5"], "attribution.replay_every needs attribution.replay true"),
        (["attribution.weights_every=5", "zero.stage=3"], "attribution.weights_every: at zero.stage 3 ranks have no"),
    ],
)
def test_what_cannot_be_asked_for(tmp_path, keys, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        tiny_config(tmp_path, tmp_path, *keys)


def test_a_flip_is_asked_for_at_its_point(monkeypatch):
    monkeypatch.setenv("UVIT_FAULT", "flip@rank0,gradient:silent#2;sleep0@all,step:forward#*")
    monkeypatch.setenv("RANK", "0")
    assert [faults.point("gradient:silent") for _ in range(3)] == [False, True, False]
    assert not faults.point("step:forward")
