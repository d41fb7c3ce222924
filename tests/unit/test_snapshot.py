"""The code that a job runs is that of its submission."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import ROOT
from uvit_dist import snapshot
from uvit_dist.errors import OutputError


def test_the_snapshot_is_whole_is_used_again_and_is_what_runs(tmp_path):
    target = snapshot.place(tmp_path)
    assert target.parent == tmp_path / "launch"
    snapshot.make(target)
    assert snapshot.content_hash(target) == snapshot.content_hash(ROOT) == target.name.removeprefix("code-")
    assert not list(target.rglob("__pycache__"))
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    snapshot.make(target)
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before
    code = "import uvit_dist, data_tools; print(uvit_dist.__file__, data_tools.__file__)"
    environment = {"PYTHONPATH": str(target), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert [Path(path).parents[1] for path in found.stdout.split()] == [target, target]


def test_any_change_of_the_code_makes_another_snapshot(tmp_path):
    packages = tmp_path / "checkout"
    for name in snapshot.PACKAGES:
        (packages / name).mkdir(parents=True)
        (packages / name / "__init__.py").write_text("a = 1\n")
    first = snapshot.content_hash(packages)
    (packages / "uvit_dist" / "__pycache__").mkdir()
    (packages / "uvit_dist" / "__pycache__" / "x.pyc").write_text("compiled")
    assert snapshot.content_hash(packages) == first
    (packages / "uvit_dist" / "__init__.py").rename(packages / "uvit_dist" / "other.py")
    renamed = snapshot.content_hash(packages)
    (packages / "uvit_dist" / "other.py").write_text("a = 2\n")
    assert len({first, renamed, snapshot.content_hash(packages)}) == 3


def test_a_snapshot_that_was_cut_off_is_not_there(tmp_path, monkeypatch):
    target = snapshot.place(tmp_path)

    def full(source, copy):
        if len(list(target.parent.rglob("*.py"))) > 5:
            raise OSError(28, "No space left on device")
        Path(copy).write_bytes(Path(source).read_bytes())

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OutputError, match="No space left on device"):
        snapshot.make(target)
    assert list(target.parent.iterdir()) == []


def test_code_that_changes_while_it_is_copied_is_noticed(tmp_path, monkeypatch):
    target = snapshot.place(tmp_path)

    def changed(source, copy):
        Path(copy).write_bytes(Path(source).read_bytes() + (b"# edited\n" if copy.name == "fid.py" else b""))

    monkeypatch.setattr(shutil, "copyfile", changed)
    with pytest.raises(OutputError, match="changed while it was copied"):
        snapshot.make(target)
    assert list(target.parent.iterdir()) == []
