"""What is found wrong before a job is submitted."""

import numpy as np
import pytest

from tests.tiny import DEMO, overrides
from tests.unit.test_preflight import CLASSES, EACH, make_index
from uvit_dist.config_yaml import load_config
from uvit_dist.errors import DataError, MissingInputError, OutputError
from uvit_dist.order_checks import check


@pytest.fixture
def config(tmp_path):
    """The tiny run on shards that do not fit it, with more overrides."""
    index = make_index(tmp_path / "data", np.arange(CLASSES * EACH) % CLASSES)
    (tmp_path / "data" / "reference.npz").write_bytes(b"")
    (tmp_path / "checkpoint").mkdir()
    assert index.path == f"{tmp_path}/data/index.json"
    return lambda *more: load_config(DEMO, overrides(tmp_path / "data", tmp_path / "run", *more))


def test_shards_that_contradict_the_configuration(config):
    with pytest.raises(DataError, match=r"data.index .* does not hold what .*\n.*shape of a sample"):
        check(config(), "train")


@pytest.mark.parametrize(
    ("job", "override", "told"),
    [
        ("train", "data.index=nowhere/index.json", "data.index nowhere/index.json: no such file"),
        ("evaluate", "evaluate.reference=nowhere.npz", "evaluate.reference nowhere.npz: not there"),
        ("evaluate", "autoencoder.decoder=nowhere.pth", "autoencoder.decoder nowhere.pth: not there"),
        ("evaluate", "evaluate.checkpoint=nowhere", "evaluate.checkpoint nowhere: not there"),
        ("precompute", "autoencoder.encoder=nowhere.pth", "autoencoder.encoder nowhere.pth: not there"),
        ("precompute", "data={format: folder, source: nowhere, image_size: 32, lanes: 12}", "data.source nowhere"),
        ("reference", "data={format: folder, source: nowhere, image_size: 32, lanes: 12}", "data.source nowhere"),
    ],
)
def test_missing_inputs(config, job, override, told):
    if override.startswith("data="):
        override = override.replace("lanes: 12", "lanes: 12, index: nowhere/index.json")
    with pytest.raises(MissingInputError, match=told) as refused:
        check(config(override), job)
    assert refused.value.exit_code == 66


@pytest.mark.parametrize("job", ["evaluate", "precompute", "reference"])
def test_what_is_there_passes(config, job, tmp_path):
    assert check(config(f"evaluate.checkpoint={tmp_path}/checkpoint"), job) == []
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_told_and_no_error(config):
    quick = ["storage.endpoint=http://127.0.0.1:9", "storage.retry_s=1", "storage.stall_s=1", "storage.anonymous=true"]
    (told,) = check(config("evaluate.reference=s3://some-bucket/reference.npz", *quick), "evaluate")
    assert told.startswith("evaluate.reference s3://some-bucket/reference.npz was not checked: ")


def test_a_run_dir_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(OutputError, match=f"{tmp_path}/file/run"):
        check(config(f"run_dir={tmp_path}/file/run"), "evaluate")
