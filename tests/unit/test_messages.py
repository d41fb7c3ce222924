"""Every message of a user's mistake, read from the source: it says what is wrong, with its value, and what to do next.

Each call of a class of ``uvit_dist.errors`` in the packages is found, and its text put together as far as the source
has it: constants, both sides of a condition, what a function of the module returns. What is not there stays as {…}.
"""

import ast
import itertools
import re
from pathlib import Path

import pytest

from uvit_dist import errors

ROOT = Path(__file__).parents[2]
KINDS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.UserError)}
NEXT_STEPS = (
    "add", "ask", "bring", "change", "convert", "copy", "correct", "delete", "download", "drop", "evaluate",
    "export", "extract", "fetch", "free", "get", "give", "install", "leave", "log in", "look for", "make", "mend",
    "move", "name", "pip install", "put", "raise", "recompute", "remove", "rename", "save", "say", "see", "set",
    "shuffle", "start", "store", "take", "train", "try", "type", "unpack", "unset", "use", "wait for", "write",
)  # fmt: skip
NEXT_STEP = re.compile(
    # how a clause begins, so that it is no participle; nor the section of a key
    rf"(?:^|[;:.,(\n]\s*|\b(?:or|and|then|first)\s)(?:{'|'.join(NEXT_STEPS)})\b(?!\.\w)"
    r"|did you mean|\{[^{}]*(?:remedy|hint)[^{}]*\}",  # or what to do is told by the caller
    re.IGNORECASE,
)
SOMETHING_NAMED = re.compile(r"\{[^{}]+\}|\b[a-z_]+\.[a-z_]+\b|--[a-z]+|\b[A-Z_]{4,}\b")
WRAPPED = "a reason, told within a message that has the file and what to do"
RULES = "lines that are each a rule of the configuration, with its key, its value and what it must be"
OF_RANKS = "what each rank's own error says, with what to do"
WITHOUT_A_NEXT_STEP = {
    ("data_tools/copy_shards.py", "its sha256 differs"): WRAPPED,
    ("data_tools/index_shards.py", ".{arrays[0]}: {error}"): "the error in it has it",
    ("data_tools/index_shards.py", "{path}: {raw.key}: {error}"): "the error in it has it",
    ("uvit_dist/checkpoint.py", "{'; '.join(problems)}"): OF_RANKS,
    ("uvit_dist/config_cluster.py", "launch.cluster {path}: {len(lines)} mistake(s)"): RULES,
    ("uvit_dist/config_yaml.py", "{origin}: {len(lines)} mistake(s)"): RULES,
    ("uvit_dist/data/ranges.py", "{path}"): "never told: the reader takes it for a lost shard",
    ("uvit_dist/models/autoencoder.py", "autoencoder {path}: {error}"): "the error in it has it",
    ("uvit_dist/pipeline.py", "sample: {told}"): RULES,
    ("uvit_dist/preflight.py", "{'\\n'.join(broken)}"): RULES,
    ("uvit_dist/second_home.py", "the manifest cannot be read"): WRAPPED,
    ("uvit_dist/second_home.py", "{url}: every reading"): WRAPPED,
}
"""(file, how the message begins) → why it needs none."""
WITHOUT_A_VALUE = {
    ("data_tools/copy_shards.py", "its sha256 differs"): WRAPPED,
    ("data_tools/index_shards.py", "holds"): WRAPPED,
    ("uvit_dist/second_home.py", "the manifest cannot be read"): WRAPPED,
    ("uvit_dist/fid.py", "feature moments are not finite"): "millions of numbers, none of them of use",
    ("uvit_dist/scores/neighbours.py", "features are not finite"): "millions of numbers, none of them of use",
    ("uvit_dist/slurm.py", "scontrol is not on this machine"): "the command is what is wrong",
    ("uvit_dist/pipeline.py", "prompts: this system"): "the argument is named, and any value of it is wrong",
}
"""(file, how the message begins) → why it names nothing."""


