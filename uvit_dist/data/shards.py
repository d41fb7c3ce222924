"""Writing shards and their index, reading an index, verifying a shard.

Beside ``index.json`` lie, for each shard, the tar itself, ``NAME.rows.npy`` (for each sample the byte offset of its
data in the tar, their xxh3, its label and number of captions), with captions ``NAME.contexts.npy`` (for each caption
the offset of its context and its xxh3) and ``NAME.json`` (size, count, hashes), written last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import IO, Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from uvit_dist import storage
from uvit_dist.data.latents import Provenance, Sample, encode_array
from uvit_dist.errors import DataError, MissingInputError

log = logging.getLogger(__name__)
ROW = np.dtype([("offset", "<u8"), ("xxh3", "<u8"), ("label", "<i4"), ("captions", "<u4")])
CONTEXT_ROW = np.dtype([("offset", "<u8"), ("xxh3", "<u8")])
EMPTY_CONTEXT = "empty_context.npy"
"""Beside the index of samples with captions: the context of the empty prompt, (length, width)."""


@dataclass(frozen=True)
class ShardRecord:
    """What the index says of a shard. size: bytes; samples: count; sha256 of the tar and of its tables."""

    name: str
    size: int
    samples: int
    sha256: str
    rows_sha256: str
    contexts_sha256: str | None = None

    @property
    def tables(self) -> dict[str, str]:
        """Name → sha256 of the rows of the tables beside the tar."""
        stem = self.name.removesuffix(".tar")
        rows = {f"{stem}.rows.npy": self.rows_sha256}
        return rows if self.contexts_sha256 is None else {**rows, f"{stem}.contexts.npy": self.contexts_sha256}


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
    directory: str,
    name: str,
    samples: Iterable[Sample],
    provenance: Provenance,
    sidecar: Callable[[], dict[str, Any]] = dict,
) -> ShardRecord:
    """Write one shard atomically; samples in order, each of the shape and type in the provenance. Its record is the
    last file written. sidecar: asked after the last sample, what else that file says, as in ``Sidecar``.

    The bytes depend on the samples alone. Raises ``OutputError``.
    """
    rows: list[tuple[int, int, int, int]] = []
    contexts: list[tuple[int, int]] = []
    keys = []
    with storage.atomic_write(storage.join(directory, f"{name}.tar")) as file:
        stream = _Hashing(file)
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for sample in samples:
                keys.append(sample.key)
                _add_member(tar, f"{sample.key}.cls", str(sample.label).encode())
                if sample.contexts is not None:
                    assert len(sample.contexts) == len(sample.captions) > 0
                    texts = json.dumps({"captions": list(sample.captions)}, ensure_ascii=False)
                    _add_member(tar, f"{sample.key}.json", texts.encode())
                    start = _add_array(tar, f"{sample.key}.contexts.npy", sample.contexts)
                    for number, context in enumerate(sample.contexts):
                        contexts.append((start + number * context.nbytes, _xxh3(context)))
                offset = _add_array(tar, f"{sample.key}.npy", sample.data)
                rows.append((offset, _xxh3(sample.data), sample.label, len(sample.captions)))
    tables = {"rows": np.array(rows, dtype=ROW)}
    if provenance.text is not None:
        tables["contexts"] = np.array(contexts, dtype=CONTEXT_ROW)
    for table, array in tables.items():
        storage.write_bytes(storage.join(directory, f"{name}.{table}.npy"), encode_array(array)[0])
    hashes = {f"{table}_sha256": hashlib.sha256(array.tobytes()).hexdigest() for table, array in tables.items()}
    record = ShardRecord(f"{name}.tar", stream.size, len(rows), stream.sha256.hexdigest(), **hashes)
    told = {"keys": hash_keys(keys), "provenance": dataclasses.asdict(provenance)}
    told = {**dataclasses.asdict(record), **told, **sidecar()}
    storage.write_bytes(storage.join(directory, f"{name}.json"), json.dumps(told, indent=1).encode())
    return record


def write_image_shard(
    path: str, ids: Sequence[int], images: NDArray[np.uint8], labels: NDArray[np.int64], captions: Sequence[str] = ()
) -> None:
    """Generated images as a webdataset shard, atomically: ID.png, ID.cls and, with captions, ID.txt of each.

    ids: of each image; images: (N, 3, H, W) uint8; labels: (N,), -1 for none. The bytes depend on these alone. Raises
    ``OutputError``.
    """
    with storage.atomic_write(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for place, (number, image, label) in enumerate(zip(ids, images, labels, strict=True)):
            picture = io.BytesIO()
            Image.fromarray(image.transpose(1, 2, 0)).save(picture, "PNG")
            _add_member(tar, f"{number:08d}.cls", str(label).encode())
            _add_member(tar, f"{number:08d}.png", picture.getvalue())
            if captions:
                _add_member(tar, f"{number:08d}.txt", captions[place].encode())


def _xxh3(array: NDArray[Any]) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(array).tobytes())


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # its defaults hold no time and no user: the bytes depend on the content alone
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _add_array(tar: tarfile.TarFile, name: str, array: NDArray[Any]) -> int:
    """Add an array as .npy. Returns the offset of its data in the tar."""
    data, header = encode_array(array)
    _add_member(tar, name, data)
    return tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + header


def hash_keys(keys: list[str]) -> str:
    """sha256 of the keys of a shard's samples, in order."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


