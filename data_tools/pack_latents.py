"""Turn the official code's feature folders into shards, without their pickles and their millions of files.

    python -m data_tools.pack_latents --config configs/uvit_h_imagenet256.yaml --features imagenet256_features

With data.mirror the folder holds mirror images: batches of --mirrored-batches originals, the last one smaller, each
followed by its mirror images, as the official extraction of ImageNet writes them. The configuration says what encoder
made the features: its file is hashed where it is at hand, else autoencoder.encoder_fingerprint is taken.
Shards that an earlier run finished are kept.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from data_tools.images import Item
from data_tools.official_features import FeatureFolder
from data_tools.precompute_latents import open_encoder
from data_tools.precompute_text import write_empty_context
from data_tools.shard_job import as_stored, command_line, make_shards
from data_tools.units import claim_directory
from uvit_dist import storage
from uvit_dist.config import Config
from uvit_dist.data.latents import MIRROR_SUFFIX, UNKNOWN, Provenance, Sample, TextProvenance
from uvit_dist.data.shards import ShardRecord
from uvit_dist.errors import ConfigError, DataError
from uvit_dist.pretrained import load_text

MIRRORED_BATCH = 256
PAIRS_CHECKED = 64


def file_number(item: Item, images: int, batch: int) -> int:
    """The number of an image's file, where each batch of originals is followed by the mirror images of them."""
    number, mirrored = item
    before = number // batch * batch
    return before + number + mirrored * min(batch, images - before)


def encoder_fingerprint(config: Config) -> str:
    """The hash of the encoder that made the features: of its file where it is at hand, else as configured.

    Raises ``ConfigError`` where there is none, or they differ.
    """
    assert config.autoencoder is not None
    section = config.autoencoder
    if _at_hand(section.encoder):
        return open_encoder(config, torch.device("cpu")).encoder_fingerprint
    if section.encoder_fingerprint is None:
        raise ConfigError(
            f"autoencoder.encoder {section.encoder}: no such file, so what made the features is unknown; give the "
            "file, or its hash as autoencoder.encoder_fingerprint"
        )
    return section.encoder_fingerprint


def _at_hand(path: str) -> bool:
    return storage.is_remote(path) or os.path.exists(path)


def pack(config: Config, features: str, mirrored_batch: int) -> list[ShardRecord]:
    """Write all shards that are missing, then the index. Raises ``UserError`` of the right kind."""
    data, model = config.data, config.model
    if data.space == "pixels" or config.autoencoder is None:
        raise ConfigError("data.space pixels: official features are of latents; use data_tools.pack_images")
    if data.mirror and (config.text is not None or mirrored_batch < 1):
        raise ConfigError(
            "data.mirror true: the official features of COCO hold no mirror images; set data.mirror false"
            if config.text is not None
            else f"--mirrored-batches {mirrored_batch}: must be at least 1; leave it out for {MIRRORED_BATCH}"
        )
    made_by = encoder_fingerprint(config)
    context_shape = None if model.clip_dim is None else (model.num_clip_token, model.clip_dim)
    folder = FeatureFolder(features, (2 * model.in_chans, model.img_size, model.img_size), context_shape)
    images, rest = divmod(len(folder), 1 + data.mirror)
    if rest:
        raise DataError(
            f"--features {features}: {len(folder)} files, an odd number, and with data.mirror half are mirror images; "
            "copy the whole folder again, or set data.mirror false"
        )
    if data.mirror:
        check_pairs(folder, images, mirrored_batch)
    name = Path(features).resolve().name
    provenance = Provenance(
        kind="moments",
        dtype=data.moments_dtype,
        shape=(2 * model.in_chans, model.img_size, model.img_size),
        source=f"official features {name} {len(folder)}",
        image_size=data.image_size,
        crop=data.crop,
        split=data.split,
        mirror=data.mirror,
        classes=max(0, model.num_classes - (config.diffusion.null_label is not None)),
        samples=len(folder),
        autoencoder=Path(config.autoencoder.encoder).name,
        encoder_fingerprint=made_by,
        scale_factor=config.autoencoder.scale_factor,
        text=None if context_shape is None else _text_provenance(config, folder),
    )
    keys = [f"{number:07d}" for number in range(images)]
    read = _reader(config, folder, keys, provenance.classes, mirrored_batch)

    def samples(items: list[Item]) -> Iterator[Sample]:
        with ThreadPoolExecutor(data.read_threads) as pool:
            for first in range(0, len(items), 64):
                yield from pool.map(read, items[first : first + 64])

    return make_shards(config, keys, provenance, samples)


