"""Writing shards and their index, reading an index, verifying a shard.

Beside ``index.json`` lie, for each shard, the tar itself, ``NAME.rows.npy`` (for each sample the byte offset of its
moments in the tar, its label and the xxh3 of the moments) and ``NAME.json`` (size, count, hashes), written last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from uvit_dist import storage
from uvit_dist.data.latents import Provenance, encode_moments
from uvit_dist.errors import DataError, MissingInputError

ROW = np.dtype([("offset", "<u8"), ("label", "<i4"), ("xxh3", "<u8")])


@dataclass(frozen=True)
class ShardRecord:
    """What the index says of a shard. size: bytes; samples: count; sha256 of the tar and of its rows."""

    name: str
    size: int
    samples: int
    sha256: str
    rows_sha256: str


class _Hashing(io.RawIOBase):
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def tell(self) -> int:
        return self.size

    def write(self, data: Any) -> int:
        self.file.write(data)
        self.sha256.update(data)
        self.size += len(data)
        return len(data)


def write_shard(
    directory: str, name: str, samples: Iterable[tuple[str, int, NDArray[Any]]], provenance: Provenance
) -> ShardRecord:
    """Write one shard atomically. samples: (key, label, moments (2C, H, W)). Its record is the last file written.

    The bytes depend on the samples alone. Raises ``OutputError``.
    """
    rows, keys = [], []
    with storage.atomic_write(storage.join(directory, f"{name}.tar")) as file:
        stream = _Hashing(file)
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for key, label, moments in samples:
                data, header = encode_moments(moments)
                keys.append(key)
                _add_member(tar, f"{key}.cls", str(label).encode())
                _add_member(tar, f"{key}.npy", data)
                padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                rows.append((tar.offset - padded + header, label, xxhash.xxh3_64_intdigest(data[header:])))
    table = np.array(rows, dtype=ROW).tobytes()
    storage.write_bytes(storage.join(directory, f"{name}.rows.npy"), _npy(np.frombuffer(table, dtype=ROW)))
    record = ShardRecord(
        f"{name}.tar", stream.size, len(rows), stream.sha256.hexdigest(), hashlib.sha256(table).hexdigest()
    )
    sidecar = {**dataclasses.asdict(record), "keys": hash_keys(keys), "provenance": dataclasses.asdict(provenance)}
    storage.write_bytes(storage.join(directory, f"{name}.json"), json.dumps(sidecar, indent=1).encode())
    return record


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # its defaults hold no time and no user: the bytes depend on the content alone
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _npy(array: NDArray[Any]) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, version=(1, 0), allow_pickle=False)
    return out.getvalue()


def hash_keys(keys: list[str]) -> str:
    """sha256 of the keys of a shard's samples, in order."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def finished_shard(directory: str, name: str, keys: list[str], provenance: Provenance) -> ShardRecord | None:
    """The record of a shard of the same samples and provenance that an earlier run finished, or none."""
    path = storage.join(directory, f"{name}.json")
    if not storage.exists(path):
        return None
    sidecar = json.loads(storage.read_bytes(path))
    same = json.loads(json.dumps(dataclasses.asdict(provenance))) == sidecar.pop("provenance")
    same = sidecar.pop("keys") == hash_keys(keys) and same
    record = ShardRecord(**sidecar)
    tar = storage.join(directory, record.name)
    return record if same and storage.exists(tar) and storage.size(tar) == record.size else None


def write_index(path: str, records: list[ShardRecord], provenance: Provenance) -> None:
    """Write the index of finished shards, atomically, beside them."""
    assert sum(record.samples for record in records) == provenance.samples
    index = {"provenance": dataclasses.asdict(provenance), "shards": [dataclasses.asdict(r) for r in records]}
    storage.write_bytes(path, json.dumps(index, indent=1).encode())


@dataclass(frozen=True)
class ShardIndex:
    """An index as read: where it is, what the shards hold, and the shards in order."""

    path: str
    provenance: Provenance
    shards: tuple[ShardRecord, ...]
    sha256: str

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return tuple(record.samples for record in self.shards)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Id of the first sample of each shard."""
        return np.concatenate([[0], np.cumsum(self.counts)])[:-1].astype(np.int64)

    def shard_path(self, shard: int) -> str:
        """Path or URL of a shard's tar."""
        return storage.join(storage.parent(self.path), self.shards[shard].name)

    def rows(self, shard: int) -> NDArray[Any]:
        """Offsets, labels and hashes of a shard's samples, checked. Raises ``DataError``."""
        record = self.shards[shard]
        path = self.shard_path(shard).removesuffix(".tar") + ".rows.npy"
        try:
            rows = np.lib.format.read_array(io.BytesIO(storage.read_bytes(path)), allow_pickle=False)
        except ValueError as error:
            if isinstance(error, MissingInputError):
                raise
            raise DataError(f"{path}: not a table of samples ({error}); make this shard again") from None
        if rows.dtype != ROW or hashlib.sha256(rows.tobytes()).hexdigest() != record.rows_sha256:
            raise DataError(f"{path}: differs from what {self.path} records; make or copy this shard again")
        return rows


def read_index(path: str) -> ShardIndex:
    """Read an index. Raises ``MissingInputError`` with how to make one, ``DataError`` where it is damaged."""
    if not storage.exists(path):
        raise MissingInputError(
            f"data.index {path}: no such file; make the shards first: "
            "python -m data_tools.precompute_latents --config YOUR_CONFIG.yaml"
        )
    data = storage.read_bytes(path)
    try:
        tree = json.loads(data)
        records = tuple(ShardRecord(**record) for record in tree["shards"])
        provenance = tree["provenance"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"data.index {path}: damaged ({error}); make the shards again") from None
    index = ShardIndex(path, Provenance.from_dict(provenance, path), records, hashlib.sha256(data).hexdigest())
    if sum(index.counts) != index.provenance.samples:
        raise DataError(
            f"data.index {path}: its shards hold {sum(index.counts)} samples, its provenance says "
            f"{index.provenance.samples}; make the shards again"
        )
    return index


def check_shards_present(index: ShardIndex) -> None:
    """Every shard is there with the size the index records, by one listing. Raises ``DataError`` naming each."""
    directory = storage.parent(index.path)
    found = storage.sizes_in(directory)
    wrong = [
        f"{storage.join(directory, r.name)}: "
        + (f"{found[r.name]} bytes, the index says {r.size}: truncated or replaced" if r.name in found else "missing")
        for r in index.shards
        if found.get(r.name) != r.size
    ]
    rows = [r.name.removesuffix(".tar") + ".rows.npy" for r in index.shards]
    wrong += [f"{storage.join(directory, name)}: missing" for name in rows if name not in found]
    if wrong:
        shown = "\n  ".join(wrong[:20])
        raise DataError(
            f"{len(wrong)} file(s) of {len(index.shards)} shards are not as {index.path} says:\n  {shown}\n"
            "Delete these and make them again with data_tools.precompute_latents, or copy them again."
        )
