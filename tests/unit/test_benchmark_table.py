"""The record of a comparison, and the table of all."""

import json
import subprocess

from benchmarks import commit_of
from benchmarks.rounds import keep, result
from benchmarks.table import IDS, in_a_row, rows

LIMITS = {"vs_other": (2.0, 3.0)}


def record(name, ratio, gate=True):
    return result(name, LIMITS, {"vs_other": [ratio] * 7}, {"equal": gate}, {}, {}, "make bench-x")


def test_the_last_run_is_a_file_and_every_run_a_line(tmp_path):
    for ratio in (2.5, 1.5, 2.0, 2.25):
        keep(record("C3", ratio), tmp_path)
    assert json.loads((tmp_path / "C3.json").read_text())["measured"] == {"vs_other": 2.25}
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [line["measured"]["vs_other"] for line in lines] == [2.5, 1.5, 2.0, 2.25]
    assert [line["passed"] for line in lines] == [True, False, True, True]
    assert in_a_row(lines, "C3") == 2
    assert in_a_row(lines, "C4") == 0


def test_the_table_tells_what_passed_what_did_not_and_what_is_missing(tmp_path):
    keep(record("C1", 2.5), tmp_path)
    keep(record("C2", 1.5), tmp_path)
    keep(record("C3", 2.5, gate=False), tmp_path)
    table = {row[0]: row for row in rows(tmp_path)[1:]}
    assert list(table) == IDS
    assert [table[name][6] for name in IDS[:4]] == ["passed", "NOT PASSED", "gate BROKEN", "not measured"]
    assert [table[name][7] for name in IDS[:4]] == ["1", "0", "0", "0"]


def test_the_commit_of_a_result_says_where_code_was_changed_but_not_where_results_were(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, check=True)
        return done.stdout.decode().strip()

    assert commit_of(tmp_path) == ""
    git("init", "-q")
    result, code = tmp_path / "benchmarks" / "results" / "C1.json", tmp_path / "benchmarks" / "data.py"
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    code.write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert commit_of(tmp_path) == commit
    result.write_text("[]")
    assert commit_of(tmp_path) == commit
    code.write_text("2")
    assert commit_of(tmp_path) == f"{commit}-dirty"
