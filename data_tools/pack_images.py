"""Crop images once: shards of pixels and their index, for systems that are trained on pixels.

    python -m data_tools.pack_images --config YOUR_CONFIG.yaml

Images are stored as they are, never mirrored: with data.mirror they are mirrored at random as they are read.
Shards that an earlier run finished are kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_tools.images import Item, load_images, source_fingerprint
from data_tools.shard_job import command_line, make_shards, require_tool
from data_tools.sources import open_source
from uvit_dist.config import Config
from uvit_dist.data.latents import Provenance, Sample
from uvit_dist.data.shards import ShardRecord


def pack(config: Config) -> list[ShardRecord]:
    """Write all shards that are missing, then the index. Raises ``UserError`` of the right kind."""
    require_tool(config, "pack_images")
    data = config.data
    source = open_source(data)
    provenance = Provenance(
        kind="pixels",
        dtype="uint8",
        shape=(3, data.image_size, data.image_size),
        source=f"{source.name} {source_fingerprint(source)}",
        image_size=data.image_size,
        crop=data.crop,
        split=data.split,
        mirror=False,
        classes=source.classes,
        samples=len(source.keys),
    )

    def samples(items: list[Item]) -> Iterator[Sample]:
        images = load_images(source, items, data.read_threads)
        for (number, _), pixels in zip(items, images, strict=True):
            yield Sample(source.keys[number], source.labels[number], np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    return make_shards(config, source.keys, provenance, samples)


def main() -> None:
    """The command line."""
    command_line(__doc__, lambda config, args: pack(config))


if __name__ == "__main__":
    main()
