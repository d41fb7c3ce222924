"""--help of every command: what it does, and examples that its own parser takes."""

import argparse
import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.tiny import ROOT
from uvit_dist.config_yaml import load_config

OURS = ("uvit_dist", "data_tools", "slurm")
EXAMPLE = re.compile(r"^ {4}(?:python|torchrun(?: --\S+ \d+)*) -m (?P<module>[\w.]+)(?P<arguments>.*)$")


def commands():
    """Modules that are run with python -m and have options."""
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text()
            if "\nif __name__ == " in text and ("argparse" in text or "__doc__" in text):
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                yield module.removesuffix(".__main__"), path


def examples(path):
    """(module, arguments) of each example in a module's docstring."""
    lines = (ast.get_docstring(ast.parse(path.read_text()), clean=False) or "").splitlines()
    found = [match for line in lines if (match := EXAMPLE.match(line))]
    return [(match["module"], shlex.split(re.split(r"\s{3,}[(#]| <", match["arguments"])[0])) for match in found]


COMMANDS = list(commands())
EXAMPLES = [example for _, path in COMMANDS for example in examples(path)]


class Parsed(Exception):
    """The command line was taken."""


def run(monkeypatch, module, arguments):
    """What a command makes of its arguments, before it does anything."""
    name = module if Path(ROOT, *module.split(".")).with_suffix(".py").exists() else f"{module}.__main__"
    main = importlib.import_module(name).main
    for method in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, method)

        def parse(self, *args, original=original):
            raise Parsed(original(self, *args))

        monkeypatch.setattr(argparse.ArgumentParser, method, parse)
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    main()


@pytest.mark.parametrize(("command", "path"), COMMANDS, ids=[name for name, _ in COMMANDS])
def test_help_shows_an_example_of_the_command_and_explains_every_option(command, path, monkeypatch, capsys):
    assert command in [module for module, _ in examples(path)], "an example, indented by four, in the docstring"
    parsers = []
    original = argparse.ArgumentParser.format_help
    monkeypatch.setattr(argparse.ArgumentParser, "format_help", lambda self: (parsers.append(self), original(self))[1])
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, command, ["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: python -m {command} "), told.splitlines()[0]
    assert f"    python -m {command}" in told, "the examples keep their lines"
    assert [action.dest for action in parsers[0]._actions if not action.help] == []


@pytest.mark.parametrize(("module", "arguments"), EXAMPLES)
def test_examples_are_taken_and_name_configurations_that_are_there(module, arguments, monkeypatch):
    with pytest.raises(Parsed) as taken:
        run(monkeypatch, module, arguments)
    (given,) = taken.value.args
    config = getattr(given, "config", None)
    if config is not None and str(config).startswith("configs/"):
        load_config(ROOT / config, getattr(given, "overrides", []))
