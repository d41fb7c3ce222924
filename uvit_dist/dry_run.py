"""What a launch would submit and what it would take, told without SLURM, GPUs, network or weights; nothing is written.

Every figure says whence it is: measured (by this run, or read from its index), computed, or assumed (the cluster's
profile has most assumptions). What cannot be reached is a warning.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from uvit_dist import attempts, forecast, orders, storage, submit
from uvit_dist.config import Config
from uvit_dist.config_cluster import ClusterProfile, Order, job_directory, read_profile
from uvit_dist.errors import UserError
from uvit_dist.evaluation import sweep

PATIENCE_S = 5.0
"""Seconds for which a server that does not answer is asked again."""
GB, MB, HOUR = 1e9, 1e6, 3600.0


class _Report:
    """Lines of figures, and what could not be found out."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def title(self, text: str) -> None:
        self.lines += ["", text]

    def add(self, name: str, value: str, whence: str) -> None:
        self.lines.append(f"  {name:<28}{value}  [{whence}]")


def dry_run(config: Config, job: str, then: Sequence[str] = (), array: int | None = None) -> str:
    """The batch script, the arithmetic and the forecast of a job. array: number of its tasks, none: no array.

    Raises ``ConfigError`` for a profile that is wrong, or has fewer GPUs in a node than there are ranks, and for a
    point of a sweep that is not valid.
    """
    report = _Report()
    profile = read_profile(config.launch.cluster)
    order = orders.make_order(config, job, profile, then, None if array is None else 0)
    world = order.world_size * (array or 1)
    if config.launch.target == "slurm":
        report.lines += ["the batch script", "", submit.script(order, array or 1).rstrip()]
        if config.launch.cluster is None:
            report.warnings.append("launch.cluster is not set: the profile's defaults are used; slurm/ has examples")
    else:
        report.lines.append(f"launch.target local: {world} process(es) on this machine, no batch script")
    spares = f", {order.spares} spare node(s)" if order.spares else ""
    report.title(f"{job}: {order.nodes * (array or 1)} node(s) of {order.processes_per_node} rank(s){spares}")
    if job == "train":
        hours = _train(report, config, profile, order.nodes, world, order.signal_lead_s)
        if order.no_kill and config.launch.target == "slurm":
            _lost_node(report, config, order, hours)
        for follow_up in then:
            report.add(f"then {follow_up}", "a job of one node for each checkpoint", "configured")
    elif job == "evaluate":
        _evaluate(report, config, profile, world)
    else:
        _precompute(report, config, job)
    report.lines += ["", *(f"warning: {line}" for line in report.warnings), "nothing was submitted or written"]
    return "\n".join(report.lines)


def _train(report: _Report, config: Config, profile: ClusterProfile, nodes: int, world: int, lead_s: int) -> float:
    """Returns the hours that the training takes."""
    cut, model, train = forecast.batch(config, world), config.model, config.train
    report.add("parameters", f"{forecast.parameters(model):,}", "computed")
    report.add(
        "global batch",
        f"{train.global_batch_size} = {cut.micro} images x {cut.accumulation} pass(es) x {world} rank(s)",
        "computed",
    )
    report.add("images in all", f"{train.steps * train.global_batch_size:,} in {train.steps:,} steps", "computed")
    _memory(report, config, profile, world, cut.micro)
    rate = _rate(report, config, profile, world)
    _data(report, config, nodes, world, rate)
    hours = train.steps * train.global_batch_size / rate / HOUR
    report.title("time")
    report.add("training", f"{hours:,.1f} h, {hours * world:,.0f} GPU (or rank) hours", "computed of the rate")
    events = attempts.read(job_directory(config.run_dir, "train"))
    save_s, restart_s = attempts.longest_save_s(events), measured_restart_s(events)
    _failures(report, config, profile, nodes, train.global_batch_size / rate, save_s, restart_s)
    if config.launch.target == "slurm":
        usable = profile.time_limit_min * 60 - lead_s - (restart_s or profile.restart_s)
        jobs = math.ceil(hours * HOUR / usable) if usable > 0 else 0
        chain = f"{jobs} stretch(es) of {profile.time_limit_min} min" if jobs else "no time is left for training"
        report.add("time limit", f"{chain}; told to save {lead_s} s before the limit", "computed of the profile")
        if not jobs:
            report.warnings.append("the profile's time_limit_min is too short for a start and a save")
    return hours


def _lost_node(report: _Report, config: Config, order: Order, hours: float) -> None:
    """What becomes of the job when it loses a node, and what it costs to be ready for that."""
    report.title("a lost node")
    per_node, profile = order.processes_per_node, order.profile
    if order.spares:
        idle = order.spares * per_node
        share = f"{order.spares / order.all_nodes:.1%} of what the job holds"
        report.add("first a spare", f"{order.spares} node(s) wait: {idle * hours:,.0f} GPU hours, {share}", "computed")
    for count in order.shrinks_to:
        world = count * per_node
        cut = forecast.batch(config, world)
        memory = forecast.gpu_memory(config.model, config.train, config.zero, world, cut.micro).total / GB
        text = f"{cut.micro} images x {cut.accumulation} pass(es) x {world} rank(s), {memory:.2f} GB of a GPU"
        report.add(f"then {count} node(s)", text, "computed")
        if profile.gpus_per_node and memory > profile.gpu_memory_gb:
            report.warnings.append(
                f"launch.min_nodes {config.launch.min_nodes}: on {count} node(s) a GPU lacks "
                f"{memory - profile.gpu_memory_gb:.1f} GB; raise it above {count}"
            )
    report.add("then the queue", f"for {order.all_nodes} node(s)", "configured")


