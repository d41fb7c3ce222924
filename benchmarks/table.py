"""C1 to C10 in one table: what was measured last, against pass and stretch, and how often in a row all of it passed.

    make bench OFFICIAL=DIR     measures all of them, one after the other, in about an hour, and prints this table

Exit code 1 where one is missing, below "pass", or of a broken gate.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from benchmarks import ROOT

IDS = [f"C{number}" for number in range(1, 11)]


def in_a_row(lines: list[dict[str, Any]], name: str) -> int:
    """How many of the last runs of a comparison passed, up to the last that did not."""
    passed = [bool(line["passed"]) for line in lines if line["id"] == name]
    return len(list(itertools.takewhile(bool, reversed(passed))))


def rows(folder: Path) -> list[tuple[str, ...]]:
    """A line for each ratio, the first one the heads of the columns."""
    runs = folder / "runs.jsonl"
    lines = [json.loads(line) for line in runs.read_text().splitlines()] if runs.exists() else []
    out = [("id", "ratio", "pass", "stretch", "measured", "of a round", "", "passed in a row", "date", "commit")]
    for name in IDS:
        path = folder / f"{name}.json"
        if not path.exists():
            out.append((name, "", "", "", "", "", "not measured", "0", "", ""))
            continue
        record = json.loads(path.read_text())
        for key, value in record["measured"].items():
            low, high = record["spread"][key]
            verdict = "passed" if record["passed"] else "NOT PASSED" if record["gate_passed"] else "gate BROKEN"
            limits = (f"{record['pass'][key]:g}", f"{record['stretch'][key]:g}")
            figures = (f"{value:.3f}", f"{low:.3f} – {high:.3f}")
            where = (record["date"], record["commit"][:8])
            out.append((name, key, *limits, *figures, verdict, str(in_a_row(lines, name)), *where))
    return out


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    table = rows(parser.parse_args().results)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0 if all(row[6] == "passed" for row in table[1:]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