@dataclass(frozen=True)
class Sidecar:
    """What lies beside a finished shard. keys: hash of those of the samples asked for; bad: key → why it was left out.

    made_with: settings that its bytes depend on, beside the provenance.
    """

    record: ShardRecord
    keys: str
    provenance: dict[str, Any]
    made_with: dict[str, Any] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def read(directory: str, name: str) -> Sidecar | None:
        """Of the shard NAME.tar; none where it is not there or not of this kind."""
        try:
            told = json.loads(storage.read_bytes(storage.join(directory, f"{name}.json")))
            others = {key: told.pop(key) for key in ("keys", "provenance", "made_with", "bad") if key in told}
            return Sidecar(ShardRecord(**told), **others)
        except (MissingInputError, ValueError, TypeError, AttributeError):
            return None


def finished_shard(
    directory: str,
    name: str,
    keys: list[str],
    provenance: Provenance,
    made_with: dict[str, Any] | None = None,
    present: Mapping[str, int] | None = None,
) -> Sidecar | None:
    """The sidecar of a shard of the same samples, provenance and settings that was finished before, or none.

    present: name → bytes of the files in the directory, as listed.
    """
    present = storage.sizes_in(directory) if present is None else present
    if f"{name}.json" not in present:
        return None
    sidecar = Sidecar.read(directory, name)
    if sidecar is None or sidecar.keys != hash_keys(keys) or sidecar.made_with != (made_with or {}):
        return None
    same = json.loads(json.dumps(dataclasses.asdict(provenance))) == sidecar.provenance
    whole = present.get(f"{name}.tar") == sidecar.record.size and all(t in present for t in sidecar.record.tables)
    return sidecar if same and whole else None


