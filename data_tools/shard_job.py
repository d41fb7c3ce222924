"""What all jobs that write shards share: the cut into shards, keeping what is finished, the index, the command line.

Samples go into shards in a seeded permutation, so that no shard is of one class; mirrored images have shards of their
own, so that none meets its original there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from data_tools.images import Item
from uvit_dist import storage
from uvit_dist.config import Config
from uvit_dist.config_yaml import load_config
from uvit_dist.data.latents import MIRROR_SUFFIX, Provenance, Sample
from uvit_dist.data.shards import ShardIndex, ShardRecord, finished_shard, write_index, write_shard
from uvit_dist.errors import ConfigError, DataError, OutputError, explained_exit
from uvit_dist.preflight import contradictions

STEMS = {"moments": "latents", "pixels": "images"}
"""Names of shards by what they hold."""

MakeSamples = Callable[[list[Item]], Iterable[Sample]]


def plan_shards(images: int, mirror: bool, per_shard: int, seed: int) -> list[list[Item]]:
    """What goes into each shard: originals in a seeded permutation, then mirror images in another."""
    shards = []
    for mirrored in (False, True) if mirror else (False,):
        order = np.argsort(np.random.Philox(key=[seed, mirrored]).random_raw(images), kind="stable")
        items = [(int(number), mirrored) for number in order]
        shards += [items[first : first + per_shard] for first in range(0, images, per_shard)]
    return shards


def sample_key(keys: Sequence[str], item: Item) -> str:
    """The key of a sample in its shard. keys: of the images."""
    number, mirrored = item
    return keys[number] + MIRROR_SUFFIX * mirrored


def claim_directory(index: str) -> None:
    """Make the directory of an index. Raises ``OutputError`` where another index has its shards there."""
    directory = storage.parent(index)
    storage.make_directory(directory)
    ours = index.rsplit("/", 1)[-1]
    stems = tuple(f"{stem}-" for stem in STEMS.values())
    others = [name for name in storage.sizes_in(directory) if name.endswith(".json") and not name.startswith(stems)]
    others = [name for name in others if name != ours and b'"provenance"' in storage.read_bytes(f"{directory}/{name}")]
    if others:
        raise OutputError(
            f"data.index {index}: {', '.join(others)} in the same directory has its shards there, under the same "
            "names; give each index a directory of its own"
        )


def _check_same_source(index: str, provenance: Provenance) -> None:
    """Shards of one collection of images are not replaced by those of another. Raises ``OutputError``."""
    if not storage.exists(index):
        return
    before = json.loads(storage.read_bytes(index)).get("provenance") or {}
    was, this = (
        f"{str(made.get('source')).rsplit(' ', 1)[0]} ({made.get('split')})"  # without the hash of its contents
        for made in (before, dataclasses.asdict(provenance))
    )
    if was != this:
        raise OutputError(
            f"data.index {index}: holds the shards of {was}, and these would be of {this}; give another data.index, in "
            "a directory of its own, or delete those"
        )


def make_shards(
    config: Config, keys: Sequence[str], provenance: Provenance, make_samples: MakeSamples
) -> list[ShardRecord]:
    """Write all shards that an earlier run did not finish, then the index, with the samples of each class counted.

    keys: of the images; make_samples: the samples of a shard, in order. Raises ``ConfigError``, before anything is
    made, where the network could not be trained on it; ``OutputError``, and what make_samples raises.
    """
    assert provenance.samples == len(keys) * (1 + provenance.mirror)
    wrong = contradictions(config, provenance)
    if wrong:
        raise ConfigError("these shards would not fit the network:\n  " + "\n  ".join(wrong))
    data, seed = config.data, config.seed
    claim_directory(data.index)
    _check_same_source(data.index, provenance)
    directory = storage.parent(data.index)
    present = storage.sizes_in(directory)
    records = []
    shards = plan_shards(len(keys), provenance.mirror, data.samples_per_shard, seed)
    with tqdm(total=provenance.samples, unit="sample", disable=None) as progress:
        for number, items in enumerate(shards):
            name = f"{STEMS[provenance.kind]}-{number:06d}"
            record = finished_shard(directory, name, [sample_key(keys, item) for item in items], provenance)
            if record is None or any(table not in present for table in record.tables):
                record = write_shard(directory, name, _counted(make_samples(items), progress), provenance)
            else:
                progress.update(len(items))
            records.append(record)
    counts = _class_counts(ShardIndex(data.index, provenance, tuple(records), ""))
    write_index(data.index, records, replace(provenance, class_counts=counts))
    return records


def _counted(samples: Iterable[Sample], progress: tqdm[Any]) -> Iterator[Sample]:
    for sample in samples:
        yield sample
        progress.update()


def _class_counts(index: ShardIndex) -> tuple[int, ...]:
    """Samples of each class in the shards as written."""
    classes = index.provenance.classes
    counts = np.zeros(classes, dtype=np.int64)
    for shard in range(len(index.shards) if classes else 0):
        counts += np.bincount(index.rows(shard)["label"], minlength=classes)
    return tuple(map(int, counts))


def as_stored(array: NDArray[Any], dtype: str, what: str, setting: str) -> NDArray[Any]:
    """The array, of any shape, in the type it is stored in. what: for errors; setting: key of the type.

    Raises ``DataError`` for values that are not finite there.
    """
    with np.errstate(over="ignore"):
        stored = array.astype(np.dtype(dtype).newbyteorder("<"))
    if not np.isfinite(stored).all():
        if np.isfinite(array).all():
            raise DataError(f"{what} are not finite in {dtype}; set {setting} float32")
        raise DataError(f"{what} are not finite; mend or remove what they are made of")
    return stored


def require_tool(config: Config, tool: str) -> None:
    """Raises ``ConfigError`` where the configuration needs another of these commands."""
    space, text = config.data.space, config.model.clip_dim is not None
    if space == "pixels" and text:
        raise ConfigError(f"data.space pixels with model.clip_dim {config.model.clip_dim}: text systems are of latents")
    right = "pack_images" if space == "pixels" else "precompute_text" if text else "precompute_latents"
    if tool != right:
        why = f"model.clip_dim {config.model.clip_dim}" if text else f"data.space {space}, no model.clip_dim"
        raise ConfigError(f"{why}: not for data_tools.{tool}; use data_tools.{right}")


def command_line(
    description: str | None,
    make: Callable[[Config, argparse.Namespace], list[ShardRecord]],
    add_arguments: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> None:
    """Parse --config and overrides, make the shards, say what they are. Ends with the exit code of a user's mistake."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    add_arguments(parser)
    args = parser.parse_intermixed_args()
    with explained_exit():
        config = load_config(args.config, args.overrides)
        storage.configure(config.storage)
        records = make(config, args)
    samples, size = sum(r.samples for r in records), sum(r.size for r in records)
    print(f"{config.data.index}: {samples} samples in {len(records)} shards, {size / 1e6:.1f} MB")


def positive(text: str) -> int:
    """A whole number above 0, for argparse. Raises ``ValueError``."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """The option of jobs that run a network."""
    parser.add_argument("--batch-size", type=positive, default=64, help="images or captions at once (default: 64)")


def this_device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
