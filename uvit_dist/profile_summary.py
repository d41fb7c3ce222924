"""A trace of torch's profiler on one page: where the time of its steps went. Arithmetic on intervals alone.

A trace is in Chrome's format, as ``torch.profiler`` exports it: events with a start and a duration in microseconds.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Span = tuple[float, float]
"""(start, end), microseconds."""
STEP, DATA = "step ", "data wait"
"""Names of the annotations of a step (its number follows) and of the wait for its data."""
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of events on a GPU."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Calls in which the host waits for the GPU."""
COMMUNICATION = ("gloo:", "nccl:", "c10d::", "record_param_comms")
"""How the names of collectives begin, on the host; on a GPU their kernels have nccl in their names."""
TOP, WIDTH = 15, 80


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same time as disjoint spans in order."""
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        else:
            out.append((start, end))
    return out


def within(spans: Sequence[Span], frame: Sequence[Span]) -> list[Span]:
    """The part of ``spans`` inside ``frame``; both and the result merged."""
    out, first = [], 0
    for start, end in spans:
        while first < len(frame) and frame[first][1] <= start:
            first += 1
        for low, high in frame[first:]:
            if low >= end:
                break
            out.append((max(start, low), min(end, high)))
    return out


def total(spans: Sequence[Span]) -> float:
    """Their length, of merged spans, microseconds."""
    return sum(end - start for start, end in spans)


def summary(trace: Mapping[str, Any], title: str) -> str:
    """The page, in Markdown. All figures are means over the steps traced.

    Compute, communication, data wait and host make up a step: what is computed beside a collective counts as compute,
    what a GPU does while the host waits for data as compute or communication, and host is the rest.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X" and "dur" in event]
    steps = [event for event in events if _is_step(event)]
    frame = merged(_span(event) for event in steps)
    inside = [event for event in events if not _is_step(event) and within([_span(event)], frame)]
    on_device = [event for event in inside if _kind(event) in DEVICE]
    count = max(len(steps), 1)
    calls = [event for event in inside if _kind(event) == "cpu_op" and not _is_communication(event)]
    collectives = [event for event in inside if _is_communication(event)]
    if on_device:
        collectives = [event for event in on_device if "nccl" in event["name"].lower()]
        calls = [event for event in on_device if "nccl" not in event["name"].lower()]
    parts = _parts(frame, calls, collectives, [event for event in inside if event["name"] == DATA])
    where = "one GPU" if on_device else "CPU"
    lines = [f"# {title}", "", f"{len(steps)} steps on {where}, {total(frame) / count / 1e3:.2f} ms each.", ""]
    lines += _table(("", "ms per step", "of the step"), _shares(parts, frame, count))
    lines += ["", *_hidden(frame, collectives, parts, count), ""]
    lines += [f"## The longest {'kernels' if on_device else 'operations, without those inside them'}", ""]
    times = _sums(calls + collectives) if on_device else _own_times(inside)
    lines += _table(("", "ms per step", "calls per step"), _longest(times, count))
    lines += ["", "## Parts of a step, as the host goes through them", ""]
    parts_of_host = [e for e in inside if _kind(e) == "user_annotation" and not _is_communication(e)]
    lines += _table(("", "ms per step", "calls per step"), _longest(_sums(parts_of_host), count))
    lines += ["", "## Where the host waits for the GPU", ""]
    lines += _waits(inside, count) if on_device else ["There is no GPU here."]
    return "\n".join(lines) + "\n"


def _kind(event: Mapping[str, Any]) -> str:
    return str(event.get("cat", ""))


def _span(event: Mapping[str, Any]) -> Span:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def _is_step(event: Mapping[str, Any]) -> bool:
    return _kind(event) == "user_annotation" and event["name"].startswith(STEP)


def _is_communication(event: Mapping[str, Any]) -> bool:
    return _kind(event) in ("cpu_op", "user_annotation") and event["name"].startswith(COMMUNICATION)


