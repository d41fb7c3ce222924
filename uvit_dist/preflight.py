"""What must be true before a job starts: the data are there, and they are what the configuration means."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from uvit_dist.config import AutoencoderConfig, Config
from uvit_dist.config_rules import batch_rules
from uvit_dist.data.latents import Provenance
from uvit_dist.data.plan import Plan
from uvit_dist.data.shards import ShardIndex, check_shards_present, read_index
from uvit_dist.errors import ConfigError, DataError
from uvit_dist.pretrained import check_same_text_encoder, load_encoder

HELD_OUT_REMEDY = (
    "make these shards as you made those of data.index, from other images and with data.index=PATH of this one (the "
    "headers of the published configurations have the command), or do without: validation=null"
)
log = logging.getLogger(__name__)


def encoder_fingerprint(autoencoder: AutoencoderConfig) -> str:
    """The hash of the encoder that the configuration means: given, or computed from its file."""
    if autoencoder.encoder_fingerprint:
        return autoencoder.encoder_fingerprint
    return load_encoder(autoencoder).encoder_fingerprint


def check_provenance(config: Config, index: ShardIndex, key: str = "data.index") -> None:
    """Refuse an index that contradicts the configuration, naming both values of everything that differs.

    key: of the configuration, that names it; that of held-out samples may be made without mirror images.
    Raises ``DataError``.
    """
    made = index.provenance
    wrong = contradictions(config, made)
    if config.autoencoder is not None and made.kind == "moments":
        pairs: list[tuple[str, Any, Any]] = [
            ("autoencoder.encoder (hash)", encoder_fingerprint(config.autoencoder), made.encoder_fingerprint),
            ("autoencoder.scale_factor", config.autoencoder.scale_factor, made.scale_factor),
            ("data.moments_dtype", config.data.moments_dtype, made.dtype),
        ]
        if key == "data.index":
            pairs.append(("data.mirror", config.data.mirror, made.mirror))
        wrong += _differing(pairs)
    if key == "data.index":
        wrong += _differing([("data.split", config.data.split, made.split)])
    if wrong:
        raise DataError(
            f"{key} {index.path} does not hold what the configuration describes:\n  "
            + "\n  ".join(wrong)
            + "\nCorrect the configuration, or make the shards again with the commands in docs/shards.md."
        )


def _differing(pairs: list[tuple[str, Any, Any]]) -> list[str]:
    return [
        f"{name}: the configuration says {ours}, the shards {theirs}" for name, ours, theirs in pairs if ours != theirs
    ]


def contradictions(config: Config, made: Provenance) -> list[str]:
    """How samples of such a provenance differ from what the network takes, a line each."""
    model = config.model
    channels = model.in_chans if config.autoencoder is None else 2 * model.in_chans
    shape = (channels, model.img_size, model.img_size)
    pairs: list[tuple[str, Any, Any]] = [
        ("what is stored (data.space)", "pixels" if config.autoencoder is None else "moments", made.kind),
        ("data.image_size", config.data.image_size, made.image_size),
        ("data.crop", config.data.crop, made.crop),
        ("shape of a sample (by model.in_chans and model.img_size)", shape, made.shape),
    ]
    if model.num_classes > 0:
        classes = model.num_classes - (config.diffusion.null_label is not None)
        pairs.append(("classes (model.num_classes without the null label)", classes, made.classes))
    if model.clip_dim is not None:
        contexts = made.text.shape if made.text else None
        pairs.append(
            ("contexts (model.num_clip_token, model.clip_dim)", (model.num_clip_token, model.clip_dim), contexts)
        )
    return _differing(pairs)


def empty_context(index: ShardIndex) -> Tensor | None:
    """The context of the empty prompt, (length, width) float32, of an index of samples with captions."""
    return None if index.provenance.text is None else torch.from_numpy(index.empty_context()).float()


def make_plan(config: Config, index: ShardIndex) -> Plan:
    """The order of reading. Raises ``ConfigError`` where the batch does not fit the data."""
    return Plan(index.counts, config.seed, config.train.global_batch_size, config.data.lanes, config.data.block_size)


def check_training(config: Config, world_size: int) -> tuple[ShardIndex, ShardIndex | None]:
    """The index of a training job on so many ranks, and that of its held-out samples, after every check.

    Raises ``UserError`` of the right kind.
    """
    broken = [message for holds, message in batch_rules(config.train, config.data, world_size) if not holds]
    if broken:
        raise ConfigError("\n".join(broken))
    index = read_index(config.data.index)
    held_out = None
    if config.validation is not None:
        held_out = read_index(config.validation.index, "validation.index", HELD_OUT_REMEDY)
    for key, checked in (("data.index", index), ("validation.index", held_out)):
        if checked is not None:
            check_provenance(config, checked, key)
            check_shards_present(checked)
    if index.provenance.text is not None and held_out is not None and held_out.provenance.text is not None:
        of = index.provenance.text.encoder_fingerprint, held_out.provenance.text.encoder_fingerprint
        check_same_text_encoder(dict(zip(("data.index", "validation.index"), of, strict=True)))
    if held_out is not None and held_out.provenance.source == index.provenance.source:
        log.warning(
            "validation.index %s holds the images of data.index: its loss is that of training samples", held_out.path
        )
    make_plan(config, index)
    return index, held_out
