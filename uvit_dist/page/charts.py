"""The curves of a run as SVG, by matplotlib: no script, some kilobytes each, text that can be searched."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from uvit_dist import attempts
from uvit_dist.page.facts import Curve, Run, by_timestep, curve

STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": "#3e4c59",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "xtick.color": "#616e7c",
    "ytick.color": "#616e7c",
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}
BLUE, ORANGE, RED, GREY, BAND = "#2b6cb0", "#d97706", "#c53030", "#616e7c", "#e8edf3"
SIZE, WIDE = (6.2, 2.9), (12.8, 2.9)
"""Inches."""


@dataclass(frozen=True)
class Chart:
    """A picture of the page. svg: its text."""

    title: str
    svg: str
    wide: bool = False


def charts(run: Run) -> Iterator[Chart]:
    """A chart of each quantity that the run has recorded."""
    if run.all_lines or run.attempts:
        yield Chart("Progress, attempts and faults over time", svg("time", lambda axes: _time(axes, run), WIDE), True)
    loss, validation = curve(run.lines, "loss"), curve(run.lines, "validation_loss")
    if loss is not None:
        yield Chart("Loss", svg("loss", lambda axes: _loss(axes, loss, validation)))
    parts = by_timestep(run.lines)
    if parts:
        yield Chart("Loss by timestep", svg("parts", lambda axes: _parts(axes, parts)))
    for key, title, label, scale, log in (
        ("grad_norm", "Gradient norm", "norm", 1.0, True),
        ("lr", "Learning rate", "rate", 1.0, False),
        ("images_per_s", "Throughput", "images/s", 1.0, False),
        ("mfu", "FLOP utilisation", "% of the peak", 100.0, False),
        ("tflops_per_rank", "Arithmetic of a rank", "TFLOP/s", 1.0, False),
        ("data_wait_s", "Waits for data", "ms in a step", 1000.0, False),
        ("data_bytes_per_s", "Bytes read", "MB/s", 1e-6, False),
        ("memory_gb", "Memory", "GB on a device", 1.0, False),
    ):
        found = curve(run.lines, key, scale=scale)
        if found is not None and (found.high.any() or key != "data_bytes_per_s"):
            yield Chart(title, svg(key, _drawing(found, label, log)))
    if run.distances:
        yield Chart("Fréchet distance over the steps", svg("distances", lambda axes: _distances(axes, run)))


def svg(name: str, draw: Callable[[Axes], None], size: tuple[float, float] = SIZE) -> str:
    """What ``draw`` draws, as an SVG element. name: makes its ids its own among those of the page."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _draw(axes: Axes, found: Curve, label: str | None = None, colour: str = BLUE, **more: object) -> None:
    if (found.high > found.low).any():
        axes.fill_between(found.x, found.low, found.high, color=colour, alpha=0.2, linewidth=0)
    marker = "o" if len(found.x) < 12 else None
    axes.plot(found.x, found.mean, color=colour, label=label, marker=marker, markersize=3, **more)  # type: ignore[arg-type]


def _legend(axes: Axes, ncols: int = 1) -> None:
    """Above the curves, beside which there may be no room."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.3, fontsize=8, ncols=ncols, handlelength=1.4)


def _steps(axes: Axes, label: str) -> None:
    axes.set(xlabel="step", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _drawing(found: Curve, label: str, log: bool) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        _draw(axes, found)
        _steps(axes, label)
        if log and (found.low > 0).all():
            _logarithmic(axes)
        elif not log:
            axes.set_ylim(bottom=0)

    return draw


def _loss(axes: Axes, loss: Curve, validation: Curve | None) -> None:
    _draw(axes, loss, "training")
    if validation is not None:
        _draw(axes, validation, "held out, EMA", ORANGE)
        _legend(axes, ncols=2)
    _steps(axes, "mean squared error")
    if (loss.low > 0).all():
        _logarithmic(axes)


def _parts(axes: Axes, parts: list[Curve]) -> None:
    colours = mpl.colormaps["viridis_r"]
    for number, found in enumerate(parts):
        shown = number in (0, len(parts) // 2, len(parts) - 1)
        told = f"t in {number / len(parts):.1f}–{(number + 1) / len(parts):.1f}" if shown else None
        axes.plot(found.x, found.mean, color=colours(0.05 + 0.9 * number / len(parts)), label=told, linewidth=1.1)
    _steps(axes, "mean squared error")
    if all((found.low > 0).all() for found in parts):
        _logarithmic(axes)
    _legend(axes, ncols=len(parts))


def _time(axes: Axes, run: Run) -> None:
    now = run.hours(run.state["time"])
    last = max(
        [run.hours(line["time"]) for line in run.all_lines]
        + [now if span.end is None else span.end for span in run.attempts]
    )
    unit, scale = ("hours", 1.0) if last >= 3 else ("minutes", 60.0)
    top = axes.get_xaxis_transform()
    for span in run.attempts:
        begin, end = span.begin * scale, (last if span.end is None else span.end) * scale
        axes.axvspan(begin, end, color=BAND, linewidth=0)
        axes.text(begin, 0.97, f" {span.told}", color=GREY, fontsize=8, va="top", transform=top, clip_on=True)
    for hours, cause in run.ends:
        colour = GREY if cause in attempts.INNOCENT else RED
        axes.axvline(hours * scale, color=colour, linewidth=1.2)
        axes.text(hours * scale, 1.01, cause, color=colour, fontsize=8, ha="center", va="bottom", transform=top)
    for piece in run.pieces():
        rows = [{"hours": run.hours(line["time"]) * scale, "step": line["step"]} for line in piece]
        found = curve(rows, "step", "hours")
        if found is not None:
            axes.plot(found.x, found.mean, color=BLUE)
    axes.set(xlabel=f"{unit} since the start", ylabel="step")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _distances(axes: Axes, run: Run) -> None:
    for number, (label, points) in enumerate(run.distances.items()):
        steps = sorted(points)
        axes.plot(steps, [points[step] for step in steps], marker="o", markersize=4, label=label, color=f"C{number}")
    _steps(axes, "distance")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    _legend(axes)
