"""What a batch process makes of SLURM's signals, where nobody can be asked what they mean."""

import signal
import subprocess
import sys

import pytest

from tests.tiny import ROOT

BATCH = """
import os, signal, sys
from uvit_dist.notices import Notices
notices = Notices()
print(notices.look(), notices.reason, notices.cancelled)
for number in map(int, sys.argv[1:]):
    os.kill(os.getpid(), number)
    print(notices.look(), notices.reason, notices.cancelled)
"""
WARNING = "SLURM's warning: preemption, the time limit, or a user's signal"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "last"),
    [
        ([signal.SIGCONT], "(False, False) None False"),
        ([signal.SIGUSR2], f"(True, False) {WARNING} False"),
        ([signal.SIGUSR2, signal.SIGUSR2], f"(True, False) {WARNING} False"),
        ([signal.SIGTERM], "(True, False) cancelled True"),
        ([signal.SIGUSR2, signal.SIGTERM], f"(True, False) {WARNING} False"),
    ],
)
def test_signals_are_noted_and_a_warning_makes_the_difference(tmp_path, signals, last):
    done = subprocess.run(
        [sys.executable, "-c", BATCH, *(str(int(number)) for number in signals)],
        cwd=ROOT, env={"PATH": str(tmp_path), "SLURM_JOB_ID": "1"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, *_, told = done.stdout.splitlines()
    assert first == "(False, False) None False"
    assert told == last
