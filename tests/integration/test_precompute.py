"""Workers that make shards of images: killed, restarted, on several nodes, behind faults; the whole way to a score."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.fault_proxy import ALL_KINDS
from tests.integration.s3_fixtures import BUCKET, credentials, proxy, s3_server  # noqa: F401 - fixtures
from tests.ranks import CONTEXT, run_ranks
from tests.systems import photographs
from tests.tiny import DEMO, ROOT, overrides, tiny_config
from uvit_dist import storage, work
from uvit_dist.config import Config
from uvit_dist.data.shards import read_index

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
IMAGES, LEASE_S = 60, 2.0
SEEDS = range(int(os.environ.get("UVIT_DIST_SOAK", "1")))
"""Of when workers are killed; more of them in ``make soak``."""
FOLDER = ["data.format=folder", "data.crop=adm", "data.mirror=true", "data.samples_per_shard=6",
          "model.num_classes=4", "diffusion.null_label=3", f"precompute.lease_s={LEASE_S}"]  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Photographs as JPEG files in three folders of classes."""
    root = tmp_path_factory.mktemp("made") / "pictures"
    for number, image in enumerate(photographs(IMAGES, 75, 100, seed=4)):
        folder = root / f"n{number % 3:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number:03d}.jpg", quality=95)
    return root


@pytest.fixture(scope="module")
def alone(pictures, tmp_path_factory):
    """Name → bytes, of what one worker makes."""
    out = tmp_path_factory.mktemp("alone")
    (written,) = run_ranks(work_on, 1, tiny_config(out, out, *FOLDER, f"data.source={pictures}"))
    assert len(written) == len(set(written)) == 20
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def work_on(config: Config) -> list[str]:
    """A worker on a node of its own, as its rank says. Returns the names of the shards it has written."""
    from data_tools import pipeline
    from data_tools.precompute_latents import precompute
    from uvit_dist.data.shards import write_shard

    written = []

    def write(directory, name, *rest):
        record = write_shard(directory, name, *rest)
        written.append(name)
        return record

    pipeline.write_shard = write
    ours, node = work._this_process, os.environ["RANK"]
    work._this_process = lambda: {**ours(), "machine": f"node {node}"}
    storage.configure(config.storage)
    precompute(config, torch.device("cpu"))
    return written


