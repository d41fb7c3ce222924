"""The page of a real run: trained, gone back, validated and scored; while it goes on, too."""

import re
import subprocess
import sys

import pytest

from tests.integration.jobs import train_job
from tests.ranks import run_ranks
from tests.tiny import DEMO, ROOT, overrides, tiny_config
from uvit_dist.page.facts import curve, read_run

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
ONE = "launch.processes_per_node=1"


def command(module, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=400
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_of_a_run_before_and_after_its_evaluation(data_dir, tmp_path):
    run_dir = tmp_path / "run"
    validated = (ONE, f"validation.index={data_dir}/index.json", "validation.samples=24", "validation.every=3",
                 "validation.batch_size=12", "checkpoint.every=3")  # fmt: skip
    assert run_ranks(train_job, 1, tiny_config(data_dir, run_dir, *validated, "train.steps=6")) == ["complete"]
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss": 0.')
    page = command("uvit_dist.page", run_dir).strip()
    before = (run_dir / "page.html").read_text()
    assert page == str(run_dir / "page.html")
    assert "<h2>Loss by timestep</h2>" in before
    assert "Fréchet" not in before
    assert "<img" not in before

    arguments = ["--config", DEMO, "--local", "1", *overrides(data_dir, run_dir, *validated, "train.steps=6")]
    command("uvit_dist.launch", *arguments, "--job", "evaluate", "evaluate.samples=20", "evaluate.chunk_size=10",
            "evaluate.sub_batch_size=10")  # fmt: skip
    command("uvit_dist.page", run_dir, "--out", tmp_path / "page.html")
    after = (tmp_path / "page.html").read_text()
    assert "<h2>Fréchet distance over the steps</h2>" in after
    assert re.search(r'<img src="data:image/png;base64,[\w+/=]+" alt="samples, step 6, ema weights', after)
    assert "seed: 1234" in after
    run = read_run(run_dir)
    assert curve(run.lines, "loss").x.tolist() == [1, 2, 3, 4, 5, 6]
    assert curve(run.lines, "validation_loss").x.tolist() == [3, 6]
