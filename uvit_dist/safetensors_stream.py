"""Safetensors files written piece by piece: in memory there is a piece, never the file.

The format: 8 bytes of the header's length, the header in JSON (padded with spaces to 8 bytes), the tensors' bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import IO

import torch
import xxhash
from torch import Tensor

from uvit_dist import faults, storage

PIECE = 16 << 20
"""Bytes that are hashed and written at once."""

NAMES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64", torch.float32: "F32",
    torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16",
    torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""The format's names of the dtypes, in the order that safetensors' own ``save`` gives them: alignment is kept."""

_RANK = {dtype: rank for rank, dtype in enumerate(NAMES)}
_NO_HASH = "0" * 32
Layout = tuple[torch.dtype, Sequence[int]]
"""(dtype, shape) of a tensor."""


def write(
    path: str,
    tensors: Mapping[str, Layout],
    source: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
    hashes: str | None = None,
) -> dict[str, str]:
    """Write a file, whole or not at all, to a path or URL. Byte for byte what ``safetensors.torch.save`` gives.

    tensors: (dtype, shape) by key; source: the pieces of a key's tensor, in order, each of any shape; hashes: a key of
    the metadata where {key: xxh3 (128 bits) of its bytes} is put, as JSON. Returns these hashes.
    Raises ``OutputError``, ``UnavailableError``, and ``ValueError`` where pieces do not make up their tensor.
    """
    order = sorted(tensors, key=lambda key: (_RANK[tensors[key][0]], key))
    layouts = [(key, *tensors[key]) for key in order]

    def header(found: Mapping[str, str]) -> bytes:
        told = {} if hashes is None else {hashes: json.dumps(dict(found))}
        return _header(layouts, {**(metadata or {}), **told})

    with storage.atomic_write(path) as file:
        file.write(header(dict.fromkeys(order, _NO_HASH)))
        found = {key: _write_tensor(file, key, *tensors[key], source(key)) for key in order}
        file.seek(0)
        file.write(header(found))  # as long as before: all hashes are
    return found


def write_flat(path: Path, parts: Sequence[tuple[str, int]], flat: Tensor) -> tuple[int, str]:
    """Write one flat fp32 tensor (n,) of the host as flat tensors of the given keys and lengths, in order, durably.

    Nothing is copied. Returns the file's size and xxh3 (128 bits). Raises ``OSError``, and ``ValueError`` where the
    lengths do not make up a contiguous (n,).
    """
    if flat.dtype != torch.float32 or not flat.is_contiguous() or flat.shape != (sum(numel for _, numel in parts),):
        raise ValueError(
            f"{path}: {flat.dtype} {tuple(flat.shape)} given, {sum(numel for _, numel in parts)} contiguous fp32 "
            "elements are to be written; give the tensor that the lengths are of"
        )
    header: bytes | memoryview = _header([(key, flat.dtype, (numel,)) for key, numel in parts], {})
    hasher, size = xxhash.xxh3_128(), 0
    with open(path, "wb") as file:
        for block in chain([header], _blocks(flat)):
            hasher.update(block)
            size += file.write(block)
            faults.point("save:block")
        file.flush()
        faults.point("save:flushed")
        os.fsync(file.fileno())
    return size, hasher.hexdigest()


def _header(layouts: Sequence[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, dtype, shape in layouts:
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of the host, of any shape, without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _blocks(tensor: Tensor) -> Iterator[memoryview]:
    view = bytes_of(tensor)
    return (view[first : first + PIECE] for first in range(0, len(view), PIECE))


def _write_tensor(file: IO[bytes], key: str, dtype: torch.dtype, shape: Sequence[int], pieces: Iterable[Tensor]) -> str:
    hasher, numel = xxhash.xxh3_128(), 0
    for piece in pieces:
        if piece.dtype != dtype:
            raise ValueError(f"{key}: a piece is {piece.dtype}, the header says {dtype}; convert it first")
        numel += piece.numel()
        for block in _blocks(piece.cpu()):
            hasher.update(block)
            file.write(block)
    if numel != torch.Size(shape).numel():
        raise ValueError(f"{key}: its pieces have {numel} elements, its shape is {tuple(shape)}; give all, once")
    return hasher.hexdigest()
