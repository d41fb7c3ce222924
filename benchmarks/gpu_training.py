"""G1 to G5 and G8: training steps, ours in the best way found and the official code's; the stall of a save."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu_session import DEVICE, Session, configuration, forward_flop, peak_gb, seconds, synchronize
from uvit_dist import dist
from uvit_dist.data.journal import Journal
from uvit_dist.data.latents import Provenance, Sample
from uvit_dist.data.plan import Plan
from uvit_dist.data.shards import ShardIndex, read_index, write_index, write_shard
from uvit_dist.engine import Engine
from uvit_dist.guard import Guard
from uvit_dist.loss import Objective
from uvit_dist.models.uvit import UViT
from uvit_dist.saving import Saver
from uvit_dist.train import micro_batches, open_loader


def make_shards(session: Session) -> ShardIndex:
    """Shards of drawn moments, as data_tools writes them."""
    net, (shards, each) = session.size.network, session.size.shards
    shape = (2 * net["in_chans"], net["img_size"], net["img_size"])
    classes = net["num_classes"] - 1
    made = Provenance(kind="moments", dtype="float16", shape=shape, source="drawn", image_size=8 * net["img_size"],
                      crop="none", mirror=False, classes=classes, samples=shards * each)  # fmt: skip
    folder, random = str(session.directory / "shards"), np.random.default_rng(0)

    def samples(shard: int) -> Iterator[Sample]:
        for number in range(shard * each, (shard + 1) * each):
            yield Sample(
                f"{number:08d}", number % classes, random.standard_normal(shape, dtype=np.float32).astype(np.float16)
            )

    records = [write_shard(folder, f"latents-{shard:06d}", samples(shard), made) for shard in range(shards)]
    write_index(f"{folder}/index.json", records, made)
    return read_index(f"{folder}/index.json")


@dataclass(frozen=True)
class Way:
    """One way to train, in the values of the configuration's keys."""

    batch: int
    checkpointed: Literal[False, True, "selective"] = False
    compiled: bool = False
    attention: str = "auto"
    graphs: bool = False

    @property
    def overrides(self) -> list[str]:
        """Of the configuration."""
        return [
            f"model.use_checkpoint={str(self.checkpointed).lower()}",
            f"speed.compile={str(self.compiled).lower()}",
            f"speed.attention={self.attention}",
            f"speed.cuda_graphs={str(self.graphs).lower()}",
        ]


@dataclass(frozen=True)
class Training:
    """images_per_s: of whole steps; waited: share of the time spent waiting for data; losses: of the steps."""

    images_per_s: float
    waited: float
    peak_gb: float
    losses: list[float]


def train(session: Session, way: Way, steps: int, warm_ups: int = 3) -> Training:
    """Whole steps of ours: real loader, draws, forward, backward, AdamW, EMA."""
    config = configuration(session, way.batch, *way.overrides)
    torch.manual_seed(0)
    net = UViT(**config.model.model_dump())
    index, ranks = session.found["index"], dist.Ranks()
    plan = Plan(index.counts, config.seed, way.batch, config.data.lanes, 64)
    loader = open_loader(config, index, plan, ranks, 0, Journal())
    engine, objective, guard = Engine(net, config, ranks), Objective(config), Guard(config.guard)
    losses: list[float] = []
    waited = 0.0

    def loss_of(net: nn.Module, batch: Any) -> Tensor:
        return objective.losses(net, objective.example(batch)).mean()

    def step() -> None:
        nonlocal waited
        begin = time.perf_counter()
        batch = next(loader)
        waited += time.perf_counter() - begin
        losses.append(engine.train_step(list(micro_batches(batch, config, ranks)), loss_of, guard.admits).loss)

    def all_steps() -> float:
        nonlocal waited
        for _ in range(warm_ups):
            step()
        synchronize()
        waited, begin = 0.0, time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
        return time.perf_counter() - begin

    took: list[float] = []
    peak = peak_gb(lambda: took.append(all_steps()))
    loader.close()
    return Training(steps * way.batch / took[0], waited / took[0], peak, losses)


def tried(session: Session, way: Way, steps: int) -> Training | None:
    """As ``train``; none where it does not fit or does not work."""
    try:
        done = train(session, way, steps)
    except Exception as error:  # noqa: BLE001 - what cannot be done is a finding too
        print(f"{way}: {type(error).__name__}: {str(error).splitlines()[0][:100]}", flush=True)
        done = None
    torch.compiler.reset()  # only so many versions of a block are kept, and the next way wants others
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    if done is not None:
        session.found.setdefault("ways", []).append(
            {**way.__dict__, "images_per_s": done.images_per_s, "peak_gb": done.peak_gb}
        )
        print(f"{way}: {done.images_per_s:.1f} images/s, {done.peak_gb:.1f} GB, waited {done.waited:.2%}", flush=True)
    return done


