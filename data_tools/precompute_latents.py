"""Encode images once: shards of autoencoder moments and their index, as the configuration's data section says.

    python -m data_tools.precompute_latents --config configs/digits_demo.yaml

Shards that an earlier run finished are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from data_tools.images import ImageSource, Item, load_images, source_fingerprint
from data_tools.shard_job import (
    add_batch_size,
    as_stored,
    command_line,
    make_shards,
    require_tool,
    sample_key,
    this_device,
)
from data_tools.sources import open_source
from uvit_dist.config import Config, DataConfig
from uvit_dist.data.latents import Provenance, Sample, TextProvenance, pixels_to_x0
from uvit_dist.data.shards import ShardRecord
from uvit_dist.errors import ConfigError
from uvit_dist.models.autoencoder import Autoencoder
from uvit_dist.pretrained import load_encoder


@torch.inference_mode()
def encode(
    items: list[Item],
    source: ImageSource,
    autoencoder: Autoencoder,
    data: DataConfig,
    batch_size: int,
    device: torch.device,
) -> Iterator[Sample]:
    """Encode images in batches of ``batch_size``, the last one padded: the bits of moments depend on the batch.

    Yields samples of moments (2C, H, W) of data.moments_dtype.
    Raises ``DataError`` for moments that do not fit that type.
    """
    images = load_images(source, items, data.read_threads)
    for first in range(0, len(items), batch_size):
        batch = items[first : first + batch_size]
        pixels = list(islice(images, len(batch)))
        pixels += [pixels[-1]] * (batch_size - len(batch))
        stacked = torch.from_numpy(np.stack(pixels)).to(device).permute(0, 3, 1, 2)
        x0 = pixels_to_x0(stacked, torch.zeros(batch_size, dtype=torch.bool, device=device))
        moments = autoencoder.encode_moments(x0).cpu().numpy()
        for item, sample in zip(batch, moments, strict=False):
            key = sample_key(source.keys, item)
            stored = as_stored(sample, data.moments_dtype, f"{key}: moments", "data.moments_dtype")
            yield Sample(key, source.labels[item[0]], stored)


def open_encoder(config: Config, device: torch.device) -> Autoencoder:
    """The encoding autoencoder. Raises ``MissingInputError``, ``DataError``, ``ConfigError`` where it does not fit."""
    assert config.autoencoder is not None
    section = config.autoencoder
    autoencoder = load_encoder(section).to(device)
    found = autoencoder.encoder_fingerprint
    if section.encoder_fingerprint not in (None, found):
        raise ConfigError(
            f"autoencoder.encoder {section.encoder}: its hash is {found}, autoencoder.encoder_fingerprint says "
            f"{section.encoder_fingerprint}; correct one of them"
        )
    if config.data.image_size % autoencoder.factor:
        raise ConfigError(
            f"data.image_size {config.data.image_size} must be divisible by the autoencoder's factor "
            f"{autoencoder.factor}"
        )
    return autoencoder


def moments_provenance(
    config: Config, source: ImageSource, autoencoder: Autoencoder, text: TextProvenance | None = None
) -> Provenance:
    """What the index says of moments that this encoder makes of these images."""
    assert config.autoencoder is not None
    data, side = config.data, config.data.image_size // autoencoder.factor
    return Provenance(
        kind="moments",
        dtype=data.moments_dtype,
        shape=(2 * autoencoder.latent_channels, side, side),
        source=f"{source.name} {source_fingerprint(source)}",
        image_size=data.image_size,
        crop=data.crop,
        split=data.split,
        mirror=data.mirror,
        classes=source.classes,
        samples=len(source.keys) * (1 + data.mirror),
        autoencoder=Path(config.autoencoder.encoder).name,
        encoder_fingerprint=autoencoder.encoder_fingerprint,
        scale_factor=config.autoencoder.scale_factor,
        text=text,
    )


def precompute(config: Config, batch_size: int, device: torch.device) -> list[ShardRecord]:
    """Write all shards that are missing, then the index. Raises ``UserError`` of the right kind."""
    require_tool(config, "precompute_latents")
    source = open_source(config.data)
    autoencoder = open_encoder(config, device)
    provenance = moments_provenance(config, source, autoencoder)

    def samples(items: list[Item]) -> Iterable[Sample]:
        return encode(items, source, autoencoder, config.data, batch_size, device)

    return make_shards(config, source.keys, provenance, samples)


def main() -> None:
    """The command line."""
    command_line(__doc__, lambda config, args: precompute(config, args.batch_size, this_device()), add_batch_size)


if __name__ == "__main__":
    main()
