"""What the page of a run shows, read from the run's directory: lines of metrics, attempts, scores, pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from uvit_dist import score_log, storage
from uvit_dist.config_yaml import dump_config
from uvit_dist.run_state import METRICS, config_of, counted, displaced, json_lines, run_state

Record = Mapping[str, Any]
POINTS = 800
"""Points of a curve at most: what a screen can show."""
GRIDS, GRID_PIXELS, GRID_BYTES = 8, 1200, 1_000_000
"""Pictures on the page at most; above so many bytes one is shown as a JPEG of so many pixels."""


@dataclass(frozen=True)
class Curve:
    """A quantity over the steps (or hours): means of neighbouring records, and the range of what they stand for.

    x, mean, low, high: (n,) float64.
    """

    x: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass(frozen=True)
class Span:
    """An attempt on the time axis, hours since the run's first sign. end: none while it runs."""

    begin: float
    end: float | None
    told: str


@dataclass(frozen=True)
class Picture:
    """A grid of samples. data: a data: URL; told: what it shows."""

    data: str
    told: str


@dataclass(frozen=True)
class Run:
    """All that the page shows.

    state: of ``run_state``; lines: the records of training that count, oldest first; all_lines: also those that a
    restart went back behind; began: Unix seconds of the time axis' zero; ends: (hours, cause) of attempts, and of
    faults outside of them, but for the end of the training itself.
    """

    state: dict[str, Any]
    lines: list[dict[str, Any]]
    all_lines: list[dict[str, Any]]
    began: float
    attempts: list[Span]
    ends: list[tuple[float, str]]
    distances: dict[str, dict[int, float]]
    pictures: list[Picture]
    config: str | None

    def pieces(self) -> list[list[dict[str, Any]]]:
        """The records of training, those of each attempt by themselves, and anew where a restart went back."""
        begins, found = [span.begin for span in self.attempts], list[list[dict[str, Any]]]()
        for line in self.all_lines:
            if found:
                last, now = found[-1][-1], self.hours(line["time"])
                went_back = line["step"] <= last["step"]
            if not found or went_back or any(self.hours(last["time"]) < begin <= now for begin in begins):
                found.append([])
            found[-1].append(line)
        return found

    def hours(self, seconds: float) -> float:
        """Unix seconds as hours on the time axis."""
        return (seconds - self.began) / 3600


def read_run(run_dir: str | Path) -> Run:
    """Read a run, whether it goes on or not. Torn lines are passed over. Raises ``MissingInputError``."""
    directory, state = Path(run_dir), run_state(run_dir)
    lines = [line for line in json_lines(directory / METRICS) if "loss" in line and "step" in line and "time" in line]
    training = next((job for job in state["jobs"] if job["name"] == "train"), None)
    attempts = [] if training is None else training["attempts"]
    outside = [] if training is None else training["other_faults"]
    signs = [one["began"] for one in attempts] + [one["ended"] for one in outside]
    signs += [line["time"] - _took(line) for line in lines[:1]]
    began = min(signs, default=state["time"])
    config = config_of(directory)
    run = Run(state, counted(lines, attempts), lines, began, [], [], distances(run_dir), [], None)
    ends = [one for one in [*attempts, *outside] if one.get("ended") is not None and one["cause"] != "done"]
    return Run(
        state=state,
        lines=run.lines,
        all_lines=lines,
        began=began,
        attempts=[_span(run, one) for one in attempts],
        ends=sorted((run.hours(one["ended"]), str(one["cause"])) for one in ends),
        distances=run.distances,
        pictures=pictures(directory, score_log.records(run_dir)),
        config=None if config is None else storage.without_secrets(dump_config(config)),
    )


def _took(line: Record) -> float:
    """Seconds that the steps up to the first record took."""
    return float(line["samples_seen"] / line["images_per_s"]) if line.get("images_per_s") else 0.0


