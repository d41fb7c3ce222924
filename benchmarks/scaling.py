"""The scaling model: what a step would take on 8, 64 and 512 GPUs. Its outputs are projections, not measurements.

    make bench-scaling

    step = max(compute + communication that is not hidden, data)

Compute is a line through what one GPU took at several micro-batches (benchmarks/results/gpu.json), or, without it, an
assumption. Communication is what ZeRO sends by theory (``forecast.traffic``), times what C10 counted over it, at the
rate of the slower link; sums of gradients run beside the last backward pass, bucket by bucket, the gathering of weights
beside nothing. A ring uses all network adapters of a node, so nodes with more adapters are faster in the same measure.
Strong scaling keeps the published batch of 1,024, weak scaling the batch of a GPU. Every input says whether it is
measured, published or assumed. Writes scaling.json and docs/scaling.png, and prints the table of the docs.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import ROOT, provenance
from uvit_dist import forecast
from uvit_dist.config import Config
from uvit_dist.config_yaml import load_config

COMMAND = "make bench-scaling"
CONFIG = ROOT / "configs" / "uvit_h_imagenet512.yaml"
GPUS = (8, 64, 512)
GLOBAL_BATCH, WEAK_BATCH, GPUS_PER_NODE = 1024, 16, 8
PRECISIONS = {"fp32 sums and weights": ["train.precision=bf16_autocast"],
              "bf16 sums, fp32 weights": ["train.precision=bf16_autocast", "zero.reduce_dtype=bf16"],
              "bf16 sums and weights": ["train.precision=bf16"]}  # fmt: skip
ADAPTERS = (1, 8)
"""Network adapters of a node: one for all its GPUs, or one for each."""


@dataclass(frozen=True)
class Input:
    """A number that goes in. whence: measured, published or assumed."""

    value: float
    unit: str
    whence: str
    source: str


@dataclass(frozen=True)
class Compute:
    """Seconds of one GPU for a micro-batch: fixed_s + images / images_per_s."""

    fixed_s: float
    images_per_s: float

    def seconds(self, images: int) -> float:
        """Of a forward and backward pass of so many images."""
        return self.fixed_s + images / self.images_per_s


@dataclass(frozen=True)
class Links:
    """Bytes per second. bus: of a rank in a ring over all ranks; storage: of a rank; latency_s: of a hop in a tree."""

    bus: float
    storage: float
    latency_s: float


@dataclass(frozen=True)
class Step:
    """A projected step, seconds. hidden: communication beside the backward pass; exposed: the rest of it."""

    compute: float
    hidden: float
    exposed: float
    data: float

    @property
    def total(self) -> float:
        """From one update to the next."""
        return max(self.compute + self.exposed, self.data)


def bus_bandwidth(gpus: int, adapters: int, nvlink: float, adapter: float, share: float) -> float:
    """Bytes per second of a rank in a ring: NVLink within a node; between nodes all adapters of a node together."""
    return share * (nvlink if gpus <= GPUS_PER_NODE else min(nvlink, adapters * adapter))


def project(
    compute: Compute, traffic: forecast.Traffic, links: Links, images: int, micro: int, world: int, buckets: int,
    sample_bytes: float, backward_share: float,
) -> Step:  # fmt: skip
    """One update of ``images`` of a rank in micro-batches. backward_share: of the compute of a pass.

    Gradients are summed in the last backward pass alone (ZeRO-1); the last bucket is full when that pass is over.
    """
    passes = images // micro
    one = compute.seconds(micro)
    hops = links.latency_s * math.ceil(math.log2(world)) if world > 1 else 0.0
    sums = traffic.gradients / links.bus + buckets * hops
    gather = traffic.weights / links.bus + hops
    hidden = min(sums * (buckets - 1) / buckets, one * backward_share)
    return Step(passes * one, hidden, sums - hidden + gather, images * sample_bytes / links.storage)


def fitted(ways: Sequence[dict[str, Any]]) -> Compute | None:
    """The line of least squares through seconds over images of the fastest way at each micro-batch; none from one."""
    best: dict[int, float] = {}
    for way in ways:
        best[way["batch"]] = max(best.get(way["batch"], 0.0), way["images_per_s"])
    if len(best) < 2:
        return None
    xs, ys = list(best), [batch / rate for batch, rate in best.items()]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)
    return Compute(max(0.0, mean_y - slope * mean_x), 1 / slope)


def read(path: Path) -> dict[str, Any]:
    """A result, or nothing."""
    return json.loads(path.read_text()) if path.exists() else {}


def compute_of(results: Path, flop: float) -> tuple[Compute, dict[str, Input]]:
    """What one GPU does, from gpu.json where it is a whole run on a GPU, else assumed."""
    record = read(results / "gpu.json")
    if record and not record["setting"].get("tiny") and (line := fitted(record.get("ways", []))) is not None:
        source = f"gpu.json: {record['device']}, {record['date']}, commit {record['commit'][:7]}"
        return line, {"compute, images/s in the limit": Input(line.images_per_s, "images/s", "measured", source),
                      "compute, fixed for each pass": Input(line.fixed_s * 1e3, "ms", "measured", source)}  # fmt: skip
    peak = Input(989.0, "TFLOP/s", "published", "NVIDIA H100 SXM, dense bf16")
    share = Input(0.40, "of the peak", "assumed", "no run on a GPU is recorded; 37% is the best published of this kind")
    small = Input(0.85, "of the rate at 128", "assumed", "throughput at 16 images: target G4, not measured")
    # t(B) = a + B/r with 128/t(128) = rate and 16/t(16) = small * rate
    rate = share.value * peak.value * 1e12 / flop
    slope = (128 - 16 / small.value) / (128 - 16) / rate
    return Compute(128 / rate - 128 * slope, 1 / slope), {
        "peak": peak, "FLOP utilisation at 128 images": share, "small batches": small}  # fmt: skip


def inputs(results: Path) -> dict[str, Input]:
    """All but compute."""
    c10 = read(results / "C10.json")
    counted = c10.get("measured", {}).get("bytes_vs_theory")
    return {
        "NVLink of a GPU": Input(450, "GB/s each way", "published", "NVIDIA H100 SXM: 900 GB/s in both"),
        "adapter": Input(50, "GB/s each way", "published", "InfiniBand NDR, 400 Gb/s"),
        "share of a link": Input(0.8, "of its rate", "assumed", "no several GPUs have been seen"),
        "hop": Input(10, "µs", "assumed", "launch and latency of a collective, for each doubling of ranks"),
        "storage": Input(400, "MB/s of a GPU", "assumed", "object storage or a parallel file system"),
        "bytes over theory": Input(counted, "", "measured", f"C10.json, {c10['date']}, commit {c10['commit'][:7]}")
        if counted
        else Input(1.0, "", "assumed", "C10 is not recorded"),
        "backward pass": Input(2 / 3, "of a pass's compute", "assumed", "twice the products of the forward pass"),
    }


def projections(config: Config, compute: Compute, given: dict[str, Input]) -> list[dict[str, Any]]:
    """A row for each precision, number of adapters, kind of scaling and number of GPUs."""
    rows = []
    value = {name: one.value for name, one in given.items()}
    for kind, overrides in PRECISIONS.items():
        cut = load_config(CONFIG, overrides)
        buckets = math.ceil(forecast.parameters(config.model) / cut.zero.bucket_size)
        for adapters in ADAPTERS:
            for scaling in ("strong", "weak"):
                for gpus in GPUS:
                    images = GLOBAL_BATCH // gpus if scaling == "strong" else WEAK_BATCH
                    sent = forecast.traffic(config.model, cut.train, cut.zero, gpus)
                    beyond = (value["bytes over theory"] - 1) * sent.total
                    sent = forecast.Traffic(sent.gradients + beyond, sent.weights)
                    bus = bus_bandwidth(gpus, adapters, value["NVLink of a GPU"] * 1e9, value["adapter"] * 1e9,
                                        value["share of a link"])  # fmt: skip
                    links = Links(bus, value["storage"] * 1e6, value["hop"] * 1e-6)
                    step = project(compute, sent, links, images, min(images, 128), gpus, buckets,
                                   forecast.sample_bytes(config), value["backward pass"])  # fmt: skip
                    rate = images * gpus / step.total
                    rows.append({
                        "reduction": kind, "adapters": adapters, "scaling": scaling, "gpus": gpus, "images": images,
                        "sent_gb": sent.total / 1e9, **{f"{k}_ms": 1e3 * v for k, v in asdict(step).items()},
                        "step_ms": 1e3 * step.total, "images_per_s": rate,
                        "efficiency": rate / (gpus * 128 / compute.seconds(128)),
                        "hours": config.train.steps * GLOBAL_BATCH / rate / 3600,
                    })  # fmt: skip
    return rows


def shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a table: without what lies between two others, and adapters within one node, which do nothing."""
    least, *_, most = PRECISIONS
    ends = least, most
    mine = [row for row in rows if row["reduction"] in ends and (row["gpus"] > GPUS_PER_NODE or row["adapters"] == 1)]
    return sorted(mine, key=lambda row: (row["scaling"], row["gpus"], row["adapters"], ends.index(row["reduction"])))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, for the docs."""
    columns = ("scaling", "GPUs", "images on each", "what is sent", "GB sent", "adapters of a node", "compute, ms",
               "communication: hidden + not, ms", "step, ms", "images/s", "of one GPU's rate")  # fmt: skip
    head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
    lines = [
        f"| {row['scaling']} | {row['gpus']} | {row['images']} | {row['reduction']} | {row['sent_gb']:.1f} | "
        f"{row['adapters'] if row['gpus'] > GPUS_PER_NODE else 'NVLink'} | {row['compute_ms']:.1f} | "
        f"{row['hidden_ms']:.1f} + {row['exposed_ms']:.1f} | {row['step_ms']:.1f} | {row['images_per_s']:,.0f} | "
        f"{row['efficiency']:.0%} |"
        for row in shown(rows)
    ]
    return "\n".join([head, *lines])


def plot(rows: Sequence[dict[str, Any]], whence: str, path: Path) -> None:
    """Images per second over GPUs, strong and weak, and where the step of strong scaling goes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(15, 5.8), constrained_layout=True)
    colours = dict(zip(PRECISIONS, ("#b3412e", "#d9a02b", "#2b6ca3"), strict=True))
    styles = {1: "--", 8: "-"}
    for panel, scaling in zip(panels, ("strong", "weak"), strict=False):
        mine = [row for row in rows if row["scaling"] == scaling]
        first = mine[0]
        ideal = [gpus * first["images_per_s"] / first["efficiency"] / first["gpus"] for gpus in GPUS]
        panel.plot(GPUS, ideal, color="0.6", lw=1, label="one GPU at its best, times the GPUs")
        for kind in PRECISIONS:
            for adapters in ADAPTERS:
                line = [row for row in mine if row["reduction"] == kind and row["adapters"] == adapters]
                label = f"{kind}, {adapters} adapter{'s' if adapters > 1 else ''} a node"
                panel.plot([row["gpus"] for row in line], [row["images_per_s"] for row in line], styles[adapters],
                           color=colours[kind], marker="o", ms=4, label=label)  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="images/s")
        panel.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
        panel.minorticks_off()
        panel.yaxis.set_major_formatter("{x:,.0f}")
        panel.set_title(f"strong scaling: global batch {GLOBAL_BATCH:,}" if scaling == "strong"
                        else f"weak scaling: {WEAK_BATCH} images on each GPU")  # fmt: skip
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=4)
    bars = [row for row in shown(rows) if row["scaling"] == "strong"]
    links = {row["adapters"]: f"{row['adapters']} adapter{'s' if row['adapters'] > 1 else ''}" for row in bars}
    names = [f"{row['gpus']} GPUs, {links[row['adapters']] if row['gpus'] > GPUS_PER_NODE else 'NVLink'}, "
             f"{row['reduction'].split()[0]}" for row in bars]  # fmt: skip
    places = range(len(bars))
    compute, exposed = [row["compute_ms"] for row in bars], [row["exposed_ms"] for row in bars]
    panels[2].barh(places, compute, color="#5b8c5a", label="compute")
    panels[2].barh(places, exposed, left=compute, color="#b3412e", label="communication, not hidden")
    for place, row in zip(places, bars, strict=True):
        panels[2].text(row["step_ms"] + 3, place, f"{row['step_ms']:.0f} ms", va="center", fontsize=8)
    panels[2].set_yticks(places, names, fontsize=8)
    panels[2].invert_yaxis()
    panels[2].set(xlabel="ms of a step", xlim=(0, 1.15 * max(row["step_ms"] for row in bars)))
    panels[2].set_title("strong scaling: where the step goes")
    panels[2].legend(fontsize=8, loc="lower right")
    figure.suptitle(f"U-ViT-H/4, ImageNet 512, ZeRO-1: projections, no measurement; compute is {whence}", fontsize=11)
    figure.savefig(path, dpi=130)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="of other benchmarks")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "scaling.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "scaling.png")
    arguments = parser.parse_args()
    config = load_config(CONFIG, ["model.use_checkpoint=false"])
    compute, of_compute = compute_of(arguments.results, forecast.training_flop(config.model))
    given = inputs(arguments.results)
    rows = projections(config, compute, given)
    named = {**of_compute, **given}
    record = {"id": "scaling", "kind": "projections", "system": CONFIG.stem, "zero_stage": 1,
              "inputs": {name: asdict(one) for name, one in named.items()}, "compute": asdict(compute),
              "projections": rows, "command": COMMAND, **provenance()}  # fmt: skip
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    whence = next(iter(of_compute.values())).whence
    plot(rows, "measured" if whence == "measured" else "assumed", arguments.plot)
    for name, one in named.items():
        print(f"{name:32} {one.value:>10.4g} {one.unit:22} {one.whence:10} {one.source}")
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
