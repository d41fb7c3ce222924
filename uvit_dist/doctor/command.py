"""The doctor's command line: what is looked at, and the page."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from uvit_dist.config import Config
from uvit_dist.config_cluster import ClusterProfile, read_profile
from uvit_dist.config_yaml import dump_config, load_config
from uvit_dist.doctor import cluster, machine, packages
from uvit_dist.doctor.children import Child, end_all, limited
from uvit_dist.doctor.finding import Finding, exit_code, of_error
from uvit_dist.errors import ConfigError, explained_exit

LIMIT_S = 240.0
QUICK_S = 45.0
"""Limit of what needs no child process: files' systems, SLURM's commands."""
WIDTH = 120
SIGNS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "problem": ("PROBLEM", "bold red")}
ORDER = ("configuration", "packages", "GPUs", "machine", "SLURM", "S3", "data", "weights", "references")


def examine(config: Config | None, profile: ClusterProfile | None, limit_s: float) -> list[Finding]:
    """All findings on this machine, and of a configuration where there is one. limit_s: of each child process."""
    children = [Child("packages", ["devices"])]
    if config is not None:
        children.append(Child("configuration", ["inputs"], dump_config(config)))
    found = limited("packages", "versions", packages.check, QUICK_S)
    found += limited("machine", "machine", lambda: machine.check(config, profile), QUICK_S)
    found += limited("SLURM", "commands", lambda: cluster.check(config, profile), QUICK_S)
    for child in children:
        found += child.wait(limit_s)
    gpus = int(children[0].facts.get("gpus", 0))
    if gpus:
        found += _ring(gpus, limit_s)
    if config is not None:
        found += machine.judge_ranks(config, gpus)
    return sorted(found, key=lambda finding: ORDER.index(finding.section))


def _ring(ranks: int, limit_s: float) -> list[Finding]:
    """An all-reduce over so many GPUs of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    one = [Child("GPUs", ["ring"], "", {**common, "RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(ranks)]
    return [finding for child in one for finding in child.wait(limit_s)]


def table(findings: Sequence[Finding]) -> Table:
    """The page: a row for each finding, remedies below what they mend."""
    page = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for _ in range(3):
        page.add_column(no_wrap=True)
    page.add_column(overflow="fold")
    section = None
    for finding in findings:
        head, section = (finding.section if finding.section != section else ""), finding.section
        sign, style = SIGNS[finding.level]
        told = Text(finding.told)
        if finding.remedy:
            told.append(f"\n→ {finding.remedy}", style="cyan")
        page.add_row(Text(head, style="bold"), finding.subject, Text(sign, style=style), told)
    return page


def summary(findings: Sequence[Finding]) -> str:
    """The last line."""
    problems, warnings = (sum(one.level == level for one in findings) for level in ("problem", "warning"))
    if not problems:
        return f"nothing is wrong; {warnings} warning(s)" if warnings else "all is well"
    return f"{problems} problem(s) to mend, {warnings} warning(s); behind each → is what to do"


def run(description: str | None) -> None:
    """The command line. description: of --help."""
    parser = argparse.ArgumentParser(
        prog="python -m uvit_dist.doctor", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file; without it, what needs none is looked at")
    parser.add_argument("--json", action="store_true", help="the findings, for programs")
    parser.add_argument("--problems", action="store_true", help="leave out what works")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="for each check (default: %(default)g)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    if args.overrides and not args.config:
        parser.error("changes to the configuration need --config")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head
    with explained_exit():
        try:
            findings = _findings(args)
        finally:
            end_all()  # a Ctrl-C leaves no probe behind
        if args.problems:
            findings = [finding for finding in findings if finding.level != "ok"]
        if args.json:
            print(json.dumps([asdict(finding) for finding in findings], indent=1))
        else:
            console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
            console.print(table(findings))
            console.print(Text(summary(findings), style="bold"))
    sys.stdout.flush()
    os._exit(exit_code(findings))  # a check whose time was over may still hang in a thread


def _findings(args: argparse.Namespace) -> list[Finding]:
    config = profile = None
    mistakes = []
    try:
        if args.config:
            config = load_config(args.config, args.overrides)
            profile = read_profile(config.launch.cluster) if config.launch.target == "slurm" else None
    except ConfigError as error:
        mistakes.append(of_error("configuration", str(args.config), error))
    found = [*mistakes, *examine(config, profile, args.limit)]
    return found if config is None else [_for_this(finding, args.config) for finding in found]


def _for_this(finding: Finding, config: str) -> Finding:
    """With this configuration in the commands to type, which messages have for any."""
    told, remedy = (text.replace("YOUR_CONFIG.yaml", config) for text in (finding.told, finding.remedy))
    return replace(finding, told=told, remedy=remedy)