def _memory(report: _Report, config: Config, profile: ClusterProfile, world: int, micro: int) -> None:
    memory = forecast.gpu_memory(config.model, config.train, config.zero, world, micro)
    kept = forecast.KEPT[config.model.use_checkpoint]
    report.title(f"memory of a GPU, ZeRO-{config.zero.stage} over {world} rank(s), {config.train.precision}")
    for name, size in (
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("masters, Adam, EMA", memory.optimizer),
        ("copies of weights", memory.copies),
        ("gradient buckets", memory.buckets),
        (f"activations, {kept}", memory.activations),
        ("gradients of activations", memory.flow),
    ):
        report.add(name, f"{size / GB:6.2f} GB", "computed")
    report.add("context, workspace", f"{memory.allowance / GB:6.2f} GB", "assumed")
    if not profile.gpus_per_node:
        report.add("in all", f"{memory.total / GB:6.2f} GB", "computed; the profile has no GPUs")
        return
    room = profile.gpu_memory_gb - memory.total / GB
    verdict = "fits" if room > 0 else "does NOT fit"
    report.add("in all", f"{memory.total / GB:6.2f} GB: {verdict} in {profile.gpu_memory_gb:g} GB", "computed")
    if room <= 0:
        report.warnings.append(
            f"a GPU lacks {-room:.1f} GB: lower train.micro_batch_size, set model.use_checkpoint true, raise zero.stage"
        )
    report.title(f"what fits where: images in one forward pass at most, {profile.gpu_memory_gb:g} GB, {world} rank(s)")
    for stage, row in forecast.what_fits(config, world, profile.gpu_memory_gb * GB).items():
        text = ", ".join(f"{count:,} {forecast.KEPT[kind]}" for kind, count in row.items())
        report.add(f"ZeRO-{stage}", text, "computed")


def _rate(report: _Report, config: Config, profile: ClusterProfile, world: int) -> float:
    """Images in a second, over all ranks."""
    report.title("speed")
    flop = forecast.training_flop(config.model)
    recomputed = ", blocks recomputed" if config.model.use_checkpoint is True else ""
    report.add("an image in training", f"{flop / GB:,.1f} GFLOP{recomputed}", "computed")
    measured = measured_rate(config.run_dir)
    if measured is not None:
        report.add("images/s", f"{measured:,.1f}", f"measured: the last record of {config.run_dir}/metrics.jsonl")
        return measured
    peak, share = profile.gpu_tflops, profile.gpu_utilisation
    rate = world * share * peak * 1e12 / flop
    report.add("images/s", f"{rate:,.0f} at {share:.0%} of {peak:g} TFLOP/s", "assumed: the profile's gpu_utilisation")
    if not profile.gpus_per_node or config.launch.target == "local":
        report.warnings.append(
            "the rate is that of the profile's GPUs; on other processors train some steps and ask again"
        )
    return rate


def _data(report: _Report, config: Config, nodes: int, world: int, rate: float) -> None:
    report.title("data")
    each, whence = float(forecast.sample_bytes(config)), "computed, without headers"
    samples, shards = _index(report, config)
    if samples is not None and shards is not None:
        count, total = samples
        each, whence = total / count, f"measured: {config.data.index}"
        report.add("samples", f"{count:,} in {shards:,} shards, {total / GB:,.2f} GB", whence)
    else:
        known = forecast.KNOWN_SAMPLES.get((config.data.format, config.data.split))
        if known is not None:
            count = known * (2 if config.data.mirror and config.data.space == "latents" else 1)
            shards = math.ceil(count / config.data.samples_per_shard)
            text = f"{count:,} in {shards:,} shards, {count * each / GB:,.2f} GB"
            report.add("samples", text, "assumed: the published data set")
        else:
            count = 0
            size = config.data.samples_per_shard
            text = f"shards of {size:,} samples, {size * each / MB:,.0f} MB; how many is not known"
            report.add("samples", text, "computed")
    if count:
        steps = count // config.train.global_batch_size
        report.add("epochs", f"{config.train.steps / max(1, steps):,.1f} of {steps:,} steps", "computed")
    need = rate * each / MB
    report.add("a sample", f"{each / 1e3:,.1f} kB", whence)
    text = f"{need:,.1f} MB/s: {need / nodes:,.1f} on a node, {need / world:,.1f} on a rank"
    report.add("bandwidth needed", text, "computed of the rate")


