"""What is tried and what is left out, by the forecast; and the process that measures, killed."""

import os
import signal
import time

import pytest
from ruamel.yaml import YAML

from tests.tiny import DEMO, ROOT
from uvit_dist import forecast, tune, tuning
from uvit_dist.config_yaml import load_config
from uvit_dist.errors import ConfigError
from uvit_dist.tuning import GB, Candidate

H = ROOT / "configs" / "uvit_h_imagenet512.yaml"


def test_what_fits_is_tried_with_the_least_recomputation_and_sharding():
    config = load_config(H)
    candidates, left_out = tuning.propose(config, 32, 80 * GB)
    assert candidates[0] == tuning.own_setting(config, 32) == Candidate(32, True, 1)
    assert candidates[1] == Candidate(32, False, 1)
    assert {c.micro for c in candidates} == {1, 2, 4, 8, 16, 32}, "divisors of a rank's 32 images"
    assert all(c.checkpointing is False and c.stage == 1 for c in candidates[1:]), "all kept fits everywhere"
    reasons = dict(left_out)
    assert reasons["micro-batch 32, products kept, ZeRO-1"] == "all kept fits too, and computes less"
    assert "ZeRO-1 sends as many bytes" in reasons["ZeRO-0"]


def test_where_memory_is_short_more_is_recomputed_or_sharded():
    config = load_config(H)
    need = {kind: tuning.memory(config, Candidate(32, kind, 1), 32).total for kind in forecast.KEPT}
    assert need[False] > need["selective"] > need[True]
    candidates, _ = tuning.propose(config, 32, need["selective"])
    assert Candidate(32, "selective", 1) in candidates
    assert Candidate(32, False, 1) not in candidates
    assert Candidate(16, False, 1) in candidates
    two = tuning.memory(config, Candidate(32, False, 2), 32).total
    candidates, _ = tuning.propose(config, 32, two)
    assert Candidate(32, False, 2) in candidates
    assert Candidate(32, "selective", 1) in candidates, "recomputes more and shards less: only measuring can tell"
    told = [why for what, why in tuning.propose(config, 32, need[True])[1] if what == "micro-batch 32, all kept"]
    assert f"{need[False] / GB:.1f} GB at ZeRO-1" in told[0]


def test_the_global_batch_stays_and_the_choice_can_be_pasted():
    config = load_config(H)
    candidates, _ = tuning.propose(config, 32, 40 * GB)
    for candidate in candidates:
        assert tuning.passes(config, candidate, 32) * candidate.micro * 32 == config.train.global_batch_size
        assert load_config(H, candidate.overrides()) == candidate.applied(config)
        pasted = YAML(typ="safe").load(tuning.as_yaml(candidate))
        assert pasted == {"model": {"use_checkpoint": candidate.checkpointing}, "zero": {"stage": candidate.stage},
                          "train": {"micro_batch_size": candidate.micro}}  # fmt: skip


def test_what_the_rules_of_the_configuration_forbid_is_not_tried():
    config = load_config(H, ["speed.compile=true", "speed.cuda_graphs=true", "model.use_checkpoint=false"])
    candidates, left_out = tuning.propose(config, 32, 80 * GB)
    assert all(c.checkpointing is not True and c.stage in (1, 2) for c in candidates)
    assert any("cuda_graphs" in why for _, why in left_out)
    alone, _ = tuning.propose(load_config(DEMO, ["launch.processes_per_node=1", "train.precision=bf16"]), 1, 80 * GB)
    assert {c.stage for c in alone} == {1}


def test_nothing_fits_and_what_would():
    config = load_config(H)
    with pytest.raises(ConfigError, match=r"nothing fits: 500,942,656 parameters on 8 .*, or (16|32|64) ranks"):
        tuning.propose(config, 8, 5.6 * GB)
    with pytest.raises(ConfigError, match=r"micro-batch 1, blocks recomputed, ZeRO-[23].* or a smaller network"):
        tuning.propose(config, 8, 1 * GB)


def test_small_micro_batches_are_not_measured_once_they_have_become_slower():
    rates = {Candidate(32, False, 1): 100.0, Candidate(16, False, 1): 90.0, Candidate(16, True, 1): 50.0}
    assert tuning.skipped(Candidate(8, False, 1), rates) == "16 images were slower than 32 already"
    assert tuning.skipped(Candidate(8, True, 1), rates) is None
    assert tuning.skipped(Candidate(8, False, 1), {**rates, Candidate(16, False, 1): 110.0}) is None
    assert tuning.fastest(rates) == Candidate(32, False, 1)


def test_one_ranks_part_of_an_update():
    config = load_config(H, ["launch.nodes=1"])
    part = tune.trial_config(config, Candidate(8, "selective", 2), 8)
    assert part.world_size == 1
    assert part.train.global_batch_size == 4 * 8, "four of the sixteen passes"
    assert (part.train.micro_batch_size, part.model.use_checkpoint, part.zero.stage) == (8, "selective", 2)
    found = {"step_s": 1.0, "update_s": 0.2, "spread": 0.1}
    row = tune.measured(config, Candidate(8, "selective", 2), 8, found, 50 * GB)
    assert row.compute_s == pytest.approx(4 * 0.8 + 0.2 / 8), "sixteen passes, of which four were measured; one update"
    whole = tune.measured(config, Candidate(8, "selective", 0), 8, found, 50 * GB)
    assert whole.compute_s == pytest.approx(4 * 0.8 + 0.2), "at ZeRO-0 each rank updates all"
    sent = forecast.traffic(part.model, config.train, part.zero, 8, 16).total
    assert row.update_s == pytest.approx(row.compute_s + sent / (50 * GB))


def test_memory_of_one_rank_is_carried_over_to_all():
    config = load_config(H, ["launch.nodes=1"])
    candidate = Candidate(32, True, 1)
    alone = tuning.memory(config, candidate, 1).total
    row = tune.measured(
        config, candidate, 8, {"step_s": 1.0, "update_s": 0.1, "spread": 0, "peak": 1, "used": alone + 1e9}, GB
    )
    assert row.whole == pytest.approx(tuning.memory(config, candidate, 8).total + 1e9)


@pytest.mark.slow
def test_a_killed_process_is_said_and_started_anew(tmp_path):
    config = load_config(DEMO, ["model.embed_dim=32", "model.depth=2", f"run_dir={tmp_path}"])
    part = tune.trial_config(config, Candidate(4, False, 1), 2)
    with tune.Trials(time.monotonic() + 300) as trials:
        trials.start()
        assert trials.hello["device"]
        os.kill(trials._process.pid, signal.SIGKILL)
        assert "the process died" in trials.ask(part, 1)["error"]
        found = trials.ask(part, 1)
        assert found["step_s"] > found["update_s"] > 0
