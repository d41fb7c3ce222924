"""All ten published systems, end to end at tiny size: shards, training, sampling, scores; and what a kill leaves."""

import json
import math
import tarfile

import pytest

from tests.integration.jobs import train_job
from tests.ranks import run_ranks
from tests.systems import INCEPTION, LATENTS, PIXELS, TEXT, make_everything, make_shards, tiny_system, whole_system
from tests.tiny import losses, records, same_tensors, saved_state, traces

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    directory = tmp_path_factory.mktemp("systems")
    make_everything(directory)
    return directory


@pytest.mark.parametrize("name", [*PIXELS, *LATENTS, *TEXT])
def test_a_system_runs_from_images_to_scores(name, root, tmp_path):
    (scores,) = run_ranks(whole_system, 1, name, root, tmp_path, timeout=400)
    assert scores["samples"] == 10
    assert scores["step"] == 4
    distance = scores["fid" if name == INCEPTION else "frechet_distance"]
    assert math.isfinite(distance)
    assert distance > 0
    if name == INCEPTION:
        official = scores["scores of the official file"]
        assert official["fid"] == distance, "the official files hold a mean and a covariance, and that is enough"
        assert "recall" not in official
    assert scores["same_seed_same_picture"]
    assert not scores["other_seed_same_picture"]
    config = tiny_system(name, root, tmp_path)
    size = config.data.image_size
    rows = 2 if config.model.num_classes > 0 or name in TEXT else 1
    columns = 1 if rows == 2 else 2
    assert scores["picture"] == (rows * (size + 2) + 2, columns * (size + 2) + 2, 3)

    if name in TEXT:
        texts = []
        for path in sorted((tmp_path / "evaluation").rglob("*.tar")):
            with tarfile.open(path) as tar:
                texts += [tar.extractfile(member).read().decode() for member in tar if member.name.endswith(".txt")]
        assert len(texts) == 10
        told = json.loads((root / "coco" / "annotations" / "captions_val2014.json").read_text())
        assert set(texts) <= {each["caption"] for each in told["annotations"]}, "of the held-out images"

    assert list(losses(tmp_path)) == [1, 2, 3, 4]
    assert all(0.5 < loss < 3 for loss in losses(tmp_path).values()), "the loss of an untrained network is about 1"
    times = [row[1] for rows in traces(tmp_path).values() for row in rows]
    if config.diffusion.schedule == "vpsde":
        assert all(0 <= t < 1 for t in times)
    else:
        assert all(n == int(n) and 1 <= n <= 1000 for n in times)


@pytest.mark.parametrize("name", ["uvit_s_cifar10", "uvit_h_imagenet512", "uvit_s_mscoco"])
def test_a_system_killed_and_resumed_goes_on_bit_for_bit(name, root, tmp_path):
    make_shards(name, root, tmp_path / "shards_run")
    index = f"data.index={tmp_path}/shards_run/shards/index.json"
    held_out = f"validation.index={tmp_path}/shards_run/held_out/index.json"
    more = [index, held_out, "launch.processes_per_node=2", "train.steps=10", "checkpoint.every=5",
            "train.micro_batch_size=2"]  # fmt: skip
    whole = tiny_system(name, root, tmp_path / "whole", *more)
    assert run_ranks(train_job, 2, whole) == ["complete"] * 2
    broken = tiny_system(name, root, tmp_path / "broken", *more)
    with pytest.raises(AssertionError, match="-9"):
        run_ranks(train_job, 2, broken, "kill one rank after step 7")
    assert run_ranks(train_job, 2, broken) == ["complete"] * 2

    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert traces(tmp_path / "broken") == traces(tmp_path / "whole")
    assert same_tensors(saved_state(tmp_path / "broken", 10), saved_state(tmp_path / "whole", 10))
    metrics = [records(tmp_path / run, "metrics.jsonl") for run in ("whole", "broken")]
    told = [{step: r["validation_loss"] for step, r in m.items() if "validation_loss" in r} for m in metrics]
    assert list(told[0]) == [2, 4, 6, 8, 10]
    assert told[0] == told[1]
    if name == "uvit_s_mscoco":
        drawn = {row[0]: set() for rows in traces(tmp_path / "whole").values() for row in rows}
        for rows in traces(tmp_path / "whole").values():
            for row in rows:
                drawn[row[0]].add(row[2])
        assert max(len(contexts) for contexts in drawn.values()) > 1, "another caption in another epoch"
