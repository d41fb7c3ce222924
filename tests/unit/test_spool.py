"""Features on disk: in order, right moments, memory that does not grow with their number."""

import tracemalloc

import numpy as np
import pytest

from uvit_dist.errors import DataError
from uvit_dist.spool import spooled
from uvit_dist.work import WorkDirectory

DIM, CHUNK = 64, 250


def stored(directory, chunks, last=CHUNK):
    work = WorkDirectory(str(directory), [f"chunk-{number}" for number in range(chunks)])
    directory.mkdir()
    for number, unit in enumerate(work.units):
        draw, size = np.random.default_rng(number), last if number == chunks - 1 else CHUNK
        features = draw.standard_normal((size, DIM)).astype(np.float32)
        work.put(unit, {"features": features, "labels": np.full(size, number)})
    return work


def test_features_come_in_order_and_their_moments_do_not_depend_on_the_chunks(tmp_path):
    work = stored(tmp_path / "work", 6, last=30)
    whole = np.concatenate([found["features"] for found in work.results()])
    halves = WorkDirectory(str(tmp_path / "halves"), ["first", "second"])
    (tmp_path / "halves").mkdir()
    halves.put("first", {"features": whole[:1100]})
    halves.put("second", {"features": whole[1100:]})
    with spooled(work, ["features", "labels"], 1280) as spool:
        assert (spool.count, spool.kinds) == (1280, ("features", "labels"))
        assert np.array_equal(spool.features("features"), whole)
        assert np.array_equal(spool.features("features", 300), whole[:300])
        assert spool.features("labels", 251)[-2:].tolist() == [0, 1]
        assert isinstance(spool.features("features"), np.memmap)
        moments = spool.moments("features")
        with pytest.raises(ValueError, match="read-only"):
            spool.features("features")[0] = 0
    assert np.allclose(moments.mean, whole.mean(0, dtype=np.float64), rtol=1e-12)
    assert np.allclose(moments.covariance, np.cov(whole.astype(np.float64).T), rtol=1e-9)
    with spooled(halves, ["features"], 1280) as spool:
        otherwise = spool.moments("features")
    assert np.array_equal(moments.mean, otherwise.mean), "however the images are cut"
    assert np.array_equal(moments.covariance, otherwise.covariance)
    assert {path.suffix for path in (tmp_path / "work").iterdir()} == {".npz"}, "no file is left behind"


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    def peak(work, chunks):
        tracemalloc.start()
        with spooled(work, ["features"], chunks * CHUNK) as spool:
            spool.moments("features")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = (stored(tmp_path / str(chunks), chunks) for chunks in (4, 80))
    peak(few, 4)
    assert peak(many, 80) < 1.2 * peak(few, 4)


@pytest.mark.parametrize("count", [700, 800])
def test_another_number_of_images_is_refused(tmp_path, count):
    work = stored(tmp_path / "work", 3)
    with pytest.raises(DataError, match=f"{count} are needed"), spooled(work, ["features"], count):
        pass
