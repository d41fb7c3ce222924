"""The page itself: facts and charts in one HTML file that needs neither network nor script."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from uvit_dist import storage
from uvit_dist.page.charts import charts
from uvit_dist.page.facts import Run, read_run
from uvit_dist.run_state import RUNNING
from uvit_dist.status import describe


def write_page(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run. out: the file; none: RUN_DIR/page.html. Returns its path.

    Raises ``MissingInputError`` where there is no run.
    """
    path = Path(run_dir, "page.html") if out is None else Path(out)
    storage.make_directory(str(path.parent))
    storage.write_bytes(str(path), render(read_run(run_dir)).encode())
    return path


def render(run: Run) -> str:
    """The page as HTML."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    shown = [(chart.title, Markup(chart.svg), chart.wide) for chart in charts(run)]  # ours: escaped by matplotlib
    name = Path(run.state["run_dir"]).name
    written = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(run.state["time"]))
    return templates.get_template("page.html").render(
        name=name, run=run, charts=shown, tiles=tiles(run.state), running=run.state["state"] in RUNNING,
        status=storage.without_secrets(describe(run.state)), written=written,
    )  # fmt: skip


def tiles(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of what is told first. state: of ``run_state``."""
    training = state["training"]
    total, step = training["total_steps"], training["step"]
    found = [("state", state["state"] if state["cause"] is None else f"{state['state']}: {state['cause']}")]
    found.append(("step", f"{step:,}" if total is None else f"{step:,} of {total:,}"))
    if training["loss"] is not None:
        found.append(("loss", f"{training['loss']:.4f}"))
        found.append(("images/s", f"{training['images_per_s']:,.0f}"))
    if training["goodput"] is not None:
        found.append(("goodput", f"{training['goodput']:.1%}"))
    if training["checkpoint"] is not None:
        found.append(("newest checkpoint", f"step {training['checkpoint']['step']:,}"))
    return found