def _span(run: Run, one: Record) -> Span:
    end = None if one["ended"] is None else run.hours(one["ended"])
    hosts = ", ".join(one["hosts"][:2]) + (" …" if len(one["hosts"]) > 2 else "")
    told = f" ({text})" if (text := displaced(one)) else ""
    return Span(run.hours(one["began"]), end, f"{one['attempt']}: {hosts}{told}")


def curve(lines: Sequence[Record], key: str, x: str = "step", scale: float = 1.0) -> Curve | None:
    """One key of the records over another, at most POINTS points; none where no record has it."""
    pairs = [(line[x], line[key]) for line in lines if _is_number(line.get(key)) and _is_number(line.get(x))]
    points = np.array(pairs, dtype=np.float64)
    return reduced(points[:, 0], points[:, 1], scale) if pairs else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)


def reduced(x: NDArray[np.float64], y: NDArray[np.float64], scale: float = 1.0) -> Curve:
    """Neighbouring points as one, so that at most POINTS are left. x, y: (n,) float64; scale: multiplies y."""
    size = -(-len(x) // POINTS)
    starts = np.arange(0, len(x), size)
    counts = np.diff([*starts, len(x)])
    y = y * scale
    low, high = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
    return Curve(np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts, low, high)


def by_timestep(lines: Sequence[Record]) -> list[Curve]:
    """The loss in each part of the time axis over the steps; of the number of parts that the newest record has."""
    told = [line for line in lines if isinstance(line.get("loss_by_timestep"), list)]
    bins = len(told[-1]["loss_by_timestep"]) if told else 0
    rows = [
        {"step": line["step"], **{str(n): value for n, value in enumerate(line["loss_by_timestep"])}}
        for line in told
        if len(line["loss_by_timestep"]) == bins
    ]
    return [found for n in range(bins) if (found := curve(rows, str(n))) is not None]


def distances(run_dir: str | Path) -> dict[str, dict[int, float]]:
    """Label → step → FID (or Fréchet distance) of the run's own weights: a line for each way of scoring."""
    out: dict[str, dict[int, float]] = {}
    for record in score_log.records(run_dir):
        name = next((name for name in score_log.DISTANCES if record.get(name) is not None), None)
        if name is not None and record.get("of_run") and _is_number(record.get("step")):
            guidance = f", guidance {record['cfg_scale']:g}" if record.get("cfg_scale") else ""
            images = f"{record.get('weights')}, {record.get('samples')} images{guidance}"
            label = f"{name}, {images}, {record.get('solver')} {record.get('solver_steps')}"
            out.setdefault(label, {})[int(record["step"])] = float(record[name])
    return out


def pictures(run_dir: str | Path, records: Sequence[Record]) -> list[Picture]:
    """The grids of the run's evaluations, the newest first; of more than GRIDS the first and the newest."""
    newest: dict[str, Record] = {str(record.get("grid")): record for record in records if record.get("grid")}
    chosen = sorted(newest.values(), key=lambda record: (record.get("step", 0), record.get("weights") == "ema"))[::-1]
    if len(chosen) > GRIDS:
        chosen = [*chosen[: GRIDS - 1], chosen[-1]]
    found = []
    for record in chosen:
        name = Path(str(record["grid"]))
        path = Path(run_dir, "evaluation", name.parent.name, name.name)  # wherever the run has been moved to
        data = data_url(path)
        if data is not None:
            distance = score_log.distance_of(dict(record))
            score = "" if distance is None else f", {distance:.4g}"
            told = f"step {int(record.get('step') or 0):,}, {record.get('weights')} weights{score}"
            found.append(Picture(data, told))
    return found


def data_url(path: str | Path) -> str | None:
    """A PNG as a data: URL, a large one as a smaller JPEG; none where it cannot be read."""
    try:
        content = Path(path).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if len(content) <= GRID_BYTES:
                return f"data:image/png;base64,{base64.b64encode(content).decode()}"
            image.thumbnail((GRID_PIXELS, GRID_PIXELS))
            out = io.BytesIO()
            image.convert("RGB").save(out, "JPEG", quality=90)
    except (OSError, UnidentifiedImageError):
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
