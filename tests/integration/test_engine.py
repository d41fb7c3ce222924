"""The engine against plain torch: AdamW, accumulation, clipping and EMA are what they say, at every ZeRO stage."""

import copy
import math

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import tiny_config
from uvit_dist.models.uvit import UViT

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
STEPS = 6
OPTIONS = ["optimizer.lr=3e-3", "optimizer.betas=[0.9, 0.95]", "optimizer.warmup_steps=3", "ema.decay=0.9",
           "ema.warmup=false", "train.global_batch_size=24"]  # fmt: skip


def network(config):
    torch.manual_seed(0)
    return UViT(**config.model.model_dump())


def batches():
    """x, noise, timesteps and labels of every step."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x, noise = torch.randn(2, 24, 4, 8, 8, generator=draw)
        yield x, noise, torch.randint(1, 1001, (24,), generator=draw), torch.randint(0, 11, (24,), generator=draw)


def loss_of(net, batch):
    x, noise, timesteps, labels = batch
    return (net(x, timesteps, y=labels).float() - noise).square().mean()


def always(loss, grad_norm):
    return True


def refusing_job(config, refused):
    """The same steps; before each that is named, one that is refused, of a loss as named on the last rank."""
    from uvit_dist import dist
    from uvit_dist.engine import Engine

    ranks = dist.ranks_from_environment()
    dist.start(ranks, 60)
    engine = Engine(network(config), config, ranks)
    results, seen, size, micro = [], [], 24 // ranks.world_size, config.train.micro_batch_size
    for step, batch in enumerate(batches()):
        mine = [part[ranks.rank * size : (ranks.rank + 1) * size] for part in batch]
        pieces = [tuple(part[first : first + micro] for part in mine) for first in range(0, size, micro)]
        for factor in refused.get(step, ()):
            factor = factor if ranks.rank == ranks.world_size - 1 else 1.0
            other = [(x * 2, *rest) for x, *rest in pieces]
            result = engine.train_step(other, lambda net, batch, by=factor: loss_of(net, batch) * by, refuse)
            assert (result.applied, engine.step) == (False, step)
            seen.append((result.loss, result.grad_norm, result.own_loss))
        result = engine.train_step(pieces, loss_of, lambda loss, norm: math.isfinite(loss + norm))
        assert (result.applied, engine.step) == (True, step + 1)
        results.append((result.loss, result.grad_norm))
    return results, {key: value.clone() for key, value in engine.local_state().items()}, seen


def refuse(loss, grad_norm):
    return False


def engine_job(config):
    """A few steps on every rank. Returns losses, gradient norms, and this rank's state."""
    from uvit_dist import dist
    from uvit_dist.engine import Engine

    ranks = dist.ranks_from_environment()
    dist.start(ranks, 60)
    engine = Engine(network(config), config, ranks)
    start = {key: value.clone() for key, value in engine.local_state().items() if key.startswith("master")}
    results, size, micro = [], 24 // ranks.world_size, config.train.micro_batch_size
    for batch in batches():
        mine = [part[ranks.rank * size : (ranks.rank + 1) * size] for part in batch]
        pieces = [tuple(part[first : first + micro] for part in mine) for first in range(0, size, micro)]
        result = engine.train_step(pieces, loss_of, always, flags=(ranks.rank == 1, False))
        results.append((result.loss, result.grad_norm, result.flags))
    return results, {key: value.clone() for key, value in engine.local_state().items()}, start


def whole(states):
    """The fragments of all ranks as whole flat tensors; each element held exactly once."""
    pieces = sorted((kind, name, int(start), value) for state in states for key, value in state.items()
                    for kind, name, start in [key.split("/")])  # fmt: skip
    out = {}
    for kind, name, start, value in pieces:
        before = out.get((kind, name), torch.empty(0))
        assert len(before) == start, f"{kind} of {name} has a gap or an overlap at {start}"
        out[kind, name] = torch.cat([before, value])
    return out