def fastest(session: Session, ways: list[Way], best: tuple[Way, Training] | None = None) -> tuple[Way, Training] | None:
    """The fastest of these ways and the best so far; none where none works."""
    for way in ways:
        done = tried(session, way, session.size.repeat)
        if done is not None and (best is None or done.images_per_s > best[1].images_per_s):
            best = way, done
    return best


def training(session: Session) -> None:
    """G1, G3, G4, G5: the best way by measurement, its rate, its memory, small batches."""
    size = session.size
    session.found["index"] = make_shards(session)
    best = fastest(session, [Way(batch) for batch in size.micro_batches])
    batches = size.micro_batches[: size.micro_batches.index(best[0].batch) + 1] if best else size.micro_batches
    # both keep less, which may make room for a larger batch
    ways = [way for batch in batches for way in (Way(batch, compiled=True), Way(batch, "selective"))]
    best = fastest(session, ways, best)
    if best is None:
        best = fastest(session, [Way(size.micro_batches[-1], True)])
        assert best is not None, "no way to train fits this GPU"
    name = session.found.get("attention")
    if name:
        best = fastest(session, [replace(best[0], attention=name)], best) or best
    way, done = best
    flop = 3 * forward_flop(size.network)
    session.found["best"] = done
    session.tell("G1 images/s of the best way", done.images_per_s, way=str(way), gflop_per_image=flop / 1e9)
    if "product" in session.found:
        session.tell("G1 share of G0's product rate", done.images_per_s * flop / session.found["product"])
    session.tell("G5 waiting for data, of the step", done.waited)
    names: dict[Literal[False, True, "selective"], str] = {
        False: "", "selective": ", selective", True: ", checkpointed"
    }  # fmt: skip
    for checkpointed, told in names.items():
        memory = tried(session, replace(way, batch=size.memory_batch, checkpointed=checkpointed), 2)
        if memory is not None:
            session.found[f"peak_{checkpointed}"] = memory.peak_gb
            session.tell(f"G3 peak memory at B={size.memory_batch}, GB{told}", memory.peak_gb)
    plain = replace(way, batch=size.small_batch, checkpointed=False)
    graphs = [replace(plain, compiled=True, graphs=True)] if DEVICE.type == "cuda" else []
    small = fastest(session, [plain, *graphs])
    if small is not None:
        rate = small[1].images_per_s / done.images_per_s
        session.tell("G4 throughput at B=16, of the best batch's", rate, way=str(small[0]))


def saves(session: Session) -> None:
    """G8: how long training stands still for a rank's eighth of the state."""
    numel = sum(p.numel() for p in UViT(**session.size.network).parameters()) // 8
    kinds = ("master", "exp_avg", "exp_avg_sq", "ema")
    state = {f"{kind}/w/0": torch.randn(numel, device=DEVICE) for kind in kinds}
    config = configuration(session, session.size.micro_batches[0])
    saver = Saver(str(session.directory / "saves"), config.checkpoint, dist.Ranks())
    times = []
    for step in range(1, 6):
        synchronize()
        begin = time.perf_counter()
        saver.begin(state, {"step": step})
        times.append(time.perf_counter() - begin)
        saver.finish(must_succeed=True)
    saver.close()
    session.tell(
        "G8 milliseconds of stall for 1/8 of the state", 1e3 * statistics.median(times[1:]), gb=4 * 4 * numel / 1e9
    )


def against_official(session: Session) -> None:
    """G2 and G3: the official training on the same GPU."""
    if session.official is None:
        print("G2: no OFFICIAL, not compared", flush=True)
        return
    best, half = session.found["best"], torch.float16
    rates: dict[str, float] = {}
    for name, batch, checkpointed in (
        ("defaults", session.size.memory_batch, True),
        ("best", session.size.memory_batch, False),
    ):
        step = session.official.trainer(batch, checkpointed, half if DEVICE.type == "cuda" else torch.bfloat16)
        took: list[float] = []
        try:
            peak = peak_gb(lambda step=step, took=took: took.append(seconds(step, session.size.repeat)))
            rates[name] = batch / took[0]
        except torch.OutOfMemoryError as error:
            print(f"official, {name}: {error}", flush=True)
            continue
        finally:
            del step
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
        session.tell(f"G2 official {name}, images/s", rates[name], batch=batch, checkpointed=checkpointed, peak_gb=peak)
        session.tell(f"G2 against the official {name}", best.images_per_s / rates[name])
        ours = session.found.get(f"peak_{checkpointed}")
        if ours and peak:
            told = "with" if checkpointed else "without"
            session.tell(f"G3 peak memory at B=128, of official {told} checkpointing", ours / peak)
