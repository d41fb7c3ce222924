"""Shuffle a set of shards anew, whatever its size: for one that is sorted, by class for example.

    python -m data_tools.reshuffle sorted/index.json shuffled/index.json
    python -m data_tools.reshuffle s3://bucket/sorted/index.json shuffled/index.json --seed 1 --scratch /scratch

Originals go into shards in a seeded permutation, mirror images in another into shards of their own. The source is read
once, to files on a scratch disk as large as itself; each of these fits in --memory-gb. The result depends on the source,
the seed and the number of samples in a shard alone.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import xxhash

from data_tools.shard_job import STEMS, claim_directory, positive
from data_tools.shard_set import FOREIGN, RawSample, TarSamples, progress_of, require_space, same_place, tool_parser
from data_tools.shard_set import use_storage as use_storage_options
from uvit_dist import storage
from uvit_dist.data.latents import MIRROR_SUFFIX, Provenance, Sample
from uvit_dist.data.shards import EMPTY_CONTEXT, ShardIndex, ShardRecord, check_shards_present, read_index
from uvit_dist.data.shards import write_index, write_shard
from uvit_dist.errors import ConfigError, DataError, OutputError, explained_exit

_HEAD = struct.Struct("<QQiIIQQ")
"""Random word, id in the source, label; bytes of the key, of the captions, of the contexts, of the data."""


def _text_of(raw: RawSample, made: Provenance) -> tuple[bytes, bytes]:
    """The captions, as JSON, and the contexts of a sample, as they are in memory."""
    if made.text is None:
        return b"", b""
    offset, data = raw.members["contexts.npy"]
    version = np.lib.format.read_magic
    del offset, version
    array = np.load(__import__("io").BytesIO(data), allow_pickle=False)
    return raw.members["json"][1], array.tobytes()