def write_index(
    path: str, records: list[ShardRecord], provenance: Provenance, made_with: dict[str, Any] | None = None
) -> None:
    """Write the index of finished shards, atomically, beside them. made_with: settings that their bytes depend on."""
    assert sum(record.samples for record in records) == provenance.samples
    index: dict[str, Any] = {"provenance": dataclasses.asdict(provenance)}
    index |= {"made_with": made_with} if made_with else {}
    index["shards"] = [dataclasses.asdict(record) for record in records]
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

    def shard_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shard of each of the given samples. ids: (b,). Returns (b,) int64."""
        return np.searchsorted(self.starts, ids, side="right").astype(np.int64) - 1

    def shard_path(self, shard: int) -> str:
        """Path or URL of a shard's tar."""
        return self._paths[shard]

    @cached_property
    def _paths(self) -> list[str]:
        folder = storage.parent(self.path)
        return [storage.join(folder, record.name) for record in self.shards]

    def rows(self, shard: int) -> NDArray[Any]:
        """ROW of each of a shard's samples, (samples,), checked. Raises ``DataError``."""
        return self._table(shard, "rows", ROW)

    def context_rows(self, shard: int) -> NDArray[Any]:
        """CONTEXT_ROW of each caption of a shard, (captions,), sample by sample, checked. Raises ``DataError``."""
        return self._table(shard, "contexts", CONTEXT_ROW)

    def _table(self, shard: int, table: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        name = f"{self.shards[shard].name.removesuffix('.tar')}.{table}.npy"
        path = storage.join(storage.parent(self.path), name)
        expected = str(self.shards[shard].tables.get(name))
        kept_as = f"{expected[:40]}-table"
        try:
            return self._read_table(path, kept_as, dtype, expected)
        except DataError:
            if not storage.is_remote(path):
                raise
        storage.COUNTS.add(retries=1)  # a byte may have changed on the way
        return self._read_table(path, kept_as, dtype, expected)

    def _read_table(self, path: str, kept_as: str, dtype: np.dtype[Any], expected: str) -> NDArray[Any]:
        content = storage.read_bytes(path, kept_as)
        try:
            rows = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
        except ValueError as error:
            storage.forget(kept_as)
            raise DataError(f"{path}: not a table of samples ({error}); make this shard again") from None
        if rows.dtype != dtype or hashlib.sha256(rows.tobytes()).hexdigest() != expected:
            storage.forget(kept_as)
            raise DataError(f"{path}: differs from what {self.path} records; make or copy this shard again")
        return rows

    def empty_context(self) -> NDArray[Any]:
        """The context of the empty prompt, (length, width), checked. Raises ``DataError``."""
        assert self.provenance.text is not None
        path = storage.join(storage.parent(self.path), EMPTY_CONTEXT)
        data = storage.read_bytes(path)
        if storage.is_remote(path) and hashlib.sha256(data).hexdigest() != self.provenance.text.empty_sha256:
            data = storage.read_bytes(path)  # a byte may have changed on the way
        if hashlib.sha256(data).hexdigest() != self.provenance.text.empty_sha256:
            raise DataError(f"{path}: differs from what {self.path} records; make or copy it again")
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


MAKE_SHARDS = (
    "make the shards first: python -m data_tools.precompute_latents --config YOUR_CONFIG.yaml (data_tools."
    "precompute_text for images with captions, data_tools.pack_images for pixels)"
)


def read_index(path: str, key: str = "data.index", remedy: str = MAKE_SHARDS) -> ShardIndex:
    """Read an index. key: of the configuration, that names it; remedy: what to do where it is missing.

    Raises ``MissingInputError`` with how to make one, ``DataError`` where it is damaged.
    """
    if not storage.exists(path):
        raise MissingInputError(f"{key} {path}: no such file; {remedy}")
    data = storage.read_bytes(path)
    while storage.is_remote(path) and (again := storage.read_bytes(path)) != data:
        data = again  # nothing else would notice a byte that changed on the way
    try:
        tree = json.loads(data)
        records = tuple(ShardRecord(**record) for record in tree["shards"])
        provenance = tree["provenance"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{key} {path}: damaged ({error}); make the shards again") from None
    index = ShardIndex(path, Provenance.from_dict(provenance, path), records, hashlib.sha256(data).hexdigest())
    if sum(index.counts) != index.provenance.samples:
        raise DataError(
            f"{key} {path}: its shards hold {sum(index.counts)} samples, its provenance says "
            f"{index.provenance.samples}; make the shards again"
        )
    return index


def check_shards_present(index: ShardIndex, limit: float = 0.0) -> None:
    """Every shard is there with the size the index records, by one listing. limit: share of them that may be not.

    Raises ``DataError`` naming each; within the limit, and for shards that the index does not name, warns.
    """
    directory = storage.parent(index.path)
    found = storage.sizes_in(directory)
    wrong: dict[str, list[str]] = {}
    for record in index.shards:
        there = found.get(record.name)
        if there != record.size:
            told = f"{there} bytes, the index says {record.size}: truncated or replaced"
            told = f"{storage.join(directory, record.name)}: {'missing' if there is None else told}"
            wrong.setdefault(record.name, []).append(told)
        for name in record.tables:
            if name not in found:
                wrong.setdefault(record.name, []).append(f"{storage.join(directory, name)}: missing")
    extra = sorted({name for name in found if name.endswith(".tar")} - {record.name for record in index.shards})
    if extra:
        log.warning(
            "%s: %d shard(s) that the index does not name, as %s, are not used", directory, len(extra), extra[0]
        )
    lines = [line for lines in wrong.values() for line in lines]
    shown = "\n  ".join(lines[:20])
    if len(wrong) > limit * len(index.shards):
        raise DataError(
            f"{len(lines)} file(s) of {len(index.shards)} shards are not as {index.path} says:\n  {shown}\n"
            "Delete these and make them again with the command that made the others, or copy them again."
        )
    if wrong:
        log.warning("within data.quarantine_limit, substitutes will stand in for what is damaged here:\n  %s", shown)