def _reader(
    config: Config, folder: FeatureFolder, keys: list[str], classes: int, mirrored_batch: int
) -> Callable[[Item], Sample]:
    data = config.data
    batch = mirrored_batch if data.mirror else len(keys)

    def read(item: Item) -> Sample:
        key = keys[item[0]] + MIRROR_SUFFIX * item[1]
        number = file_number(item, len(keys), batch)
        path = f"{folder.root}/{number}"
        what = f"{path}.npy: moments"
        if folder.context_shape is not None:
            contexts = as_stored(
                folder.contexts(number), data.contexts_dtype, f"{path}_*.npy: contexts", "data.contexts_dtype"
            )
            moments = as_stored(folder.moments(number), data.moments_dtype, what, "data.moments_dtype")
            return Sample(key, -1, moments, [""] * len(contexts), contexts)
        raw, label = folder.moments_and_label(number)
        if classes and not 0 <= label < classes:
            raise DataError(
                f"{path}.npy: label {label}, and model.num_classes {config.model.num_classes} leaves "
                f"{classes} classes; correct model.num_classes or diffusion.null_label"
            )
        moments = as_stored(raw, data.moments_dtype, what, "data.moments_dtype")
        return Sample(key, label if classes else -1, moments)

    return read


def check_pairs(folder: FeatureFolder, images: int, mirrored_batch: int) -> None:
    """Compare the labels of some images and their mirror images. Raises ``DataError`` where they differ."""
    for number in np.linspace(0, images - 1, min(images, PAIRS_CHECKED)).astype(int):
        pair = [file_number((int(number), mirrored), images, mirrored_batch) for mirrored in (False, True)]
        labels = [folder.moments_and_label(file)[1] for file in pair]
        if labels[0] != labels[1]:
            raise DataError(
                f"--features {folder.root}: {pair[0]}.npy and {pair[1]}.npy should be an image and its mirror image, "
                f"and their labels are {labels[0]} and {labels[1]}; correct --mirrored-batches {mirrored_batch}, or "
                "set data.mirror false if the folder holds no mirror images"
            )


def _text_provenance(config: Config, folder: FeatureFolder) -> TextProvenance:
    assert config.text is not None
    section, fingerprint = config.text, UNKNOWN
    if _at_hand(section.encoder):
        fingerprint = load_text(section).fingerprint
    claim_directory(config.data.index)
    dtype = config.data.contexts_dtype
    empty = as_stored(folder.empty_context(), dtype, "empty_context.npy: contexts", "data.contexts_dtype")
    return write_empty_context(config.data.index, empty, fingerprint)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--features", required=True, help="folder of the official .npy files")
    parser.add_argument(
        "--mirrored-batches",
        type=int,
        default=MIRRORED_BATCH,
        help="originals in a row that their mirror images follow, with data.mirror (default: %(default)s)",
    )
    parser.add_argument("--encoder-fingerprint", metavar="HEX", help="instead of autoencoder.encoder_fingerprint")


def _make(config: Config, args: argparse.Namespace) -> list[ShardRecord]:
    if config.autoencoder is not None and args.encoder_fingerprint:
        section = config.autoencoder.model_copy(update={"encoder_fingerprint": args.encoder_fingerprint})
        config = config.model_copy(update={"autoencoder": section})
    return pack(config, args.features, args.mirrored_batches)


def main() -> None:
    """The command line."""
    command_line("pack_latents", __doc__, _make, _add_arguments)


if __name__ == "__main__":
    main()