class Texts:
    """The texts that an expression of one module can give."""

    def __init__(self, tree, constants):
        self.functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        self.tree, self.constants = tree, constants

    def of(self, node, scope, depth=0):
        """All of them; what only a running program knows as {its source}."""
        unknown = ["{" + ast.unparse(node).replace("{", "(").replace("}", ")") + "}"]
        if depth > 6 and not _is_text(node):
            return unknown
        within = [*scope]
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return self._joined(parts, within, depth)
            case ast.FormattedValue(value=ast.Constant(value=value)):
                return [str(value)]
            case ast.FormattedValue(value=value):
                return self.of(value, within, depth)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self._joined([left, right], within, depth)
            case ast.IfExp(body=body, orelse=other):
                return self.of(body, within, depth) + self.of(other, within, depth)
            case ast.Name(id=name):
                assigned = [value for function in within for value in self._assigned(function, node)]
                told = [text for value in assigned for text in self.of(value, within, depth + 1)]
                return told or self.constants.get(name, unknown)
            case ast.Attribute(attr=name) if name in self.constants and name.isupper():
                return self.constants[name]
            case ast.Attribute(value=ast.Name(id="self")):
                return [text for value in self._assigned(self.tree, node) for text in self.of(value, [], 9)] or unknown
            case ast.Call(func=ast.Name(id=name)) if name in self.functions:
                function = self.functions[name]
                returned = [one.value for one in ast.walk(function) if isinstance(one, ast.Return) and one.value]
                told = [text for value in returned if _is_text(value) for text in self.of(value, [function], depth + 1)]
                return told or unknown
        return unknown

    def _assigned(self, tree, target):
        """The texts that are assigned to a name in a piece of the source."""
        name = ast.unparse(target)
        found = (node for node in ast.walk(tree) if isinstance(node, ast.Assign) and _is_text(node.value))
        return [node.value for node in found if any(ast.unparse(one) == name for one in node.targets)]

    def _joined(self, parts, scope, depth):
        found = [self.of(part, scope, depth) for part in parts]
        return ["".join(chosen) for chosen in itertools.islice(itertools.product(*found), 64)]


def _is_text(node):
    return isinstance(node, ast.JoinedStr | ast.IfExp | ast.BinOp) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def messages():
    """(file, line, text) of every text with which an error of a user's can be made."""
    paths = sorted(path for package in ("uvit_dist", "data_tools", "slurm") for path in (ROOT / package).rglob("*.py"))
    trees = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}
    constants = {}
    for tree in trees.values():
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and _is_text(node.value):
                constants.setdefault(node.targets[0].id, []).extend(Texts(tree, {}).of(node.value, []))
    for path, tree in trees.items():
        texts = Texts(tree, constants)
        yield from _calls(path, tree, texts, [])


def _calls(path, node, texts, scope):
    for child in ast.iter_child_nodes(node):
        inner = [child] if isinstance(child, ast.FunctionDef) else scope
        if isinstance(child, ast.Call) and ast.unparse(child.func).split(".")[-1] in KINDS:
            yield from ((path, child.lineno, text) for text in texts.of(child.args[0], inner))
        yield from _calls(path, child, texts, inner)


MESSAGES = list(messages())


def failing(rule, exceptions):
    """Where a message does not match, and is no exception; and exceptions that are none."""
    wrong, used = [], set()
    for path, line, text in MESSAGES:
        if rule.search(text):
            continue
        excused = [key for key in exceptions if key[0] == path and text.startswith(key[1])]
        used |= {*excused}
        if not excused:
            wrong.append(f"{path}:{line}: {text}")
    return wrong + [f"no exception any more: {key}" for key in exceptions if key not in used]


def test_there_are_messages_to_read():
    assert len({(path, line) for path, line, _ in MESSAGES}) > 300


def test_every_message_ends_in_what_to_do():
    assert failing(NEXT_STEP, WITHOUT_A_NEXT_STEP) == []


def test_every_message_names_a_value_a_key_or_a_file():
    assert failing(SOMETHING_NAMED, WITHOUT_A_VALUE) == []


@pytest.mark.parametrize(
    "text",
    ["a.b {x}: no such file", "environment: {x} set but {y} not", "train.steps {n}: not whole", "{path}: {why}"],
)
def test_a_message_without_a_next_step_is_seen(text):
    assert not NEXT_STEP.search(text)
    assert NEXT_STEP.search(f"{text}; give another")


def rules():
    """(file, line, text) of each rule of the configuration: (whether it holds, what to say if not)."""
    for path in sorted((ROOT / "uvit_dist").glob("config*.py")):
        tree = ast.parse(path.read_text())
        texts = Texts(tree, {})
        for node in ast.walk(tree):
            parts = node.elts if isinstance(node, ast.Tuple) and len(node.elts) == 2 else [None, None]
            if isinstance(parts[0], ast.Compare | ast.BoolOp | ast.UnaryOp | ast.Call) and _is_text(parts[1]):
                yield from ((path.name, node.lineno, text) for text in texts.of(parts[1], []))


def test_every_rule_of_the_configuration_names_its_key_and_what_it_must_be():
    found = list(rules())
    assert len(found) > 40
    states = re.compile(r"\b(must|needs?|ha(s|ve)|missing|set|leave|write|give|exclude each other)\b")
    assert [rule for rule in found if not states.search(rule[2])] == []
    assert [rule for rule in found if not re.match(r"[a-z_]+(\.[a-z_]+)*\b", rule[2])] == []
