"""What must be true before a job starts: the data are there, and they are what the configuration means."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import gammaln
from torch import Tensor

from uvit_dist import storage
from uvit_dist.config import AutoencoderConfig, Config
from uvit_dist.config_rules import batch_rules
from uvit_dist.data.latents import Provenance, check_same_text_encoder
from uvit_dist.data.plan import Plan
from uvit_dist.data.reader import PART_BYTES
from uvit_dist.data.shards import ShardIndex, check_shards_present, read_index
from uvit_dist.errors import ConfigError, DataError, MissingInputError

HELD_OUT_REMEDY = (
    "make these shards as you made those of data.index, from other images and with data.index=PATH of this one (the "
    "headers of the published configurations have the command), or do without: validation=null"
)
PROBE_PARTS, PROBE_S = 16, 5.0
"""Parts of shards that are read to measure the bandwidth, and the seconds after which no further one is begun."""
log = logging.getLogger(__name__)


def encoder_fingerprint(autoencoder: AutoencoderConfig) -> str:
    """The hash of the encoder that the configuration means: given, or computed from its file."""
    if autoencoder.encoder_fingerprint:
        return autoencoder.encoder_fingerprint
    from uvit_dist.pretrained import load_encoder  # seconds, which only this needs

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
            check_shards_present(checked, config.data.quarantine_limit if key == "data.index" else 0.0)
    if index.provenance.text is not None and held_out is not None and held_out.provenance.text is not None:
        of = index.provenance.text.encoder_fingerprint, held_out.provenance.text.encoder_fingerprint
        check_same_text_encoder(dict(zip(("data.index", "validation.index"), of, strict=True)))
    if held_out is not None and held_out.provenance.source == index.provenance.source:
        log.warning(
            "validation.index %s holds the images of data.index: its loss is that of training samples; make it of "
            "other images, or leave validation out",
            held_out.path,
        )
    plan = make_plan(config, index)
    if config.data.check_shuffle:
        check_shuffle(index, plan)
    if storage.is_remote(index.path):
        probe_bandwidth(config, index)
    return index, held_out


@dataclass(frozen=True)
class ShuffleFigure:
    """Distinct labels in a batch: the mean over the first batches, and the expectation of uniform sampling.

    sigma: the standard deviation of one batch under uniform sampling.
    """

    measured: float
    expected: float
    sigma: float

    @property
    def is_sorted(self) -> bool:
        """Whether the batches hold fewer classes than chance and a tenth of tolerance allow."""
        return self.measured < self.expected - max(6 * self.sigma, 0.1 * self.expected)


def shuffle_figure(index: ShardIndex, plan: Plan, steps: int = 4) -> ShuffleFigure:
    """How many classes the first ``steps`` batches of a plan hold, from the labels alone. Raises ``DataError``."""
    batches = [plan.sample_ids(step) for step in range(min(steps, plan.steps_per_epoch))]
    shards = index.shard_of(np.concatenate(batches))
    used = np.unique(shards).tolist()
    with ThreadPoolExecutor(16) as pool:
        tables = dict(zip(used, pool.map(lambda shard: index.rows(shard)["label"], used), strict=True))
    distinct = []
    for ids in batches:
        pairs = zip(index.shard_of(ids).tolist(), ids.tolist(), strict=True)
        distinct.append(len({int(tables[shard][number - int(index.starts[shard])]) for shard, number in pairs}))
    counts = np.array([count for count in index.provenance.class_counts if count], dtype=np.float64)
    total, size = float(plan.samples), float(plan.global_batch_size)

    def absent(n: Any) -> Any:
        """Probability that none of n samples is in a batch, drawn without replacement."""
        n = np.minimum(n, total - size)
        log_p = gammaln(total - n + 1) - gammaln(total - n - size + 1) - gammaln(total + 1) + gammaln(total - size + 1)
        return np.exp(log_p)

    missing = absent(counts)
    both = absent(counts[:, None] + counts[None, :])
    np.fill_diagonal(both, missing)
    variance = float((both - np.outer(missing, missing)).sum())
    return ShuffleFigure(float(np.mean(distinct)), float((1 - missing).sum()), max(variance, 0.0) ** 0.5)


def check_shuffle(index: ShardIndex, plan: Plan) -> None:
    """Raises ``DataError`` where the shards are sorted by class, with the figure and the command that mends them."""
    if len(index.provenance.class_counts) < 2:
        return
    try:
        figure = shuffle_figure(index, plan)
    except (DataError, MissingInputError) as error:
        log.warning(
            "whether the shards are shuffled was not checked: %s; try again, or set data.check_shuffle false", error
        )
        return
    log.info("distinct labels in a batch: %.1f, by chance %.1f", figure.measured, figure.expected)
    if figure.is_sorted:
        raise DataError(
            f"data.index {index.path}: the shards are sorted by class: a batch of {plan.global_batch_size} holds "
            f"{figure.measured:.1f} different labels, by chance {figure.expected:.1f} (standard deviation "
            f"{figure.sigma:.1f}); no order of reading mends that. Shuffle them once: python -m data_tools.reshuffle "
            f"{index.path} NEW_FOLDER/index.json, and give data.index the new one; or set data.check_shuffle false"
        )


def probe_bandwidth(config: Config, index: ShardIndex) -> None:
    """Read some parts of the shards as training will, on this rank alone, and log what came and what is needed."""
    section, parts = config.data, []
    for record in index.shards[:PROBE_PARTS]:
        path = storage.join(storage.parent(index.path), record.name)
        parts += [(path, begin) for begin in range(0, record.size, PART_BYTES)]
    parts = [(path, begin) for path, begin in parts if begin == 0 or len(parts) <= PROBE_PARTS][:PROBE_PARTS]
    started = time.monotonic()

    def read(part: tuple[str, int]) -> int:
        if time.monotonic() - started > PROBE_S:
            return 0
        try:
            return storage.read_into(*part, memoryview(bytearray(PART_BYTES)))
        except MissingInputError:
            return 0

    with ThreadPoolExecutor(max(1, section.read_threads)) as pool:
        got = sum(pool.map(read, parts))
    found = got / max(time.monotonic() - started, 1e-9)
    each = sum(record.size for record in index.shards) / max(1, index.provenance.samples)
    log.info(
        "%s: %.1f MB/s with %d requests at once, enough for %.0f images/s on this rank",
        storage.parent(index.path), found / 1e6, max(1, section.read_threads), found / each,
    )  # fmt: skip
    rate = last_rate(config.run_dir)
    if rate is None:
        log.info("%s: what training needs of it is known from the run's first metrics on", storage.parent(index.path))
    else:
        needed = rate * each / config.world_size
        told = "%s: this run made %.0f images/s, %.1f MB/s on each rank; found: %.1f MB/s%s"
        enough = found >= needed
        hint = "" if enough else ": raise data.read_threads, set storage.cache_dir, or see to the network"
        log.log(
            logging.INFO if enough else logging.WARNING, told, config.run_dir, rate, needed / 1e6, found / 1e6, hint
        )


def last_rate(run_dir: str) -> float | None:
    """The newest images_per_s of a run's metrics.jsonl, or none."""
    try:
        with open(storage.join(run_dir, "metrics.jsonl"), encoding="utf-8") as file:
            lines = [line for line in deque(file, maxlen=100) if '"evaluation"' not in line]  # scores, of other jobs
            return float(json.loads(lines[-1])["images_per_s"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None
