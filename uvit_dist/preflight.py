"""What must be true before a job starts: the data are there, and they are what the configuration means."""

from __future__ import annotations

from uvit_dist.config import Config, batch_rules
from uvit_dist.data.plan import Plan
from uvit_dist.data.shards import ShardIndex, check_shards_present, read_index
from uvit_dist.errors import ConfigError, DataError
from uvit_dist.models.autoencoder import load_autoencoder


def encoder_fingerprint(config: Config) -> str:
    """The hash of the encoder that the configuration means: given, or computed from its file."""
    return config.autoencoder.encoder_fingerprint or load_autoencoder(config.autoencoder.encoder).encoder_fingerprint


def check_provenance(config: Config, index: ShardIndex) -> None:
    """Refuse an index that contradicts the configuration, naming both values of everything that differs.

    Raises ``DataError``.
    """
    made, model = index.provenance, config.model
    shape = (2 * model.in_chans, model.img_size, model.img_size)
    null = config.diffusion.null_label
    pairs = [
        ("autoencoder.encoder (hash)", encoder_fingerprint(config), made.encoder_fingerprint),
        ("autoencoder.scale_factor", config.autoencoder.scale_factor, made.scale_factor),
        ("data.image_size", config.data.image_size, made.image_size),
        ("data.crop", config.data.crop, made.crop),
        ("data.mirror", config.data.mirror, made.mirror),
        ("data.moments_dtype", config.data.moments_dtype, made.moments_dtype),
        ("shape of moments (2 x model.in_chans, model.img_size, model.img_size)", shape, made.moments_shape),
    ]
    if model.num_classes > 0:
        classes = model.num_classes - (null is not None)
        pairs.append(("classes (model.num_classes without the null label)", classes, made.classes))
    wrong = [
        f"{key}: the configuration says {ours}, the index {theirs}" for key, ours, theirs in pairs if ours != theirs
    ]
    if wrong:
        raise DataError(
            f"data.index {index.path} does not hold what the configuration describes:\n  "
            + "\n  ".join(wrong)
            + "\nCorrect the configuration, or make the shards again with data_tools.precompute_latents."
        )


def make_plan(config: Config, index: ShardIndex) -> Plan:
    """The order of reading. Raises ``ConfigError`` where the batch does not fit the data."""
    return Plan(index.counts, config.seed, config.train.global_batch_size, config.data.lanes, config.data.block_size)


def check_training(config: Config, world_size: int) -> ShardIndex:
    """The index of a training job on so many ranks, after every check. Raises ``UserError`` of the right kind."""
    broken = [message for holds, message in batch_rules(config.train, config.data, world_size) if not holds]
    if broken:
        raise ConfigError("\n".join(broken))
    index = read_index(config.data.index)
    check_provenance(config, index)
    check_shards_present(index)
    make_plan(config, index)
    return index
