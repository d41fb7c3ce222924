"""The real S3 server of the tests, with the digits' shards in it, and a proxy before it that breaks answers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import s3_rig
from tests.fault_proxy import FaultProxy
from tests.s3_rig import S3Server
from uvit_dist import storage
from uvit_dist.config_data import StorageConfig

BUCKET = "shards"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    missing = s3_rig.missing_programs()
    if missing:
        told = f"{', '.join(missing)}: not installed; {s3_rig.INSTALL}"
        pytest.fail(told) if os.environ.get("CI") else pytest.skip(told)
    with S3Server() as server:
        server.client().mkdir(BUCKET)
        yield server


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.port, rate=0.0, stall_s=30) as running:
        yield running


@pytest.fixture
def credentials(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The usual variables, for this process and the ranks it starts."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    yield
    storage.configure(StorageConfig())


def upload(server: S3Server, directory: Path, prefix: str) -> str:
    """Put the files of a directory below a prefix. Returns its URL."""
    client = server.client()
    for path in directory.iterdir():
        if path.is_file():
            client.put_file(str(path), f"{BUCKET}/{prefix}/{path.name}")
    return f"s3://{BUCKET}/{prefix}"
