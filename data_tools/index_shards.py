"""Index a webdataset that was made elsewhere, so that it can be trained on where it lies.

    python -m data_tools.index_shards --config configs/uvit_h_imagenet256.yaml --shards /data/latents
    python -m data_tools.index_shards --config CFG.yaml --shards s3://b/set data.index=s3://b/set/index.json

The directory holds *.tar. A sample is the members that share a key: one .npy of moments (mean and log-variance,
stacked: 2C x H x W), or one .npz stored by np.savez with one array, or one called moments; and a .cls with the label.
Other members are ignored. data.index must lie beside the tars, which are not changed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_tools.pack_latents import encoder_fingerprint
from data_tools.shard_job import command_line
from data_tools.shard_set import FOREIGN, RawSample, TarSamples, add_threads, in_threads, progress_of, same_place
from data_tools.units import claim_directory
from uvit_dist import storage
from uvit_dist.config import Config
from uvit_dist.data.latents import Provenance, encode_array
from uvit_dist.data.shards import ROW, ShardRecord, write_index
from uvit_dist.errors import ConfigError, DataError, MissingInputError, OutputError

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a zip member: 30 bytes, the last of them the lengths of its name and of its extra field, which follow."""


def _in_npz(data: bytes) -> tuple[int, bytes]:
    """Where the array of moments lies in an .npz, as .npy, and its bytes, checked against the zip's own sum."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            chosen = infos if len(infos) == 1 else [info for info in infos if info.filename == "moments.npy"]
            if len(chosen) != 1:
                names = ", ".join(info.filename.removesuffix(".npy") for info in infos) or "none"
                raise DataError(f"arrays {names}; store one alone, or call one of them moments")
            if chosen[0].compress_type != zipfile.ZIP_STORED:
                raise DataError("compressed; store it with np.savez, not np.savez_compressed: arrays are read in place")
            content = archive.read(chosen[0])
            begin = chosen[0].header_offset
            return begin + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack_from(data, begin)), content
    except (zipfile.BadZipFile, struct.error, RuntimeError, EOFError) as error:
        raise DataError(f"not a whole .npz ({error}); make it again") from None


def locate_array(data: bytes, npz: bool) -> tuple[int, NDArray[Any]]:
    """Where the numbers of an array begin in the bytes of an .npy or .npz, and the array, of any shape.

    Raises ``DataError``, without the member's name, where it cannot be read in place.
    """
    begin, content = _in_npz(data) if npz else (0, data)
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        shape, fortran, dtype = _HEADERS[version](file)
    except (ValueError, KeyError) as error:
        raise DataError(f"not an array as np.save writes it ({error}); make it again") from None
    if dtype.hasobject:
        raise DataError("holds Python objects; store an array of float16 or float32")
    if fortran and len(shape) > 1:
        raise DataError("in Fortran order; store np.ascontiguousarray of it")
    size = int(np.prod(shape)) * dtype.itemsize
    if len(content) - file.tell() != size:
        raise DataError(f"{len(content) - file.tell()} bytes of numbers where {size} are expected; make it again")
    return begin + file.tell(), np.frombuffer(content, dtype, offset=file.tell()).reshape(shape)


def _moments(raw: RawSample, shape: tuple[int, ...], dtype: str) -> tuple[int, NDArray[Any]]:
    """Offset in the tar, and the moments. Raises ``DataError`` without the sample's name."""
    arrays = [extension for extension in raw.members if extension.rpartition(".")[2] in ("npy", "npz")]
    if len(arrays) != 1:
        have = ", ".join(raw.members)
        raise DataError(
            f"members {have}; a sample has one .npy or .npz of moments: half a sample, or a key used twice: "
            "make this tar again"
        )
    offset, data = raw.members[arrays[0]]
    try:
        begin, array = locate_array(data, arrays[0].endswith("npz"))
        if array.shape != shape:
            raise DataError(
                f"shape {array.shape}, and model.in_chans and model.img_size need (2·in_chans, img_size, img_size) = "
                f"{shape}; correct them, or store mean and log-variance stacked"
            )
        if array.dtype != np.dtype(dtype).newbyteorder("<"):
            known = array.dtype.name in ("float16", "float32") and array.dtype.byteorder != ">"
            remedy = f"set data.moments_dtype {array.dtype.name}" if known else "store little-endian float16 or float32"
            raise DataError(f"type {array.dtype.str}, and data.moments_dtype is {dtype}; {remedy}")
        if not np.isfinite(array).all():
            raise DataError("holds numbers that are not finite; mend or remove this sample")
    except DataError as error:
        raise DataError(f".{arrays[0]}: {error}") from None
    return offset + begin, array


