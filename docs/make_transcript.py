"""Write the output into docs/transcript.md anew: its commands, one after another, in a new clone of this checkout.

    python -m docs.make_transcript                      # all of it, in a new directory
    python -m docs.make_transcript --dir /tmp/tour      # … in this one, made where it does not exist
    python -m docs.make_transcript --dir /tmp/tour --only 3     # the third section alone, where the others have run

In the document a line of a ``console`` block that begins with ``$ `` is a command, and what follows it is replaced. A
block whose first line is ``# PATH.yaml`` or ``# PATH.py`` is written to that file. The clone has nothing but what is
committed: its first ``make`` installs the environment. A command that fails ends it; the document is then as it was.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).absolute().parents[1]
DOCUMENT = ROOT / "docs" / "transcript.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FIRST, LAST, WIDTH = 20, 20, 180
"""Lines of a long output that are kept, and characters of a long line."""
ALIKE = re.compile(r"[\d.,:]+")
"""What may differ between neighbouring lines of which only the first and the last are kept."""
END = "\x1e"


class Shell:
    """One bash for all commands, in the clone, as a user has it: variables last from one to the next."""

    def __init__(self, home: Path) -> None:
        mine = ("PATH", "LANG", "LC_ALL", "TERM", "TMPDIR", "USER")
        environment = {name: os.environ[name] for name in mine if name in os.environ}
        self._process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"], cwd=home / "uvit_dist", text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**environment, "HOME": str(home), "COLUMNS": "120", "PIP_QUIET": "1"},  # pip's errors alone
        )  # fmt: skip

    def run(self, command: str) -> str:
        """What it prints. Raises ``RuntimeError`` where it fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{{ {command}\n}} < /dev/null; printf '{END}%s\\n' $?\n")
        lines = []
        for line in self._process.stdout:
            text, end, code = line.partition(END)
            lines.append(text)
            if end:
                break
        output = "".join(lines)
        if not end or int(code):
            raise RuntimeError(f"$ {command}\n{output}")
        return output


def shown(output: str, home: Path) -> str:
    """An output as the document has it: without this machine's paths and name, the middle of long ones left out."""
    lines = [line.rstrip("\n").split("\r")[-1].rstrip() for line in output.splitlines()]
    for real, neutral in ((str(home), "~"), (str(ROOT), "~/uvit_dist"), (socket.gethostname(), "localhost")):
        lines = [re.sub(rf"(?<!\w){re.escape(real)}(?!\w)", neutral, line) for line in lines]
    lines = [line if len(line) <= WIDTH else line[:WIDTH] + " …" for line in lines]
    lines = [f" {line}" if line.startswith("$ ") else line for line in lines]  # what a program printed is no command
    alike = (list(group) for _, group in itertools.groupby(lines, lambda line: ALIKE.sub("", line)))
    lines = [line for group in alike for line in ([group[0], "…", group[-1]] if len(group) > 4 else group)]
    if len(lines) > FIRST + LAST + 1:
        lines[FIRST:-LAST] = ["…"]
    return "".join(f"{line}\n" for line in lines)


def commands_of(block: str) -> Iterator[str]:
    """The commands of a console block; a line that ends with a backslash goes on in the next."""
    parts: list[str] = []
    for line in block.splitlines():
        if parts or line.startswith("$ "):
            parts.append(line.removeprefix("$ "))
            if not line.endswith("\\"):
                yield "\n".join(parts)
                parts = []


def run_section(text: str, shell: Shell, home: Path) -> str:
    """A section of the document with the output of its commands replaced."""

    def replaced(block: re.Match[str]) -> str:
        language, content = block.groups()
        if named := re.match(r"# (\S+\.(?:yaml|py))\n", content):
            (home / "uvit_dist" / named[1]).write_text(content)
        if language != "console":
            return block[0]
        out = ""
        for command in commands_of(content):
            print(f"$ {command}", file=sys.stderr, flush=True)
            out += f"$ {command}\n{shown(shell.run(command), home)}"
        return f"```console\n{out}```"

    return FENCE.sub(replaced, text)


def clone(home: Path) -> None:
    """A clone of the commit that is checked out."""
    home.mkdir(parents=True)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(home / "uvit_dist")], check=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="the home directory of the tour (default: a new one)")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the sections to run again (default: all)")
    arguments = parser.parse_args()
    home = (arguments.dir or Path(tempfile.mkdtemp(), "home")).absolute()
    if not home.exists():
        clone(home)
    head, *sections = re.split(r"^(?=## )", DOCUMENT.read_text(), flags=re.MULTILINE)
    shell = Shell(home)
    if (home / "uvit_dist" / ".venv").exists():
        shell.run(". .venv/bin/activate")
    for number in arguments.only or range(1, len(sections) + 1):
        sections[number - 1] = run_section(sections[number - 1], shell, home)
    DOCUMENT.write_text("".join([head, *sections]))
    print(f"{DOCUMENT} is written; what the commands made is in {home}", file=sys.stderr)


if __name__ == "__main__":
    main()
