"""Evaluation: the same bits however the work is cut, and after a kill only what is missing."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.integration.jobs import evaluate_job, train_job
from tests.ranks import run_ranks
from tests.tiny import tiny_config
from uvit_dist.work import WorkDirectory

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
TIMES = {"seconds", "grid"}


@pytest.fixture(scope="module")
def run_dir(data_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    config = tiny_config(data_dir, directory, "launch.processes_per_node=1", "train.steps=5")
    assert run_ranks(train_job, 1, config) == ["complete"]
    return directory


def clear(run_dir):
    for path in (run_dir / "evaluation").rglob("*.npz"):
        path.unlink()


def units(run_dir):
    (directory,) = (run_dir / "evaluation").glob("*-ema-*")
    return {path.name: path.read_bytes() for path in sorted((directory / "units").iterdir())}


def test_any_number_of_ranks_and_a_kill_give_the_same_bits(data_dir, run_dir):
    config = tiny_config(data_dir, run_dir)
    (alone,) = run_ranks(evaluate_job, 1, config)
    assert alone["samples"] == 60
    expected = units(run_dir)
    assert list(expected) == [f"unit-{u:06d}.npz" for u in range(4)]

    clear(run_dir)
    two = run_ranks(evaluate_job, 2, config)
    assert two[0] == two[1]
    assert units(run_dir) == expected

    clear(run_dir)
    with pytest.raises(AssertionError, match="-9"):
        run_ranks(evaluate_job, 1, config, 1)
    assert list(units(run_dir)) == ["unit-000000.npz", "unit-000001.npz"]
    kept = {path: path.stat().st_mtime_ns for path in (run_dir / "evaluation").rglob("*.npz")}
    resumed = run_ranks(evaluate_job, 3, config)[0]
    assert units(run_dir) == expected
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items()), "done work is not done again"
    for scores in (*two, resumed):
        assert {k: v for k, v in scores.items() if k not in TIMES} == {k: v for k, v in alone.items() if k not in TIMES}


def test_the_last_sub_batch_is_padded_and_the_padding_not_scored(data_dir, run_dir):
    """60 images in sub-batches of 8: an image has the same bits in a job of 64."""
    config = tiny_config(data_dir, run_dir)
    (sixty,) = run_ranks(evaluate_job, 1, config)
    more = tiny_config(data_dir, run_dir, "evaluate.samples=64")
    (sixty_four,) = run_ranks(evaluate_job, 1, more)
    assert (sixty["samples"], sixty_four["samples"]) == (60, 64)
    last = [list(WorkDirectory(str(d / "units"), 4).results())[3] for d in (run_dir / "evaluation").glob("step-*")]
    short, full = sorted(last, key=lambda result: len(result["labels"]))
    assert (len(short["labels"]), len(full["labels"])) == (12, 16)
    assert np.array_equal(short["features"], full["features"][:12])
    assert np.array_equal(short["labels"], full["labels"][:12])


def test_scores_and_picture_are_written(data_dir, run_dir):
    (scores,) = run_ranks(evaluate_job, 1, tiny_config(data_dir, run_dir))
    assert {"frechet_distance", "frechet_distance_real_halves", "class_accuracy", "recall", "step"} <= set(scores)
    assert scores["step"] == 5
    (directory,) = {path.parent for path in (run_dir / "evaluation").rglob("scores.json")} & {
        path.parent for path in (run_dir / "evaluation").rglob("grid.png") if str(path) == scores["grid"]
    }
    assert json.loads((directory / "scores.json").read_text()) == scores
    with Image.open(scores["grid"]) as picture:
        assert picture.size == (10 * 34 + 2, 2 * 34 + 2)


def test_other_weights_and_other_protocols_are_kept_apart(data_dir, run_dir):
    (ema,) = run_ranks(evaluate_job, 1, tiny_config(data_dir, run_dir))
    (untrained,) = run_ranks(evaluate_job, 1, tiny_config(data_dir, run_dir, "evaluate.weights=untrained"))
    (guided,) = run_ranks(evaluate_job, 1, tiny_config(data_dir, run_dir, "sample.cfg_scale=3"))
    assert len({scores["frechet_distance"] for scores in (ema, untrained, guided)}) == 3
    assert len({scores["grid"] for scores in (ema, untrained, guided)}) == 3


def test_what_is_missing_is_named(data_dir, run_dir, tmp_path):
    (told,) = run_ranks(evaluate_job, 1, tiny_config(data_dir, tmp_path))
    assert told.startswith(f"MissingInputError 66: {tmp_path}: holds no checkpoint")
    (told,) = run_ranks(evaluate_job, 1, tiny_config(data_dir, run_dir, "evaluate.reference=nowhere.npz"))
    assert told.startswith("MissingInputError 66: evaluate.reference nowhere.npz: no such file; make it")
    (told,) = run_ranks(evaluate_job, 1, tiny_config(data_dir, run_dir, "model.depth=4"))
    assert told.startswith("DataError 65")
    assert "model.depth: trained with 2, the configuration says 4" in told
    for change in ("model.num_heads=4", "autoencoder.scale_factor=2"):  # would load without a word
        (told,) = run_ranks(evaluate_job, 1, tiny_config(data_dir, run_dir, change))
        assert told.startswith("DataError 65"), change