def reference(config):
    """The same steps in plain torch, on one batch of 24, with the update rule written out by the library."""
    net = network(config)
    ema = copy.deepcopy(net)
    rules = config.optimizer
    optimizer = torch.optim.AdamW(net.parameters(), lr=1.0, betas=rules.betas, eps=rules.eps, weight_decay=0.03)
    results = []
    for step, batch in enumerate(batches()):
        optimizer.param_groups[0]["lr"] = rules.lr * min(step / rules.warmup_steps, 1)
        loss = loss_of(net, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), rules.clip_grad_norm or float("inf"))
        optimizer.step()
        for average, weight in zip(ema.parameters(), net.parameters(), strict=True):
            average.data.mul_(0.9).add_(weight.data, alpha=0.1)
        results.append((loss.item(), norm.item()))
    out = {}
    for (name, weight), average in zip(net.named_parameters(), ema.parameters(), strict=True):
        state = optimizer.state[weight]
        out |= {("master", name): weight, ("ema", name): average}
        out |= {(kind, name): state[kind] for kind in ("exp_avg", "exp_avg_sq")}
    return results, {key: value.detach().flatten() for key, value in out.items()}


@pytest.fixture
def config_of(data_dir, tmp_path):
    def make(*options, ranks=2):
        return tiny_config(data_dir, tmp_path, *OPTIONS, f"launch.processes_per_node={ranks}", *options)

    return make


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32_equals_plain_torch_with_accumulation_and_clipping(config_of, stage):
    config = config_of(f"zero.stage={stage}", "train.precision=fp32", "optimizer.clip_grad_norm=0.05",
                       "train.micro_batch_size=6", "model.use_checkpoint=true")  # fmt: skip
    told = run_ranks(engine_job, 2, config)
    results, state = reference(config)
    assert told[0][0] == told[1][0], "all ranks learn the same"
    assert all(flags == (True, False) for *_, flags in told[0][0]), "rank 1's flag reaches all"
    assert [loss for loss, *_ in told[0][0]] == pytest.approx([loss for loss, _ in results], rel=2e-6)
    assert [norm for _, norm, _ in told[0][0]] == pytest.approx([norm for _, norm in results], rel=1e-5)
    assert max(norm for _, norm in results) > 0.05, "clipping did something"
    ours = whole([state for _, state, _ in told])
    assert ours.keys() == state.keys()
    scale = {"master": 3e-6, "ema": 1e-6, "exp_avg": 1e-6, "exp_avg_sq": 1e-8}
    for key, value in state.items():
        assert (ours[key] - value).abs().max() <= scale[key[0]], key
    moved = max((state["ema", name] - state["master", name]).abs().max() for kind, name in state if kind == "ema")
    assert moved > 1e-3, "the average is not the weights"


@pytest.mark.parametrize(
    ("precision", "stage"), [("bf16_autocast", 1), ("bf16_autocast", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)]
)
def test_bf16_keeps_fp32_masters_and_stays_near_fp32(config_of, precision, stage):
    config = config_of(f"zero.stage={stage}", f"train.precision={precision}", "train.micro_batch_size=12")
    told = run_ranks(engine_job, 2, config)
    initial = {name: p.detach().flatten() for name, p in network(config).named_parameters()}
    start = whole([start for _, _, start in told])
    assert all(torch.equal(start["master", name], value) for name, value in initial.items()), "unrounded at the start"
    results, state = reference(config)
    assert [loss for loss, *_ in told[0][0]] == pytest.approx([loss for loss, _ in results], rel=2e-3)
    ours = whole([state for _, state, _ in told])
    assert all(value.dtype == torch.float32 for value in ours.values())
    for kind, bound in (("master", 0.05), ("ema", 0.05)):
        off = torch.cat([ours[kind, name] - state[kind, name] for name in initial]).norm()
        moved = torch.cat([state[kind, name] - initial[name] for name in initial]).norm()
        assert off <= bound * moved, f"{kind}: {off / moved:.3f} of the way it went"


def test_under_autocast_accumulation_equals_ranks_exactly(config_of):
    """One rank with two micro-batches, two ranks with one: the same products, sums of two numbers."""
    options = ["zero.stage=1", "train.precision=bf16_autocast", "train.micro_batch_size=12"]
    ((one, alone, _),) = run_ranks(engine_job, 1, config_of(*options, ranks=1))
    two = run_ranks(engine_job, 2, config_of(*options))
    assert [loss for loss, *_ in one] == pytest.approx([loss for loss, *_ in two[0][0]], rel=1e-7)
    together, alone = whole([state for _, state, _ in two]), whole([alone])
    assert all(torch.equal(together[key], value) for key, value in alone.items())


