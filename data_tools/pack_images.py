"""Crop images once: shards of pixels and their index, for systems that are trained on pixels.

    python -m data_tools.pack_images --config configs/uvit_s_cifar10.yaml data.source=/data/cifar-10-batches-bin

Images are stored as they are, never mirrored: with data.mirror they are mirrored at random as they are read.
Any number of workers share the work; the same command goes on after an interruption.
"""

from __future__ import annotations

from torch import Tensor

from data_tools.decoding import CHUNK
from data_tools.images import ImageSource, source_fingerprint
from data_tools.pipeline import Finish
from data_tools.shard_job import command_line, make_from_images, open_images, require_tool
from data_tools.units import Unit
from uvit_dist.config import Config
from uvit_dist.data.latents import Provenance, Sample
from uvit_dist.data.shards import ShardRecord


class PixelsMaker:
    """Stores images as they are."""

    batch_size = CHUNK

    def __init__(self, source: ImageSource) -> None:
        self._source = source

    def start(self, unit: Unit, places: range, pixels: Tensor) -> Finish:
        """pixels: (n, H, W, 3) uint8. What it returns gives pixels (3, H, W) uint8."""
        (shard,) = unit.shards
        keys = shard.keys(self._source.keys, unit.images[places.start : places.stop])
        labels = [self._source.labels[unit.images[place]] for place in places]
        data = pixels.permute(0, 3, 1, 2).contiguous().numpy()
        return lambda: [[Sample(*fields) for fields in zip(keys, labels, data, strict=True)]]


def make(config: Config) -> list[ShardRecord]:
    """Do a share of the work until all is done, then see to the index. Raises ``UserError`` of the right kind."""
    require_tool(config, "pack_images")
    data = config.data
    source = open_images(config)
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
    made_with = config.precompute.model_dump(include={"exif_rotation"})
    return make_from_images(config, source, provenance, made_with, PixelsMaker(source))


def main() -> None:
    """The command line."""
    command_line("pack_images", __doc__, lambda config, args: make(config), from_images=True)


if __name__ == "__main__":
    main()