def _parts(frame: list[Span], calls: list[Any], collectives: list[Any], waits: list[Any]) -> dict[str, float]:
    """Microseconds of each part; each takes what those before it have left."""
    out, taken = {}, list[Span]()
    for name, events in (("compute", calls), ("communication", collectives), ("data wait", waits)):
        both = within(merged([*taken, *map(_span, events)]), frame)
        out[name] = total(both) - total(taken)
        taken = both
    return {**out, "host": total(frame) - total(taken)}


def _shares(parts: Mapping[str, float], frame: list[Span], count: int) -> list[tuple[str, str, str]]:
    whole = max(total(frame), 1e-9)
    return [(name, f"{time / count / 1e3:.3f}", f"{time / whole:.1%}") for name, time in parts.items()]


def _hidden(frame: list[Span], collectives: list[Any], parts: Mapping[str, float], count: int) -> list[str]:
    everything = total(within(merged(map(_span, collectives)), frame))
    hidden = everything - parts["communication"]
    return [
        f"Collectives took {everything / count / 1e3:.3f} ms per step in all; {hidden / count / 1e3:.3f} ms of that "
        "lie beside compute and count as such."
    ]


def _sums(events: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, int]]:
    """Name → (microseconds, calls)."""
    out: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for event in events:
        time, calls = out[event["name"]]
        out[event["name"]] = time + float(event["dur"]), calls + 1
    return out


def _own_times(events: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, int]]:
    """As ``_sums``, of operations on the host, without the time of those that they call."""
    out: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    open_calls: dict[Any, list[tuple[float, str]]] = defaultdict(list)
    operations = [event for event in events if _kind(event) == "cpu_op" or _is_communication(event)]
    for event in sorted(operations, key=lambda event: (float(event["ts"]), -float(event["dur"]))):
        start, end = _span(event)
        stack = open_calls[event.get("pid"), event.get("tid")]
        while stack and stack[-1][0] <= start:
            stack.pop()
        time, calls = out[event["name"]]
        out[event["name"]] = time + end - start, calls + 1
        if stack:
            time, calls = out[stack[-1][1]]
            out[stack[-1][1]] = time - (min(end, stack[-1][0]) - start), calls
        stack.append((end, event["name"]))
    return out


def _longest(times: Mapping[str, tuple[float, int]], count: int) -> list[tuple[str, str, str]]:
    order = sorted(times.items(), key=lambda item: -item[1][0])[:TOP]
    return [(_short(name), f"{time / count / 1e3:.3f}", f"{calls / count:g}") for name, (time, calls) in order]


def _waits(events: list[Any], count: int) -> list[str]:
    """Each call that waits, within the innermost operation or annotation around it."""
    around: dict[Any, list[Any]] = defaultdict(list)
    for event in events:
        if _kind(event) in ("cpu_op", "user_annotation"):
            around[event.get("pid"), event.get("tid")].append(event)
    found: Counter[tuple[str, str]] = Counter()
    for event in events:
        if _kind(event) in ("cuda_runtime", "cuda_driver") and event["name"] in WAITS:
            start, end = _span(event)
            callers = [
                e for e in around[event.get("pid"), event.get("tid")] if _span(e)[0] <= start <= end <= _span(e)[1]
            ]
            names = [e["name"] for e in sorted(callers, key=lambda e: float(e["dur"]))]
            found[event["name"], " in ".join(map(_short, names[:2])) or "no operation"] += 1
    if not found:
        return ["Nowhere."]
    rows = [(name, place, f"{times / count:g}") for (name, place), times in found.most_common()]
    each = f"{sum(found.values()) / count:g} times in a step."
    return [each, "", *_table(("call", "within", "per step"), rows)]


def _short(name: str) -> str:
    name = name.replace("|", "/")
    return name if len(name) <= WIDTH else name[: WIDTH - 1] + "…"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