def _index(report: _Report, config: Config) -> tuple[tuple[int, int] | None, int | None]:
    """((samples, bytes), shards) of the index, or nones where it cannot be read."""
    path = config.data.index
    if not storage.is_remote(path) and not Path(path).exists():
        report.warnings.append(f"data.index {path} is not there yet")
        return None, None
    try:
        from uvit_dist.data.shards import read_index  # seconds, which are not needed without an index
        from uvit_dist.preflight import contradictions

        short = min(PATIENCE_S, config.storage.retry_s)
        storage.configure(config.storage.model_copy(update={"retry_s": short, "stall_s": short}))
        index = read_index(path)
        wrong = contradictions(config, index.provenance)
    except (UserError, OSError) as error:
        report.warnings.append(f"data.index {path} cannot be read: {error}")
        return None, None
    report.warnings += [f"data.index {path} contradicts the configuration: {line}" for line in wrong]
    total = sum(record.size for record in index.shards)
    return (index.provenance.samples, total), len(index.shards)


def _failures(
    report: _Report,
    config: Config,
    profile: ClusterProfile,
    nodes: int,
    step_s: float,
    save_s: float | None,
    restart_s: float | None,
) -> None:
    """What failures cost at checkpoint.every, and at the interval of Young and Daly."""
    saving, restart = save_s or profile.save_s, restart_s or profile.restart_s
    stall = saving * (forecast.STALL_SHARE if config.checkpoint.background else 1.0)
    mtbf = profile.mtbf_node_hours * HOUR / nodes
    late = saving if config.checkpoint.background else 0.0  # the save under way is lost with the steps beside it
    size = forecast.parameters(config.model) * forecast.STATE_BYTES
    report.add("a checkpoint", f"{size / GB:,.2f} GB, {config.checkpoint.keep} kept", "computed")
    report.add("a save", f"{saving:.1f} s", "measured" if save_s else "assumed: the profile's save_s")
    report.add(
        "a save's stall", f"{stall:.2f} s", f"assumed: {forecast.STALL_SHARE:.0%} of it" if late else "all of it"
    )
    report.add("a restart", f"{restart:.1f} s", "measured" if restart_s else "assumed: the profile's restart_s")
    whence = "assumed: the profile's mtbf_node_hours"
    report.add("mean time to a failure", f"{mtbf / HOUR:,.1f} h of {nodes} node(s)", whence)
    best = forecast.young_daly_s(stall, mtbf)
    for name, interval in (("at checkpoint.every", config.checkpoint.every * step_s), ("at Young-Daly", best)):
        share = forecast.goodput(interval, stall, restart + late, mtbf)
        steps = max(1, round(interval / step_s))
        text = f"{share:.2%} with a save each {steps:,} steps, {interval / 60:,.1f} min"
        report.add(f"goodput {name}", text, "computed of the above")


def _evaluate(report: _Report, config: Config, profile: ClusterProfile, world: int) -> None:
    """Of all points of a sweep, whose units of work are shared out together."""
    points = sweep.points(config)
    flop = sum(forecast.sampling_flop(point) for point in points)
    hours = flop / (profile.gpu_utilisation * profile.gpu_tflops * 1e12) / HOUR
    chunks = len(points) * math.ceil(config.evaluate.samples / config.evaluate.chunk_size)
    for_each = f" for each of {len(points)} points of the sweep," if len(points) > 1 else ""
    report.add("samples", f"{config.evaluate.samples:,}{for_each} in {chunks:,} units of work", "computed")
    report.add("sampling", f"{flop / 1e15:,.1f} PFLOP, without decoding and features", "computed")
    report.add(
        "GPU hours", f"{hours:,.2f}, {hours / min(world, chunks) * 60:,.1f} min on {world} rank(s)",
        "assumed: the profile's gpu_tflops and gpu_utilisation",
    )  # fmt: skip


def _precompute(report: _Report, config: Config, job: str) -> None:
    known = forecast.KNOWN_SAMPLES.get((config.data.format, config.data.split))
    each = forecast.sample_bytes(config)
    if job == "precompute" and known is not None:
        count = known * (2 if config.data.mirror and config.data.space == "latents" else 1)
        shards = math.ceil(count / config.data.samples_per_shard)
        text = f"{count:,} in {shards:,} shards, {count * each / GB:,.2f} GB"
        report.add("samples", text, "assumed: the published data set")
    report.add("a sample", f"{each / 1e3:,.1f} kB", "computed, without headers")
    report.lines.append(
        "  bytes, requests, their price and GPU time, of the images that are there: "
        "python -m data_tools.precompute_latents --dry-run"
    )


def measured_rate(run_dir: str) -> float | None:
    """images_per_s of the last record of a run's metrics.jsonl, or none."""
    try:
        with open(storage.join(run_dir, "metrics.jsonl"), encoding="utf-8") as file:
            return float(json.loads(deque(file, maxlen=1)[0])["images_per_s"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def measured_restart_s(events: Sequence[attempts.Event]) -> float | None:
    """Median seconds from the beginning of an attempt to its first step, or none where none has come so far."""
    begun, took = None, []
    for event in events:
        if event["event"] == "attempt":
            begun = event["time"]
        elif event["event"] == "running" and begun is not None:
            took.append(event["time"] - begun)
            begun = None
    return statistics.median(took) if took else None