def _label(raw: RawSample, classes: int) -> int:
    """The label, -1 where the network has no classes. Raises ``DataError`` without the sample's name."""
    if not classes:
        return -1
    if "cls" not in raw.members:
        raise DataError(f"members {', '.join(raw.members)}, no .cls; store the label in decimal as .cls")
    text = raw.members["cls"][1]
    try:
        label = int(text)
    except ValueError:
        raise DataError(f".cls: {text[:20]!r} is no whole number; store the label in decimal") from None
    if not 0 <= label < classes:
        raise DataError(
            f".cls: label {label}, and model.num_classes and diffusion.null_label leave {classes} classes, "
            f"0…{classes - 1}; correct them, or the label"
        )
    return label


def index_tar(
    path: str, size: int, shape: tuple[int, ...], dtype: str, classes: int, advance: Callable[[int], None]
) -> tuple[NDArray[Any], str]:
    """ROW of each sample of a tar of moments of such a shape, (samples,), and the tar's sha256.

    Raises ``DataError`` with the tar, the key, the value, the rule and the remedy.
    """
    rows, tar = [], TarSamples(path, size, advance)
    for raw in tar:
        try:
            offset, array = _moments(raw, shape, dtype)
            rows.append((offset, xxhash.xxh3_64_intdigest(array.tobytes()), _label(raw, classes), 0))
        except DataError as error:
            raise DataError(f"{path}: {raw.key}: {error}") from None
    if not rows:
        raise DataError(f"{path}: holds no samples; remove it")
    return np.array(rows, dtype=ROW), tar.sha256


def _name(shards: str) -> str:
    return Path(shards).name if storage.is_remote(shards) else Path(shards).resolve().name


def _check_place(config: Config, shards: str) -> None:
    """Raises ``ConfigError`` or ``OutputError`` where these shards cannot have this index."""
    path, model = config.data.index, config.model
    if config.data.space == "pixels" or config.autoencoder is None or model.clip_dim is not None:
        raise ConfigError(
            f"data.space {config.data.space}, model.clip_dim {model.clip_dim}: sets of moments and labels alone can be "
            "indexed; make others with data_tools.pack_images or data_tools.precompute_text"
        )
    if not same_place(storage.parent(path), shards):
        beside = storage.join(shards, "index.json")
        raise ConfigError(f"data.index {path}: must lie beside the tars of --shards {shards}; add data.index={beside}")
    claim_directory(path)
    if storage.exists(path):
        made = json.loads(storage.read_bytes(path)).get("provenance", {})
        if not str(made.get("source")).startswith(f"{FOREIGN} "):
            raise OutputError(
                f"data.index {path}: is the index of {made.get('source')}, made here; nothing is to be done"
            )


def index_shards(config: Config, shards: str, threads: int = 4) -> list[ShardRecord]:
    """Write the tables of all tars in a directory or URL, and the index beside them. Raises ``UserError``."""
    _check_place(config, shards)
    assert config.autoencoder is not None
    data, model = config.data, config.model
    sizes = {name: size for name, size in sorted(storage.sizes_in(shards).items()) if name.endswith(".tar")}
    if not sizes:
        raise MissingInputError(f"--shards {shards}: holds no *.tar; give the directory of a webdataset")
    made_by = encoder_fingerprint(config)
    shape = (2 * model.in_chans, model.img_size, model.img_size)
    classes = max(0, model.num_classes - (config.diffusion.null_label is not None))
    records, counts = [], np.zeros(classes, dtype=np.int64)
    with progress_of(sum(sizes.values()), "index") as advance:

        def work(name: str) -> tuple[NDArray[Any], str]:
            return index_tar(storage.join(shards, name), sizes[name], shape, data.moments_dtype, classes, advance)

        for name, (rows, sha256) in zip(sizes, in_threads(work, sizes, threads), strict=True):
            table = storage.join(shards, f"{name.removesuffix('.tar')}.rows.npy")
            storage.write_bytes(table, encode_array(rows)[0])
            counts += np.bincount(rows["label"], minlength=classes) if classes else 0
            hashed = hashlib.sha256(rows.tobytes()).hexdigest()
            records.append(ShardRecord(name, sizes[name], len(rows), sha256, hashed))
    contents = hashlib.sha256("".join(record.sha256 for record in records).encode()).hexdigest()[:16]
    provenance = Provenance(
        kind="moments",
        dtype=data.moments_dtype,
        shape=shape,
        source=f"{FOREIGN} {_name(shards)} {contents}",
        image_size=data.image_size,
        crop=data.crop,
        split=data.split,
        mirror=data.mirror,
        classes=classes,
        samples=sum(record.samples for record in records),
        class_counts=tuple(map(int, counts)),
        autoencoder=Path(config.autoencoder.encoder).name,
        encoder_fingerprint=made_by,
        scale_factor=config.autoencoder.scale_factor,
    )
    write_index(data.index, records, provenance)
    return records


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", required=True, metavar="DIR_OR_URL", help="where the tars are")
    add_threads(parser)


def main() -> None:
    """The command line."""
    command_line(
        "index_shards", __doc__, lambda config, args: index_shards(config, args.shards, args.threads), _add_arguments
    )


if __name__ == "__main__":
    main()
