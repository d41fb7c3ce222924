"""Copy a whole set of shards, to or from S3 or between directories, every byte checked.

    python -m data_tools.copy_shards shards/index.json s3://bucket/shards --endpoint http://server:9000
    python -m data_tools.copy_shards s3://bucket/shards/index.json /scratch/shards --threads 8

A copy that was interrupted goes on when the same command is given again. Hashes are checked while files are read, and a
damaged one is named and not copied (exit code 65). The copy is read once more at the end, unless --no-verify is given,
and the index is written last: a set that can be seen is whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

from data_tools.shard_set import in_threads, progress_of, require_space, same_place, tool_parser, use_storage
from data_tools.units import claim_directory
from data_tools.verify_shards import Damage, verify
from uvit_dist import storage
from uvit_dist.data.shards import EMPTY_CONTEXT, ShardIndex, read_index
from uvit_dist.errors import ConfigError, DataError, MissingInputError, OutputError, explained_exit


def _tables_match(index: ShardIndex, shard: int) -> bool:
    """Whether the tables of a shard are there and as recorded; checked as they are read. Raises nothing of it."""
    try:
        index.rows(shard)
        if index.provenance.text is not None:
            index.context_rows(shard)
    except (DataError, MissingInputError):
        return False
    return True


def _copy_tar(source: ShardIndex, target: ShardIndex, shard: int, advance: Callable[[int], None]) -> None:
    record, digest = source.shards[shard], hashlib.sha256()
    with storage.atomic_write(target.shard_path(shard)) as file:
        for piece in storage.stream(source.shard_path(shard), record.size):
            file.write(piece)
            digest.update(piece)
            advance(len(piece))
        if digest.hexdigest() != record.sha256:
            raise DataError("its sha256 differs from what the index records")


def _copy_shard(
    source: ShardIndex,
    target: ShardIndex,
    shard: int,
    found: dict[str, int],
    present: dict[str, int],
    advance: Callable[[int], None],
) -> Damage | None:
    """Copy a shard, its tables and last its record. Returns what is wrong with the source, or none.

    found, present: name → bytes of the files at the source and at the destination.
    """
    record = source.shards[shard]
    if found.get(record.name) != record.size:
        was = f"{found[record.name]} bytes, the index says {record.size}" if record.name in found else "missing"
        return Damage(shard, source.shard_path(shard), was)
    if not _tables_match(source, shard):
        return Damage(shard, source.shard_path(shard), f"of {', '.join(record.tables)}, one is missing or damaged")
    if present.get(record.name) == record.size and _tables_match(target, shard):  # tables come after their tar
        advance(record.size)
    else:
        try:
            _copy_tar(source, target, shard, advance)
        except (DataError, MissingInputError) as error:
            return Damage(shard, source.shard_path(shard), str(error))
    sidecar = record.name.removesuffix(".tar") + ".json"
    for name in [*record.tables, *([sidecar] if sidecar in found else [])]:
        data = storage.read_bytes(storage.join(storage.parent(source.path), name))
        storage.write_bytes(storage.join(storage.parent(target.path), name), data)
    return None


def _copy_files(
    source: ShardIndex, target: ShardIndex, threads: int, shards: Sequence[int], present: dict[str, int]
) -> list[Damage]:
    """Copy these shards, and what lies beside all of them. Returns what of the source is damaged, and not copied."""
    damages = []
    found = storage.sizes_in(storage.parent(source.path))
    if source.provenance.text is not None:
        path = storage.join(storage.parent(source.path), EMPTY_CONTEXT)
        try:
            source.empty_context()
            storage.write_bytes(storage.join(storage.parent(target.path), EMPTY_CONTEXT), storage.read_bytes(path))
        except (DataError, MissingInputError):
            damages.append(Damage(None, path, "missing or damaged"))
    with progress_of(sum(source.shards[shard].size for shard in shards), "copy") as advance:

        def work(shard: int) -> Damage | None:
            return _copy_shard(source, target, shard, found, present, advance)

        damages += [damage for damage in in_threads(work, shards, threads) if damage is not None]
    return damages


def copy(source: ShardIndex, directory: str, threads: int = 4, check: bool = True) -> ShardIndex:
    """Copy a set to a directory or URL; its index appears there last. check: read the copy at the end.

    Raises ``ConfigError`` or ``OutputError`` where the destination will not do, ``DataError`` that names each damaged
    file of the source.
    """
    if same_place(storage.parent(source.path), directory):
        raise ConfigError(f"{directory}: is where {source.path} lies; give another directory")
    path = storage.join(directory, source.path.rsplit("/", 1)[-1])
    claim_directory(path)
    content = storage.read_bytes(source.path)
    if storage.exists(path) and storage.read_bytes(path) != content:
        raise OutputError(f"{path}: is the index of another set; give another directory, or delete that set")
    target = dataclasses.replace(source, path=path)
    present = storage.sizes_in(directory)
    require_space(directory, sum(r.size for r in source.shards if present.get(r.name) != r.size), "DST")
    _refuse(source, _copy_files(source, target, threads, range(len(source.shards)), present))
    if check:
        wrong = verify(target, threads)
        if wrong:
            again = [damage.shard for damage in wrong if damage.shard is not None]
            _refuse(source, _copy_files(source, target, threads, again, {}))
            wrong = verify(target, threads, again)
        if wrong:
            raise DataError(
                f"{len(wrong)} file(s) arrived damaged, twice:\n  " + "\n  ".join(map(str, wrong)) + "\nSee to the "
                "disk, the server or the network there, and give the same command again."
            )
    storage.write_bytes(path, content)
    return target


def _refuse(source: ShardIndex, damages: Sequence[Damage]) -> None:
    if damages:
        raise DataError(
            f"{len(damages)} file(s) of {source.path} are damaged and were not copied:\n  "
            + "\n  ".join(map(str, damages))
            + "\nMend the source (python -m data_tools.verify_shards has --repair) and give the same command again; "
            "what is copied is kept."
        )


def main() -> None:
    """The command line."""
    parser = tool_parser("copy_shards", __doc__)
    parser.add_argument("source", metavar="SRC", help="path or URL of the index of the set")
    parser.add_argument("destination", metavar="DST", help="directory or URL to copy it to")
    parser.add_argument("--no-verify", action="store_true", help="do not read the copy at the end")
    args = parser.parse_args()
    with explained_exit():
        use_storage(args)
        target = copy(read_index(args.source, "SRC"), args.destination, args.threads, not args.no_verify)
        size = sum(record.size for record in target.shards)
        made = target.provenance
        print(f"{target.path}: {made.samples} samples in {len(target.shards)} shards, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
