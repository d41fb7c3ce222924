"""Pre-flight: sorted shards are recognised before any training, by a figure; missing ones are counted."""

import dataclasses
import logging

import numpy as np
import pytest

from tests.unit.test_shards import moments_of, provenance
from uvit_dist.data.latents import Sample
from uvit_dist.data.plan import Plan
from uvit_dist.data.shards import check_shards_present, read_index, write_index, write_shard
from uvit_dist.errors import DataError
from uvit_dist.preflight import check_shuffle, shuffle_figure

CLASSES, EACH = 10, 60


def make_index(directory, labels):
    made = provenance(samples=len(labels), classes=CLASSES, class_counts=(EACH,) * CLASSES)
    records = []
    for first in range(0, len(labels), 50):
        samples = [Sample(f"{i:06d}", int(labels[i]), moments_of(0)) for i in range(first, first + 50)]
        records.append(write_shard(str(directory), f"shard-{first // 50:02d}", samples, made))
    write_index(f"{directory}/index.json", records, made)
    return read_index(f"{directory}/index.json")


def test_permuted_shards_pass_and_class_sorted_ones_are_refused_with_the_figure_and_the_command(tmp_path):
    labels = np.repeat(np.arange(CLASSES), EACH)
    mixed = make_index(tmp_path / "mixed", np.random.default_rng(0).permutation(labels))
    ordered = make_index(tmp_path / "sorted", labels)
    plan = Plan(mixed.counts, seed=1, global_batch_size=40, lanes=4, block_size=25)
    check_shuffle(mixed, plan)
    figure = shuffle_figure(mixed, plan)
    random = np.random.default_rng(1)
    drawn = [len(set(random.choice(labels, 40, replace=False).tolist())) for _ in range(4000)]
    assert figure.expected == pytest.approx(np.mean(drawn), abs=0.02)
    assert figure.sigma == pytest.approx(np.std(drawn), abs=0.02)
    assert abs(figure.measured - figure.expected) < 3 * figure.sigma
    with pytest.raises(DataError, match=r"batch of 40 holds [3-7]\.\d different labels, by chance 9\.\d") as caught:
        check_shuffle(ordered, plan)
    assert f"python -m data_tools.reshuffle {tmp_path}/sorted/index.json" in str(caught.value)
    assert "data.check_shuffle false" in str(caught.value)


def test_within_the_limit_missing_shards_are_warned_of_and_extra_ones_told(tmp_path, caplog):
    index = make_index(tmp_path, np.arange(CLASSES * EACH) % CLASSES)
    (tmp_path / "shard-03.tar").unlink()
    (tmp_path / "stray.tar").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "uvit_dist"):
        check_shards_present(index, limit=1 / len(index.shards))
    assert "shard-03.tar: missing" in caplog.text
    assert "1 shard(s) that the index does not name, as stray.tar, are not used" in caplog.text
    (tmp_path / "shard-04.rows.npy").unlink()
    with pytest.raises(DataError, match=r"2 file\(s\) of 12 shards (.*\n)*.*shard-03\.tar: missing\n.*04\.rows\.npy"):
        check_shards_present(index, limit=1 / len(index.shards))
    unlabelled = dataclasses.replace(index, provenance=provenance(classes=0, class_counts=()))
    check_shuffle(unlabelled, Plan(index.counts, 1, 40, 4, 25))
