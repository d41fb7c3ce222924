"""Encode images once: shards of autoencoder moments and their index, as the configuration's data section says.

    python -m data_tools.precompute_latents --config configs/digits_demo.yaml

Shards that an earlier run finished are kept. Images go into shards in a seeded permutation, so that no shard is of one
class; mirrored images have shards of their own, so that none meets its original there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data_tools.images import ImageSource, Pixels, open_source, source_fingerprint
from uvit_dist import storage
from uvit_dist.config import Config
from uvit_dist.config_yaml import load_config
from uvit_dist.data.latents import MIRROR_SUFFIX, Provenance
from uvit_dist.data.shards import ShardRecord, finished_shard, write_index, write_shard
from uvit_dist.errors import ConfigError, DataError, explained_exit
from uvit_dist.models.autoencoder import Autoencoder, load_autoencoder

Item = tuple[int, bool]
"""(number of the image in its source, mirrored)"""


def plan_shards(images: int, mirror: bool, per_shard: int, seed: int) -> list[list[Item]]:
    """What goes into each shard: originals in a seeded permutation, then mirror images in another."""
    shards = []
    for mirrored in (False, True) if mirror else (False,):
        order = np.argsort(np.random.Philox(key=[seed, mirrored]).random_raw(images), kind="stable")
        items = [(int(number), mirrored) for number in order]
        shards += [items[first : first + per_shard] for first in range(0, images, per_shard)]
    return shards


@torch.inference_mode()
def encode(
    items: list[Item],
    source: ImageSource,
    autoencoder: Autoencoder,
    dtype: str,
    batch_size: int,
    device: torch.device,
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Encode images in batches of ``batch_size``, the last one padded: the bits of moments depend on the batch.

    Yields (key, label, moments (2C, H, W) of ``dtype``).
    Raises ``DataError`` for moments that do not fit ``dtype``.
    """
    for first in range(0, len(items), batch_size):
        batch = items[first : first + batch_size]
        pixels = [_oriented(source.load(number), mirrored) for number, mirrored in batch]
        pixels += [pixels[-1]] * (batch_size - len(batch))
        images = torch.from_numpy(np.stack(pixels)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        moments = autoencoder.encode_moments(images).cpu().numpy().astype(dtype)
        for (number, mirrored), sample in zip(batch, moments, strict=False):
            if not np.isfinite(sample).all():
                raise DataError(
                    f"{source.keys[number]}: moments are not finite in {dtype}; set data.moments_dtype float32"
                )
            yield sample_key(source, (number, mirrored)), source.labels[number], sample


def sample_key(source: ImageSource, item: Item) -> str:
    """The key of a sample in its shard."""
    number, mirrored = item
    return source.keys[number] + MIRROR_SUFFIX * mirrored


def _oriented(pixels: Pixels, mirrored: bool) -> Pixels:
    return pixels[:, ::-1] if mirrored else pixels


def precompute(config: Config, batch_size: int, device: torch.device) -> list[ShardRecord]:
    """Write all shards that are missing, then the index. Raises ``UserError`` of the right kind."""
    data = config.data
    source = open_source(data.source, data.image_size, data.crop)
    autoencoder = load_autoencoder(config.autoencoder.encoder).to(device)
    side, rest = divmod(data.image_size, autoencoder.factor)
    if rest:
        raise ConfigError(
            f"data.image_size {data.image_size} must be divisible by the autoencoder's factor {autoencoder.factor}"
        )
    provenance = Provenance(
        autoencoder=Path(config.autoencoder.encoder).name,
        encoder_fingerprint=autoencoder.encoder_fingerprint,
        scale_factor=config.autoencoder.scale_factor,
        source=f"{source.name} {source_fingerprint(source)}",
        image_size=data.image_size,
        crop=data.crop,
        mirror=data.mirror,
        moments_dtype=data.moments_dtype,
        moments_shape=(2 * autoencoder.latent_channels, side, side),
        classes=source.classes,
        samples=len(source.keys) * (1 + data.mirror),
    )
    directory = storage.parent(data.index)
    storage.make_directory(directory)
    records = []
    shards = plan_shards(len(source.keys), data.mirror, data.samples_per_shard, config.seed)
    with tqdm(total=provenance.samples, unit="image", disable=None) as progress:
        for number, items in enumerate(shards):
            name = f"latents-{number:06d}"
            keys = [sample_key(source, item) for item in items]
            record = finished_shard(directory, name, keys, provenance)
            if record is None:
                samples = encode(items, source, autoencoder, data.moments_dtype, batch_size, device)
                record = write_shard(directory, name, samples, provenance)
            records.append(record)
            progress.update(len(items))
    write_index(data.index, records, provenance)
    return records


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("--batch-size", type=int, default=64, help="images encoded at once (default: 64)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    with explained_exit():
        config = load_config(args.config, args.overrides)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        records = precompute(config, args.batch_size, device)
    samples, size = sum(r.samples for r in records), sum(r.size for r in records)
    print(f"{config.data.index}: {samples} samples in {len(records)} shards, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
