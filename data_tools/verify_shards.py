"""Read a whole set of shards and say what is damaged: sizes, hashes of tars and tables, hashes of all samples.

    python -m data_tools.verify_shards shards/index.json
    python -m data_tools.verify_shards s3://bucket/shards/index.json --threads 8 --endpoint http://server:9000
    python -m data_tools.verify_shards shards/index.json --repair

One line is printed for each damaged shard. The exit code is 0 for a whole set and 65 for a damaged one. --repair
deletes the records of damaged shards: the command that made the set then makes just these again.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from tqdm import tqdm

from data_tools.shard_set import FOREIGN, in_threads, progress_of, tool_parser, use_storage
from uvit_dist import storage
from uvit_dist.data.latents import Provenance
from uvit_dist.data.shards import EMPTY_CONTEXT, ShardIndex, read_index
from uvit_dist.errors import DataError, MissingInputError, explained_exit


@dataclass(frozen=True)
class Damage:
    """What is wrong with a shard (its number in the index), or with a file beside all shards (none)."""

    shard: int | None
    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


class _Hashes:
    """The xxh3 of many ranges of a file, checked while it streams by.

    offsets, sizes, expected, owners: (ranges,), of each the sample that it belongs to.
    """

    def __init__(
        self, offsets: NDArray[Any], sizes: NDArray[Any], expected: NDArray[Any], owners: NDArray[Any]
    ) -> None:
        order = np.argsort(offsets, kind="stable")
        columns = (offsets, offsets + sizes, expected, owners)
        self._ranges = list(zip(*(column[order].tolist() for column in columns), strict=True))
        self._next, self._begin, self._rest = 0, 0, bytearray()
        self._bad: set[int] = set()

    def feed(self, piece: bytes) -> None:
        self._rest += piece
        with memoryview(self._rest) as view:
            while self._next < len(self._ranges):
                begin, end, expected, owner = self._ranges[self._next]
                if end > self._begin + len(view):
                    break
                if xxhash.xxh3_64_intdigest(view[begin - self._begin : end - self._begin]) != expected:
                    self._bad.add(owner)
                self._next += 1
            needed = self._ranges[self._next][0] if self._next < len(self._ranges) else self._begin + len(view)
            done = min(max(0, needed - self._begin), len(view))
        del self._rest[:done]
        self._begin += done

    def damaged(self) -> list[int]:
        """The samples that are not whole, once all has been fed; those that did not come are among them."""
        return sorted(self._bad | {owner for *_, owner in self._ranges[self._next :]})


def _hashes(index: ShardIndex, shard: int) -> _Hashes:
    made, rows = index.provenance, index.rows(shard)
    offsets, expected, owners = [rows["offset"]], [rows["xxh3"]], [np.arange(len(rows))]
    sizes = [np.full(len(rows), int(np.prod(made.shape)) * np.dtype(made.dtype).itemsize)]
    if made.text is not None:
        contexts = index.context_rows(shard)
        offsets.append(contexts["offset"])
        expected.append(contexts["xxh3"])
        owners.append(np.repeat(owners[0], rows["captions"]))
        each = int(np.prod(made.text.shape)) * np.dtype(made.text.dtype).itemsize
        sizes.append(np.full(len(contexts), each))
    joined = [np.concatenate(column) for column in (offsets, sizes, expected, owners)]
    return _Hashes(joined[0].astype(np.int64), joined[1], joined[2], joined[3])


def _check_tar(
    index: ShardIndex, shard: int, found: int, hashes: _Hashes | None, advance: Callable[[int], None]
) -> list[str]:
    record, path = index.shards[shard], index.shard_path(shard)
    problems, digest = [], hashlib.sha256()
    if found != record.size:
        how = "truncated" if found < record.size else "something was added, or another file put there"
        problems.append(f"{found} bytes, the index says {record.size}: {how}")
    try:
        for piece in storage.stream(path, min(found, record.size)):
            digest.update(piece)
            if hashes is not None:
                hashes.feed(piece)
            advance(len(piece))
    except (DataError, MissingInputError, OSError) as error:
        return [*problems, f"cannot be read ({error})"]
    if digest.hexdigest() != record.sha256:
        others = [other.name for other in index.shards if other.sha256 == digest.hexdigest()]
        if others:
            problems.append(f"holds what {others[0]} should hold: swapped")
        elif found == record.size:
            problems.append("its sha256 differs")
    damaged = hashes.damaged() if hashes is not None else []
    if damaged:
        first = damaged[0]
        problems.append(
            f"{len(damaged)} of {record.samples} samples damaged, the first is number {first} of this shard "
            f"(id {int(index.starts[shard]) + first})"
        )
    elif problems and hashes is not None:
        problems.append("all samples are whole: what differs lies around them (names, labels, captions)")
    return problems


def check_shard(index: ShardIndex, shard: int, found: dict[str, int], advance: Callable[[int], None]) -> Damage | None:
    """Read a shard and its tables. found: name → bytes of the files there. Returns what is wrong, or none."""
    record = index.shards[shard]
    problems = [] if record.name in found else ["missing"]
    missing = [name for name in record.tables if name not in found]
    problems += [f"its table {name} is missing" for name in missing]
    hashes = None
    if not missing:
        try:
            hashes = _hashes(index, shard)
        except (DataError, MissingInputError) as error:
            problems.append(f"its table is damaged ({error})")
    if record.name in found:
        problems += _check_tar(index, shard, found[record.name], hashes, advance)
    return Damage(shard, index.shard_path(shard), "; ".join(problems)) if problems else None


def verify(
    index: ShardIndex,
    threads: int = 4,
    shards: Sequence[int] | None = None,
    report: Callable[[Damage], None] = lambda damage: None,
) -> list[Damage]:
    """Everything that is damaged in a set. shards: just these; report: called with each as it is found."""
    found = storage.sizes_in(storage.parent(index.path))
    chosen = range(len(index.shards)) if shards is None else shards
    damages = []
    if index.provenance.text is not None:
        try:
            index.empty_context()
        except (DataError, MissingInputError):
            path = storage.join(storage.parent(index.path), EMPTY_CONTEXT)
            damages.append(Damage(None, path, "missing" if EMPTY_CONTEXT not in found else "its sha256 differs"))
            report(damages[0])
    with progress_of(sum(index.shards[shard].size for shard in chosen), "verify") as advance:
        for damage in in_threads(lambda shard: check_shard(index, shard, found, advance), chosen, threads):
            if damage is not None:
                damages.append(damage)
                report(damage)
    return damages


def extra_tars(index: ShardIndex) -> list[str]:
    """Names of the tars beside an index that it does not name."""
    named = {record.name for record in index.shards}
    found = storage.sizes_in(storage.parent(index.path))
    return sorted(name for name in found if name.endswith(".tar") and name not in named)


def how_to_make(made: Provenance, index: str) -> str:
    """What to do to have the damaged shards of a set made again."""
    if made.source.startswith(f"{FOREIGN} "):
        return (
            "these tars were made elsewhere: copy the damaged ones again from where they came, then type: python -m "
            "data_tools.index_shards --config YOUR_CONFIG.yaml --shards " + storage.parent(index)
        )
    tool = "pack_images" if made.kind == "pixels" else "precompute_latents" if made.text is None else "precompute_text"
    options = ""
    if made.source.startswith("official features "):
        tool, options = "pack_latents", " --features DIR"
    return f"type: python -m data_tools.{tool} --config YOUR_CONFIG.yaml{options} data.index={index}"


def repair(index: ShardIndex, damages: Sequence[Damage]) -> list[str]:
    """Delete the records of damaged shards, so that they are made again. Returns the names of the tars."""
    names = [index.shards[damage.shard].name for damage in damages if damage.shard is not None]
    for name in names:
        storage.remove(storage.join(storage.parent(index.path), name.removesuffix(".tar") + ".json"))
    return names


def main() -> None:
    """The command line."""
    parser = tool_parser("verify_shards", __doc__)
    parser.add_argument("index", help="path or URL of the index")
    parser.add_argument("--repair", action="store_true", help="have damaged shards made again: delete their records")
    args = parser.parse_args()
    with explained_exit():
        use_storage(args)
        index = read_index(args.index, "INDEX")
        damages = verify(index, args.threads, report=lambda damage: tqdm.write(str(damage)))
        for name in extra_tars(index):
            print(f"warning: {name} is not in {args.index}: nothing reads it; delete it", file=sys.stderr)
        made, count = index.provenance, len(index.shards)
        if not damages:
            size = sum(record.size for record in index.shards)
            print(f"{args.index}: whole: {made.samples} samples in {count} shards, {size / 1e6:.1f} MB")
            return
        shards = sum(damage.shard is not None for damage in damages)
        summary = f"{args.index}: {shards} of {count} shards damaged"
        summary += f", and {EMPTY_CONTEXT}" if shards < len(damages) else ""
        if not args.repair:
            raise DataError(f"{summary}; copy them again, or have them made again: add --repair")
        names = repair(index, damages)
        print(f"to be made again: {', '.join(names) or EMPTY_CONTEXT}")
        raise DataError(f"{summary}; to have just these made again, {how_to_make(made, args.index)}")


if __name__ == "__main__":
    main()
