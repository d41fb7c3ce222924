"""The documentation as tests read it: its blocks, its command lines, the names in it."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "slurm/README.md", "benchmarks/README.md")
DOCUMENTS = [
    *(ROOT / name for name in OUTSIDE),
    *sorted((ROOT / "docs").glob("*.md")),
]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
SHELL = ("", "bash", "console", "sh")
"""Languages of blocks that may hold command lines; indented blocks have none."""


@dataclass(frozen=True)
class Command:
    """A command line of a document. program: a module, ``make`` or ``pytest``; where: file and line.

    error: what it says, where the document shows that it is a mistake.
    """

    where: str
    program: str
    arguments: tuple[str, ...]
    error: str = ""

    def __str__(self) -> str:
        return f"{self.where} {self.program}"


def tokens(path: Path) -> list:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text())


def code(path: Path) -> list[str]:
    """The inline code of a document."""
    children = (child for token in tokens(path) for child in token.children or ())
    return [child.content for child in children if child.type == "code_inline"]


def blocks(path: Path) -> Iterator[tuple[str, int, str]]:
    """(language, first line, content) of each fenced and indented block."""
    for token in tokens(path):
        if token.type in ("fence", "code_block"):
            yield token.info.strip(), token.map[0] + 1 + (token.type == "fence"), token.content


def configurations() -> dict[str, str]:
    """Configurations that documents write down in full: path → YAML. The first line is the path."""
    found = {}
    for path in DOCUMENTS:
        for language, _, content in blocks(path):
            if language == "yaml" and content.startswith("# configs/"):
                found[content.splitlines()[0].removeprefix("# ")] = content
    return found


def commands(path: Path) -> Iterator[Command]:
    """The command lines of a document that this repository's programs answer."""
    variables: dict[str, str] = {}
    for language, first, content in blocks(path):
        if language not in SHELL:
            continue
        number, parts = first, []
        lines = content.splitlines()
        for row, line in enumerate(lines):
            if not parts:
                if language == "console" and not line.startswith("$ "):
                    continue  # what a command printed
                number = first + row
            parts.append(line.strip().removeprefix("$ ").removesuffix("\\"))
            if line.endswith("\\"):
                continue
            text, parts = " ".join(parts), []
            if assigned := re.fullmatch(r'([A-Z]+)="(.*)"', text):
                variables[assigned[1]] = assigned[2]
                continue
            for name, value in variables.items():
                text = text.replace(f"${name}", value)
            shown = "\n".join(lines[row + 1 :])
            error = shown.removeprefix("error: ") if shown.startswith("error: ") else ""
            yield from _commands_in(text, f"{path.relative_to(ROOT)}:{number}", error)


def _commands_in(text: str, where: str, error: str) -> Iterator[Command]:
    if not re.match(r"(\w+=\S+ )*(\.venv/bin/)?(python3? -m|torchrun|make|uvit-\w+)\b", text):
        return
    reader = shlex.shlex(text, posix=True, punctuation_chars="|;&<>")
    reader.whitespace_split = True
    words = []
    for word in reader:
        if set(word) <= set("|;&<>"):
            break
        words.append(word)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    program = words[0].removeprefix(".venv/bin/")
    if program == "make":
        yield Command(where, "make", tuple(words[1:]), error)
    elif program.startswith("uvit-"):
        yield Command(where, SCRIPTS[program].removesuffix(":main"), tuple(words[1:]), error)
    else:
        at = words.index("-m") + 1
        yield Command(where, words[at], tuple(words[at + 1 :]), error)


class Parsed(BaseException):
    """The command line was understood: nothing more is to be done."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        self.arguments = arguments


def main_of(module: str) -> object:
    found = importlib.import_module(module)
    return (found if hasattr(found, "main") else importlib.import_module(f"{module}.__main__")).main


def parsed(command: Command) -> argparse.Namespace:
    """What the program's own parser makes of the command line, or SystemExit; the program does nothing else."""

    def stopping_after(parse):
        def wrapped(self, *args, **kwargs):
            raise Parsed(parse(self, *args, **kwargs))

        return wrapped

    parser = argparse.ArgumentParser
    with (
        mock.patch.object(parser, "parse_args", stopping_after(parser.parse_args)),
        mock.patch.object(parser, "parse_intermixed_args", stopping_after(parser.parse_intermixed_args)),
        mock.patch.object(sys, "argv", [command.program, *command.arguments]),
    ):
        try:
            main_of(command.program)()
        except Parsed as end:
            return end.arguments
    raise AssertionError(f"{command}: the program ended without parsing its command line")
