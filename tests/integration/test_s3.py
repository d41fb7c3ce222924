"""From a real S3 server, through every fault of a network: the same bytes, the same losses, or an error that helps."""

import hashlib
import json
import os

import numpy as np
import pytest
import torch

from tests.fault_proxy import ALL_KINDS
from tests.integration.jobs import train_job
from tests.integration.s3_fixtures import BUCKET, credentials, proxy, s3_server, upload  # noqa: F401 - fixtures
from tests.ranks import run_ranks
from tests.tiny import losses, records, same_tensors, saved_state, tiny_config, traces
from uvit_dist import storage
from uvit_dist.config_data import StorageConfig
from uvit_dist.data.loader import ShardLoader
from uvit_dist.data.shards import read_index
from uvit_dist.errors import DataError, MissingInputError, UnavailableError
from uvit_dist.preflight import make_plan

pytestmark = [
    pytest.mark.s3,
    pytest.mark.slow,
    # connections that the proxy has broken are left to the garbage collector, in its thread and in s3fs's
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
FAST = {"retry_s": 20.0, "stall_s": 0.7, "region": "us-east-1"}


@pytest.fixture
def through_proxy(proxy, credentials):  # noqa: F811
    """This process reads through the proxy."""
    storage.configure(StorageConfig(endpoint=proxy.endpoint, **FAST))
    return proxy


@pytest.fixture(scope="module")
def big_object(s3_server):  # noqa: F811
    data = np.random.default_rng(0).integers(0, 256, 5 << 20, dtype=np.uint8).tobytes()
    s3_server.client().pipe_file(f"{BUCKET}/big.bin", data)
    return f"s3://{BUCKET}/big.bin", data


@pytest.mark.parametrize("kind", [kind for kind in ALL_KINDS if kind not in ("flip", "404")])
def test_a_read_goes_on_where_a_fault_broke_it_off(kind, through_proxy, big_object):
    url, data = big_object
    through_proxy.kinds, through_proxy.rate = (kind,), 0.5
    before, sent = storage.COUNTS.snapshot(), through_proxy.bytes
    for offset, length in ((0, len(data)), (12345, 3 << 20), (1 << 20, 777), (len(data) - 10, 10)) * 3:
        assert storage.read_range(url, offset, length) == data[offset : offset + length]
    assert through_proxy.counts[kind] > 0
    assert storage.COUNTS.snapshot().retries > before.retries
    if kind == "stall":
        asked, lost = 3 * (len(data) + (3 << 20) + 787), through_proxy.counts[kind] * (5 << 18)
        assert through_proxy.bytes - sent < asked + lost, "but for the piece under way, nothing is asked for again"


def test_writes_listings_and_sizes_survive_faults(through_proxy):
    through_proxy.kinds, through_proxy.rate = ("503", "500", "reset_before"), 0.3
    url = f"s3://{BUCKET}/written"
    for number in range(4):
        storage.write_bytes(f"{url}/{number}.bin", bytes([number]) * 1000)
    assert storage.sizes_in(url) == {f"{number}.bin": 1000 for number in range(4)}
    assert storage.read_bytes(f"{url}/3.bin") == bytes([3]) * 1000
    assert storage.size(f"{url}/2.bin") == 1000
    storage.remove(f"{url}/0.bin")
    storage.remove(f"{url}/0.bin")
    assert not storage.exists(f"{url}/0.bin")


def test_what_cannot_be_mended_is_told_once(through_proxy, big_object, monkeypatch, caplog):
    url, data = big_object
    with pytest.raises(DataError, match=rf"big\.bin: ends at byte {len(data)} where {len(data) + 5} are expected"):
        storage.read_range(url, len(data) - 5, 10)
    with pytest.raises(DataError, match=r"big\.bin: ends at byte"):
        storage.read_range(url, len(data) + 5, 10)
    with pytest.raises(MissingInputError, match=r"none\.bin: no such file"):
        storage.read_range(f"s3://{BUCKET}/none.bin", 0, 10)

    storage.configure(StorageConfig(endpoint=through_proxy.endpoint, **{**FAST, "retry_s": 1.0}))
    through_proxy.down = True
    for call in (lambda: storage.read_range(url, 0, 10), lambda: storage.sizes_in(f"s3://{BUCKET}")):
        with pytest.raises(UnavailableError, match=r"nothing came for 1 seconds of retries .* see to the network") as e:
            call()
        assert e.value.exit_code == 69
    through_proxy.down = False

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    storage.configure(StorageConfig(endpoint=through_proxy.endpoint, **FAST))
    with pytest.raises(MissingInputError, match="refuses access") as refused:
        storage.read_range(url, 0, 10)
    assert "a-wrong-secret" not in str(refused.value) + caplog.text
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    storage.configure(StorageConfig(endpoint=through_proxy.endpoint, **FAST))
    with pytest.raises(MissingInputError, match=r"no AWS credentials; set AWS_ACCESS_KEY_ID .*storage\.profile"):
        storage.read_range(url, 0, 10)


def test_access_lost_within_a_run_is_no_damage(through_proxy, s3_server, data_dir, monkeypatch):  # noqa: F811
    index = read_index(f"{upload(s3_server, data_dir, 'digits-lost')}/index.json")
    loader = ShardLoader(index, make_plan(tiny_config(data_dir, data_dir), index), 0, 1, 0, 2, 0)
    next(loader)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    storage.configure(StorageConfig(endpoint=through_proxy.endpoint, **FAST))
    with pytest.raises(MissingInputError, match="the server refuses access"):
        [next(loader) for _ in range(5)]
    loader.close()


def test_profile_and_endpoint_come_from_the_usual_files(s3_server, big_object, monkeypatch, tmp_path):  # noqa: F811
    (tmp_path / "credentials").write_text(
        f"[cluster]\naws_access_key_id = {s3_server.access_key}\naws_secret_access_key = {s3_server.secret_key}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    storage.configure(StorageConfig(profile="cluster", **FAST))
    url, data = big_object
    assert storage.read_range(url, 5, 10) == data[5:15]
    assert storage.size(url) == len(data)
    storage.configure(StorageConfig())


def test_training_from_s3_through_faults_gives_the_losses_of_local_files_bit_for_bit(
    s3_server, proxy, credentials, data_dir, tmp_path  # noqa: F811
):  # fmt: skip
    more = ["launch.processes_per_node=2", "train.steps=30", "checkpoint.every=15"]
    local = tiny_config(data_dir, tmp_path / "local", *more)
    assert run_ranks(train_job, 2, local) == ["complete"] * 2

    url = upload(s3_server, data_dir, "digits")
    proxy.kinds, proxy.rate = ALL_KINDS, 0.05
    secret = s3_server.secret_key
    settings = [f"data.index={url}/index.json", f"storage.endpoint={proxy.endpoint}", "storage.region=us-east-1",
                "storage.stall_s=0.7", "storage.retry_s=40"]  # fmt: skip
    config = tiny_config(data_dir, tmp_path / "s3", *more, *settings)
    assert run_ranks(train_job, 2, config) == ["complete"] * 2
    assert losses(tmp_path / "s3") == losses(tmp_path / "local")
    assert traces(tmp_path / "s3") == traces(tmp_path / "local")
    assert same_tensors(saved_state(tmp_path / "s3", 30), saved_state(tmp_path / "local", 30))
    metrics = records(tmp_path / "s3", "metrics.jsonl")
    assert sum(record["data_retries"] for record in metrics.values()) + sum(proxy.counts.values()) > 0
    assert sum(record["data_bytes_per_s"] for record in metrics.values()) > 0
    assert sum(record["data_requests"] for record in metrics.values()) > 0
    manifest = json.loads((tmp_path / "s3/checkpoints/step-00000030/manifest.json").read_text())
    assert manifest["journal"] == {"skipped_steps": [], "quarantined_shards": [], "substitutes": []}
    for path in (tmp_path / "s3").rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), f"{path} holds the secret"
    log = (tmp_path / "s3/logs/rank-00000.log").read_text()
    assert "MB/s with 4 requests at once, enough for" in log


def test_every_kind_of_fault_at_a_high_rate_changes_no_byte_of_the_stream(through_proxy, s3_server, data_dir):  # noqa: F811
    url = upload(s3_server, data_dir, "digits-faults")
    config = tiny_config(data_dir, data_dir)

    def digest(index, threads):
        loader = ShardLoader(index, make_plan(config, index), 0, 1, 0, threads, 1)
        out = hashlib.sha256()
        for _ in range(25):
            batch = next(loader)
            assert not batch.damage
            for tensor in (batch.ids, batch.labels, batch.data):
                out.update(tensor.numpy().tobytes())
        loader.close()
        return out.hexdigest()

    expected = digest(read_index(f"{data_dir}/index.json"), 0)
    through_proxy.kinds, through_proxy.rate = ALL_KINDS, 0.15
    for _ in range(8):
        assert digest(read_index(f"{url}/index.json"), 4) == expected
        if len(through_proxy.counts) == len(ALL_KINDS):
            break
    assert len(through_proxy.counts) >= 9, through_proxy.counts


def test_a_shard_that_is_damaged_on_the_server_is_put_in_quarantine_on_all_ranks_and_the_run_goes_on(
    s3_server, credentials, data_dir, tmp_path  # noqa: F811
):  # fmt: skip
    url = upload(s3_server, data_dir, "digits-damaged")
    index = read_index(f"{data_dir}/index.json")
    name = index.shards[1].name
    content = bytearray((data_dir / name).read_bytes())
    content[int(index.rows(1)["offset"][3]) + 5] ^= 1
    s3_server.client().pipe_file(f"{BUCKET}/digits-damaged/{name}", bytes(content))
    settings = [f"data.index={url}/index.json", f"storage.endpoint={s3_server.endpoint}", "storage.region=us-east-1",
                "train.steps=10", "checkpoint.every=5"]  # fmt: skip

    def on(ranks, run, *more):
        return tiny_config(data_dir, tmp_path / run, *settings, f"launch.processes_per_node={ranks}",
                           "train.micro_batch_size=4", *more)  # fmt: skip

    told = run_ranks(train_job, 2, on(2, "budget"))
    assert told[0] == told[1]
    assert told[0].startswith("DataError 65: ")
    assert "1 of 4 shards are damaged, more than data.quarantine_limit 0.01 allows" in told[0]
    assert f"{name}: the sample at byte" in told[0]

    allowed = "data.quarantine_limit=0.3"
    assert run_ranks(train_job, 2, on(2, "two", allowed)) == ["complete"] * 2
    assert run_ranks(train_job, 3, on(3, "three", allowed, "train.steps=5")) == ["complete"] * 3
    assert run_ranks(train_job, 1, on(1, "three", allowed)) == ["complete"]
    assert traces(tmp_path / "three") == traces(tmp_path / "two")
    journals = [
        json.loads((tmp_path / run / "checkpoints/step-00000010/manifest.json").read_text())["journal"]
        for run in ("two", "three")
    ]
    assert journals[0] == journals[1]
    (shard,) = journals[0]["quarantined_shards"]
    assert shard["name"] == name
    start = int(index.starts[1])
    lost = range(start, start + index.counts[1])
    for step, rows in traces(tmp_path / "two").items():
        used = {row[0] for row in rows}
        assert step <= shard["from_step"] or not used & set(lost), "an update is the plan's step before it"


def test_the_cache_serves_all_ranks_and_a_damaged_part_is_fetched_again(
    through_proxy, s3_server, data_dir, tmp_path  # noqa: F811
):  # fmt: skip
    url = upload(s3_server, data_dir, "digits-cached")
    cached = StorageConfig(endpoint=through_proxy.endpoint, cache_dir=str(tmp_path / "cache"), cache_gb=0.01, **FAST)
    storage.configure(cached)
    index = read_index(f"{url}/index.json")
    plan = make_plan(tiny_config(data_dir, data_dir), index)

    def epoch(rank, world_size):
        loader = ShardLoader(index, plan, rank, world_size, 0, 2, 1)
        batches = [next(loader) for _ in range(plan.steps_per_epoch)]
        loader.close()
        return torch.cat([batch.data.flatten() for batch in batches])

    whole = epoch(0, 1)
    counted = through_proxy.requests
    halves = [epoch(rank, 2) for rank in range(2)]
    assert sum(len(half) for half in halves) == len(whole)
    assert through_proxy.requests == counted, "not a request for what is in the cache"
    parts = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != "ledger"]
    for part in parts:
        part.write_bytes(os.urandom(part.stat().st_size))
    assert torch.equal(epoch(0, 1), whole)