@pytest.mark.parametrize(
    ("precision", "stage", "ranks", "clip"),
    [*(("fp32", stage, 2, "0.05") for stage in range(4)), *(("bf16", stage, 2, "0.05") for stage in range(1, 4)),
     ("fp32", 1, 3, "0.05"), ("fp32", 3, 3, "0.05"), ("fp32", 1, 2, "null"), ("fp32", 2, 2, "null")],
)  # fmt: skip
def test_a_refused_step_leaves_no_trace(config_of, precision, stage, ranks, clip):
    """Not finite on one rank, or refused for its loss: with several micro-batches, clipped or not, bit for bit.

    On three ranks some parameters are so small that a rank owns nothing of them but padding.
    """
    config = config_of(f"zero.stage={stage}", f"train.precision={precision}", f"optimizer.clip_grad_norm={clip}",
                       "train.micro_batch_size=4", "model.use_checkpoint=true", ranks=ranks)  # fmt: skip
    straight = run_ranks(refusing_job, ranks, config, {})
    told = run_ranks(refusing_job, ranks, config, {0: [1.0], 2: [math.nan, math.inf], 4: [1000.0, math.nan]})
    assert [results for results, *_ in told] == [results for results, *_ in straight]
    for (_, ours, _), (_, theirs, _) in zip(told, straight, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    (_, _, first), *_, (_, _, second) = told
    assert [seen[:2] for seen in first if math.isfinite(seen[0])] == [s[:2] for s in second if math.isfinite(s[0])]
    assert [math.isfinite(loss) for loss, *_ in first] == [True, False, False, True, False], "seen by all"
    assert [math.isfinite(norm) for _, norm, _ in first] == [True, False, False, True, False]
    assert all(math.isfinite(own) for *_, own in first)
    assert [math.isfinite(own) for *_, own in second] == [True, False, False, True, False], "each rank's own"


def every_stage_job(config, options):
    """As ``engine_job``, at each ZeRO stage in turn, with each set of its options. Returns the results."""
    from uvit_dist import dist
    from uvit_dist.config_yaml import changed, parse_config
    from uvit_dist.engine import Engine

    ranks = dist.ranks_from_environment()
    dist.start(ranks, 300)
    out = {}
    for stage in range(4):
        for name, more in options[stage].items():
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            tree = changed(config.model_dump(mode="json"), [f"zero.stage={stage}", *more])
            chosen = parse_config(tree)
            engine = Engine(network(chosen), chosen, ranks)
            size, results = 24 // ranks.world_size, []
            for batch in batches():
                mine = [part[ranks.rank * size : (ranks.rank + 1) * size] for part in batch]
                pieces = [tuple(part[first : first + 6] for part in mine) for first in range(0, size, 6)]
                result = engine.train_step(pieces, loss_of, always)
                results.append((result.loss, result.grad_norm))
            out[stage, name] = results, sorted(engine.shapes), torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return out


def test_compiled_and_selective_steps_are_the_same_at_every_stage(config_of):
    """Two ranks with two micro-batches each, in fp32: the speed of a step is no part of what it computes."""
    selective, compiled = "model.use_checkpoint=selective", "speed.compile=true"
    each = {"plain": [], "selective": [selective], "both": [selective, compiled]}
    options = [each, each, each, {**each, "compiled": [compiled]}]  # at stage 3 hooks cut the blocks in pieces
    config = config_of("train.precision=fp32", "train.micro_batch_size=6")
    told, other = run_ranks(every_stage_job, 2, config, options, timeout=900)
    for stage in range(4):
        plain, names, graphs = told[stage, "plain"]
        assert graphs == 0
        assert told[stage, "selective"][0] == plain, "bit for bit"
        for name in set(options[stage]) - {"plain", "selective"}:
            results, same_names, graphs = told[stage, name]
            assert graphs > 0, f"nothing was compiled at stage {stage}"
            assert same_names == names
            assert [loss for loss, _ in results] == pytest.approx([loss for loss, _ in plain], rel=1e-6)
            assert [norm for _, norm in results] == pytest.approx([norm for _, norm in plain], rel=1e-4)
            assert other[stage, name][0] == results, "all ranks learn the same"
