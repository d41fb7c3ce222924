"""Sweeps: one evaluation at each combination of guidance, steps and solver, as a table and a plot."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uvit_dist import storage
from uvit_dist.config import Config
from uvit_dist.config_evaluate import SweepConfig
from uvit_dist.config_yaml import parse_config
from uvit_dist.score_log import DISTANCES, distance_of

KEYS = tuple(SweepConfig.model_fields)
"""Keys of the sample section that can be swept."""
COLUMNS = ("solver", "solver_steps", "cfg_scale")
"""What a record calls them."""


HELP = (
    "with --job evaluate: score all combinations of these values in the place of sample.KEY, with commas between: "
    "cfg_scale=0,0.2,0.4 steps=25,50"
)


def overrides_of(arguments: Sequence[str]) -> list[str]:
    """``cfg_scale=0,0.2`` as it is typed → an override of the configuration, for each. Others are overrides already."""
    pairs = [argument.partition("=") for argument in arguments]
    return [f"evaluate.sweep.{k}=[{values}]" if k in KEYS else f"{k}{sign}{values}" for k, sign, values in pairs]


def points(config: Config) -> list[Config]:
    """The configurations of a sweep, without it; of one that has none, its own alone.

    Raises ``ConfigError`` where one of them is not valid.
    """
    swept = {key: values for key in KEYS if (values := getattr(config.evaluate.sweep, key))}
    if not swept:
        return [config]
    out = []
    for values in itertools.product(*swept.values()):
        tree = config.model_dump(mode="json")
        tree["sample"] |= dict(zip(swept, values, strict=True))
        tree["evaluate"]["sweep"] = {}
        out.append(parse_config(tree, f"evaluate.sweep, {dict(zip(swept, values, strict=True))}"))
    return out


def report(config: Config, scores: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Write the table, as Markdown and JSON, and the plot of the distance. Returns their paths, by what they are."""
    first = scores[0]
    name = f"sweep-step-{first['step']:08d}-{first['weights']}-{first['samples']}"
    directory = Path(config.run_dir, "evaluation", name)
    storage.make_directory(str(directory))
    files = {
        "table": (directory / "table.md", table(scores).encode()),
        "json": (directory / "table.json", json.dumps(list(scores), indent=1).encode()),
        "plot": (directory / "plot.png", plot(scores)),
    }
    for path, content in files.values():
        storage.write_bytes(str(path), content)
    return {what: str(path) for what, (path, _) in files.items()}


def table(scores: Sequence[dict[str, Any]]) -> str:
    """The points as Markdown, a row for each; the lowest distance is bold. What all share is told once, above."""
    first = scores[0]
    told = (
        f"{first['samples']} images, {first['weights']} weights of step {first['step']}, "
        f"{first['sample_precision']}, seed {first['seed']}, against {first['reference']}"
    )
    names = [name for name in first if _is_score(name, first[name])]
    lowest = min(distance for record in scores if (distance := distance_of(record)) is not None)
    rows = [[*COLUMNS, *names], ["---"] * (len(COLUMNS) + len(names))]
    for record in scores:
        cells = [str(record[column]) for column in COLUMNS]
        for name in names:
            text = f"{record[name]:.4f}"
            cells.append(f"**{text}**" if name in DISTANCES and record[name] == lowest else text)
        rows.append(cells)
    return "\n".join([told, "", *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _is_score(name: str, value: Any) -> bool:
    return isinstance(value, float) and name not in (*COLUMNS, "seconds") and not name.endswith("_real_halves")


def plot(scores: Sequence[dict[str, Any]]) -> bytes:
    """The distance over the guidance, a line for each solver and number of steps; over the steps, if guidance is one.

    A PNG.
    """
    from matplotlib.figure import Figure  # only a sweep needs it; no window, no state shared with others

    over = "cfg_scale" if len({record["cfg_scale"] for record in scores}) > 1 else "solver_steps"
    by = [column for column in COLUMNS if column != over]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for record in scores:
        distance = distance_of(record)
        assert distance is not None
        lines.setdefault(tuple(record[column] for column in by), []).append((record[over], distance))
    for values, line in lines.items():
        xs, ys = zip(*sorted(line), strict=True)
        axes.plot(xs, ys, marker="o", label=", ".join(f"{c} {v}" for c, v in zip(by, values, strict=True)))
    first = scores[0]
    axes.set(
        xlabel=over,
        ylabel=next(name for name in DISTANCES if name in first),
        title=f"{first['samples']} images, {first['weights']} weights of step {first['step']}",
    )
    axes.legend()
    axes.grid(alpha=0.3)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()