def short_lived(config: Config, environment: dict[str, str], seconds: float | None) -> None:
    """A worker that is killed after so many seconds, if any."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    if seconds is not None:
        threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    work_on(config)


def killed_again_and_again(config: Config, workers: int, deaths: int, seed: int) -> int:
    """Workers side by side, each killed ``deaths`` times at random and started again. Returns how often one was."""
    draw, count = random.Random(seed), 0
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}

    def start(rank, lives_left):
        seconds = draw.uniform(0.3, 3.0) if lives_left else None
        process = CONTEXT.Process(target=short_lived, args=(config, {**aws, "RANK": str(rank)}, seconds))
        process.start()
        return process

    lives = {rank: deaths for rank in range(workers)}
    running = {rank: start(rank, lives[rank]) for rank in lives}
    deadline = time.monotonic() + 400
    while running:
        assert time.monotonic() < deadline, "the workers do not come to an end"
        for rank, process in list(running.items()):
            process.join(0.05)
            if process.exitcode is None:
                continue
            del running[rank]
            if process.exitcode == -signal.SIGKILL:
                lives[rank] -= 1
                count += 1
                running[rank] = start(rank, lives[rank])
            else:
                assert process.exitcode == 0
    return count


def output(url: str) -> dict[str, bytes]:
    return {name: storage.read_bytes(f"{url}/{name}") for name in storage.sizes_in(url)}


@pytest.fixture
def behind(proxy, s3_server, credentials):  # noqa: F811
    return proxy, s3_server.client()


@pytest.mark.s3
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("seed", SEEDS)
def test_four_workers_killed_at_random_behind_faults_make_what_one_makes(pictures, alone, behind, tmp_path, seed):
    gateway, client = behind
    for path in pictures.rglob("*.jpg"):
        client.put_file(str(path), f"{BUCKET}/{path.relative_to(pictures.parent)}")
    gateway.kinds = tuple(kind for kind in ALL_KINDS if kind not in ("flip", "404"))
    gateway.rate, gateway.stall_s = 0.1, 2.0
    url = f"s3://{BUCKET}/made-{seed}"
    config = tiny_config(
        tmp_path, tmp_path, *FOLDER, f"data.source=s3://{BUCKET}/pictures", f"data.index={url}/index.json",
        f"storage.endpoint={gateway.endpoint}", "storage.region=us-east-1", "storage.stall_s=0.7",
    )  # fmt: skip
    deaths = killed_again_and_again(config, workers=4, deaths=3, seed=seed)
    assert deaths >= 4, "most of them met their end while there was work"
    assert sum(gateway.counts.values()) >= 15, gateway.counts
    gateway.rate = 0.0
    storage.configure(config.storage)
    made = output(url)
    assert made.keys() == alone.keys()
    assert [name for name in alone if made[name] != alone[name] and name != "contact_sheet.png"] == []
    names = storage.tree(f"{url}/.work")
    assert len([name for name in names if "unit-" in name and ".done-0" in name]) == 10


def test_workers_of_several_nodes_share_the_shards_each_written_once(pictures, alone, tmp_path):
    config = tiny_config(tmp_path, tmp_path, *FOLDER, f"data.source={pictures}", "precompute.lease_s=60")
    written = Counter(name for names in run_ranks(work_on, 3, config) for name in names)
    assert set(written.values()) == {1}
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert {name: made[name] for name in alone} == alone


def test_the_number_of_decoding_processes_changes_nothing(pictures, alone, tmp_path):
    config = tiny_config(tmp_path, tmp_path, *FOLDER, f"data.source={pictures}", "precompute.decode_processes=2")
    run_ranks(work_on, 1, config)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert {name: made[name] for name in alone} == alone


def test_from_a_folder_of_jpegs_to_a_scored_model_in_three_commands(pictures, tmp_path):
    run_dir = tmp_path / "run"
    arguments = ["--config", str(DEMO), "--local", "1", *overrides(tmp_path / "data", run_dir), *FOLDER,
                 f"data.source={pictures}", "data.lanes=4", "data.block_size=2", "train.global_batch_size=8",
                 "train.micro_batch_size=8", "checkpoint.every=10", "evaluate.samples=20", "evaluate.neighbours=2",
                 "evaluate.features=pixels_8x8", "precompute.reference=true"]  # fmt: skip

    def launch(job):
        done = subprocess.run([sys.executable, "-m", "uvit_dist.launch", "--job", job, *arguments], cwd=ROOT, text=True,
                              capture_output=True, timeout=400)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stderr

    told = launch("precompute")
    assert "bottleneck: " in told
    assert "contact_sheet.png: 12 images and what their latents decode to" in told
    launch("train")
    assert '"frechet_distance"' in launch("evaluate")
    index = read_index(str(tmp_path / "data" / "index.json"))
    assert index.provenance.samples == 2 * IMAGES
    scores = [json.loads(path.read_text()) for path in run_dir.rglob("scores-*.json")]
    assert len(scores) == 1
    assert np.isfinite(scores[0]["frechet_distance"])
    assert scores[0]["step"] == 10
    sheet = Image.open(tmp_path / "data" / "contact_sheet.png")
    assert np.asarray(sheet).std() > 10
    assert not [
        line for line in Path(run_dir, "logs", "rank-00000.log").read_text().splitlines() if "Traceback" in line
    ]


def test_a_worker_that_is_asked_to_stop_gives_back_what_it_holds(pictures, tmp_path):
    arguments = ["--config", str(DEMO), *overrides(tmp_path / "data", tmp_path / "run"), *FOLDER,
                 f"data.source={pictures}", "precompute.decode_processes=1", "precompute.lease_s=600"]  # fmt: skip
    arguments.remove("precompute.decode_processes=0")
    process = subprocess.Popen([sys.executable, "-m", "data_tools.precompute_latents", *arguments], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    deadline = time.monotonic() + 400
    while not list((tmp_path / "data").glob(".work/*/unit-*.done-0")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=400)
    assert process.returncode == 75, told
    assert "start the same command again to go on" in told
    assert "Traceback" not in told
    assert not list((tmp_path / "data").glob(".work/*/*.lease-*"))
    assert not list((tmp_path / "data").glob("*.tmp-*"))
