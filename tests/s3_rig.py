"""A Ceph RADOS Gateway on loopback: one monitor, one OSD in memory and one gateway, in a temporary directory."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import s3fs
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

INSTALL = "apt-get install --no-install-recommends ceph-mon ceph-osd radosgw ceph-common"
PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "monmaptool", "setpriv")
ACCESS_KEY, SECRET_KEY = "test-access", "test-secret"
START_S = 60

CONF = """\
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon_port}/0
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {directory}/keyring
run dir = {directory}
crash dir = {directory}
admin socket = {directory}/$name.asok
log file = {directory}/$name.log
mon cluster log file = {directory}/cluster.log
mon data = {directory}/mon
osd data = {directory}/osd
rgw data = {directory}/rgw
paxos propose interval = 0.05
mon allow pool size one = true
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = memstore
osd memory target = 939524096
memstore device bytes = 4294967296

[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw thread pool size = 32
rgw gc obj min wait = 5
rgw gc processor period = 5
"""
CAPS = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *"},
    "osd.0": {"mon": "allow profile osd", "osd": "allow *"},
    "client.rgw": {"mon": "allow rw", "osd": "allow rwx"},
}


def missing_programs() -> list[str]:
    """The programs of the rig that are not there; INSTALL brings them."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


def signed_get(path: str, port: int) -> bytes:
    """An HTTP request for a whole object. path: quoted, with the bucket."""
    request = AWSRequest("GET", f"http://127.0.0.1:{port}{path}", {"Host": f"127.0.0.1:{port}"})
    S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", "us-east-1").add_auth(request)
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in request.headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


def _keyring() -> str:
    def key() -> str:
        return base64.b64encode(struct.pack("<hiih", 1, 0, 0, 16) + os.urandom(16)).decode()

    return "".join(
        f"[{name}]\nkey = {key()}\n" + "".join(f'caps {kind} = "{cap}"\n' for kind, cap in caps.items())
        for name, caps in CAPS.items()
    )


class S3Server:
    """An S3 server with path-style addresses. Buckets live until it stops."""

    access_key, secret_key = ACCESS_KEY, SECRET_KEY

    def __init__(self) -> None:
        self.port, self._mon_port = _free_ports(2)
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._directory = Path()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._deadline = 0.0

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def client(self, endpoint: str | None = None) -> s3fs.S3FileSystem:
        """s3fs on this server. endpoint: of a proxy before it."""
        return s3fs.S3FileSystem(
            key=self.access_key,
            secret=self.secret_key,
            endpoint_url=endpoint or self.endpoint,
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def start(self) -> None:
        """Return when an object has been written. Raises ``RuntimeError`` with the ends of the logs."""
        self._deadline = time.monotonic() + START_S
        self._directory = Path(tempfile.mkdtemp(prefix="s3-"))
        try:
            self._start_cluster()
            self._wait("the gateway", self._listens)
            client = self.client()
            client.mkdir("first-bucket")
            client.pipe_file("first-bucket/object", b"1")
            client.rm("first-bucket", recursive=True)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill the daemons and remove what they have stored."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
        self._processes.clear()
        if self._directory != Path():
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = Path()

    def _start_cluster(self) -> None:
        directory, fsid, osd = self._directory, str(uuid.uuid4()), str(uuid.uuid4())
        text = CONF.format(fsid=fsid, mon_port=self._mon_port, port=self.port, directory=directory)
        (directory / "ceph.conf").write_text(text)
        (directory / "keyring").write_text(_keyring())
        for name in ("mon", "osd", "rgw"):
            (directory / name).mkdir()
        monitor = f"[v2:127.0.0.1:{self._mon_port}]"
        self._call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", monitor, str(directory / "monmap"))
        keyring, monmap = str(directory / "keyring"), str(directory / "monmap")
        self._call("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self._spawn("ceph-mon", "-f", "-i", "a")
        self._call("ceph", "osd", "new", osd)
        self._call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._spawn("ceph-osd", "-f", "-i", "0")
        self._call("radosgw-admin", "user", "create", "--uid", "test", "--display-name", "test",
                   "--access-key", self.access_key, "--secret", self.secret_key)  # fmt: skip
        self._spawn("radosgw", "-f", "-n", "client.rgw")

    def _popen(self, *command: str) -> subprocess.Popen[bytes]:
        """A program that is killed when the thread that starts it ends."""
        environment = {"PATH": os.environ["PATH"], "CEPH_CONF": str(self._directory / "ceph.conf")}
        with open(self._directory / f"{command[0]}.out", "ab") as out:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip

    def _spawn(self, *command: str) -> None:
        self._processes[command[0]] = self._popen(*command)

    def _call(self, *command: str) -> None:
        process = self._popen(*command)
        try:
            self._wait(" ".join(command[:3]), lambda: process.poll() is not None)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            raise self._failure(f"{' '.join(command)}: exit code {process.returncode}")

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def _wait(self, what: str, done: Callable[[], bool]) -> None:
        while not done():
            for name, process in self._processes.items():
                if process.poll() is not None:
                    raise self._failure(f"{name} ended with exit code {process.returncode}")
            if time.monotonic() > self._deadline:
                raise self._failure(f"{what} is not ready after {START_S} s")
            time.sleep(0.02)

    def _failure(self, message: str) -> RuntimeError:
        files = sorted([*self._directory.glob("*.out"), *self._directory.glob("*.log")])
        tails = [f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files]
        return RuntimeError("\n".join([f"S3 server: {message}", *tails]))
