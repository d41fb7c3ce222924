"""What all jobs that write shards share: working until all is done, what is stored, the command line."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from data_tools.images import ImageSource, Item
from data_tools.pipeline import Maker, Pipeline
from data_tools.sources import open_source
from data_tools.units import POLL_S, WORK, ShardJob
from data_tools.x0 import one_thread
from uvit_dist import stopping, storage
from uvit_dist.config import Config
from uvit_dist.config_yaml import load_config
from uvit_dist.data.latents import Provenance, Sample
from uvit_dist.data.shards import ShardIndex, ShardRecord, write_shard
from uvit_dist.errors import ConfigError, DataError, explained_exit
from uvit_dist.metrics import AroundProgress

log = logging.getLogger(__name__)
CHEAP = ("digits", "cifar10")
"""Sources whose images are not worth a process to decode them."""
EXPONENT = 0x7C00
"""Bits of a float16's exponent, all of them set where it is not finite."""

MakeSamples = Callable[[list[Item]], Iterable[Sample]]


def make_from_images(
    config: Config,
    source: ImageSource,
    provenance: Provenance,
    made_with: dict[str, Any],
    maker: Maker,
    afterwards: Callable[[ShardIndex], Iterable[tuple[str, str, Callable[[], None]]]] = lambda index: (),
) -> list[ShardRecord]:
    """Do a share of the shards of a source of images until all are done, then see to the index.

    made_with: settings that the bytes depend on; afterwards: (name, path, action) of what one worker makes then, as in
    ``ShardJob.once``. Raises ``ConfigError``, before anything is made, where the network
    could not be trained on it; ``DataError`` for too many bad images; ``OutputError``, and what the maker raises.
    """
    job = ShardJob(config, source.keys, provenance, made_with, source.unusable)
    try:
        job.redo_bad()
        pipeline = Pipeline(job, source, maker, config, cheap=config.data.format in CHEAP)
        with stopping.gently():
            index = pipeline.run()
        _tell(pipeline.times.summary())
        for name, path, action in [*afterwards(index), *_reference(config, job)]:
            job.once(name, path, action)
    finally:
        job.close()
    return list(index.shards)


def _reference(config: Config, job: ShardJob) -> list[tuple[str, str, Callable[[], None]]]:
    """The statistics that samples are scored against, where the configuration asks for them and they are not there."""
    path = config.evaluate.reference
    if not config.precompute.reference or storage.exists(path):
        return []

    def make() -> None:
        from data_tools.fid_reference import write_reference  # networks, which only this needs

        log.info(write_reference(config, job.bad_keys(), scanned=True))

    return [("reference", path, make)]


def _tell(figures: dict[str, Any]) -> None:
    """Log what this worker did, and what it waited for."""
    if figures["images"]:
        waiting = ", ".join(f"{what} {share:.0%}" for what, share in figures["waiting"].items())
        log.info(
            "%d images in %.1f s, %.1f images/s; time spent waiting for: %s; bottleneck: %s",
            *(figures[name] for name in ("images", "seconds", "images_per_s")), waiting, figures["bottleneck"],
        )  # fmt: skip


def make_shards(
    config: Config, keys: Sequence[str], provenance: Provenance, make_samples: MakeSamples
) -> list[ShardRecord]:
    """As ``make_from_images``, of samples that need no pipeline. keys: of the images.

    make_samples: the samples of a shard, in order.
    """
    job = ShardJob(config, keys, provenance)
    try:
        with tqdm(total=provenance.samples, unit="sample", disable=None) as progress:
            index = job.complete()
            while index is None:
                while (unit := job.claim()) is not None:
                    for shard in unit.shards:
                        samples = make_samples([(number, shard.mirrored) for number in shard.images])
                        sidecar = partial(job.sidecar, shard, {})
                        write_shard(job.directory, shard.name, samples, provenance, sidecar)
                        progress.update(len(shard.images))
                    job.finish(unit, {}, {})
                index = job.merge() or job.complete()
                if index is None:
                    time.sleep(min(POLL_S, config.precompute.lease_s / 4))
    finally:
        job.close()
    return list(index.shards)


def all_as_stored(arrays: NDArray[Any], dtype: str, keys: Sequence[str], what: str, setting: str) -> NDArray[Any]:
    """``as_stored`` of many at once, (n, ...). keys: of each; what: they are. Raises ``DataError``, with the key."""
    stored, finite = _cast(arrays, dtype)
    if not finite:
        for key, array in zip(keys, arrays, strict=True):
            as_stored(array, dtype, f"{key}: {what}", setting)
    return stored


def as_stored(array: NDArray[Any], dtype: str, what: str, setting: str) -> NDArray[Any]:
    """The array, of any shape, in the type it is stored in. what: for errors; setting: key of the type.

    Raises ``DataError`` for values that are not finite there.
    """
    stored, finite = _cast(array, dtype)
    if not finite:
        if np.isfinite(array).all():
            raise DataError(f"{what} are not finite in {dtype}; set {setting} float32")
        raise DataError(f"{what} are not finite; mend or remove what they are made of")
    return stored


def _cast(array: NDArray[Any], dtype: str) -> tuple[NDArray[Any], bool]:
    """The array in another type, and whether all of it is finite there."""
    little = np.dtype(dtype).newbyteorder("<")
    if (array.dtype, dtype) == (np.float32, "float16"):  # numpy does both without the processor's instructions
        with one_thread():
            stored = torch.from_numpy(np.ascontiguousarray(array)).half().numpy()
        return stored.astype(little, copy=False), bool(((stored.view(np.uint16) & EXPONENT) != EXPONENT).all())
    with np.errstate(over="ignore"):
        cast = array.astype(little)
    return cast, bool(np.isfinite(cast).all())


def tool_of(config: Config) -> str:
    """The command that makes a configuration's shards from images. Raises ``ConfigError`` where there is none."""
    space, text = config.data.space, config.model.clip_dim is not None
    if space == "pixels" and text:
        raise ConfigError(
            f"data.space pixels with model.clip_dim {config.model.clip_dim}: text systems are of latents; "
            "set data.space latents, or drop model.clip_dim and text"
        )
    return "pack_images" if space == "pixels" else "precompute_text" if text else "precompute_latents"


def run(config: Config) -> list[ShardRecord]:
    """Do a share of the job that a configuration needs, as a rank of a launched one. Raises as the commands do."""
    module = importlib.import_module(f"data_tools.{tool_of(config)}")
    with interrupted_by(signal.SIGTERM):
        records: list[ShardRecord] = module.make(config)
    return records


def open_images(config: Config) -> ImageSource:
    """The images of a job; what its workers find in tars they share. Raises as ``open_source`` does."""
    directory = storage.parent(config.data.index)
    scans, rank = storage.join(directory, WORK, "scan"), int(os.environ.get("RANK", "0"))
    return open_source(config.data, config.precompute.exif_rotation, scans, rank)


def require_tool(config: Config, tool: str) -> None:
    """Raises ``ConfigError`` where the configuration needs another of these commands."""
    space, text, right = config.data.space, config.model.clip_dim is not None, tool_of(config)
    if tool != right:
        why = f"model.clip_dim {config.model.clip_dim}" if text else f"data.space {space}, no model.clip_dim"
        raise ConfigError(f"{why}: not for data_tools.{tool}; use data_tools.{right}")


def command_line(
    tool: str,
    description: str | None,
    make: Callable[[Config, argparse.Namespace], list[ShardRecord]],
    add_arguments: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
    from_images: bool = False,
) -> None:
    """Parse --config and overrides, make the shards, say what they are. Ends with the exit code of a user's mistake.

    tool: the module's name in this package; from_images: whether --dry-run can tell what it will take.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m data_tools.{tool}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    if from_images:
        parser.add_argument("--dry-run", action="store_true", help="say what it will take, and make nothing")
        parser.add_argument("--tflops", type=float, help="with --dry-run: rate of the encoder on a GPU, 10^12 FLOP/s")
        parser.add_argument("--gpu-dollars", type=float, default=3.0, help="with it: of a GPU hour (%(default)s)")
    add_arguments(parser)
    args = parser.parse_intermixed_args()
    with explained_exit(), interrupted_by(signal.SIGTERM):
        config = load_config(args.config, args.overrides)
        storage.configure(config.storage)
        if from_images and args.dry_run:
            from data_tools.estimate import dry_run  # networks, which only this needs

            print(dry_run(config, args.tflops, args.gpu_dollars))
            return
        show_log()
        records = make(config, args)
    samples, size = sum(r.samples for r in records), sum(r.size for r in records)
    print(f"{config.data.index}: {samples} samples in {len(records)} shards, {size / 1e6:.1f} MB")


@contextlib.contextmanager
def interrupted_by(number: int) -> Iterator[None]:
    """A signal ends the work as Ctrl-C does: what is held is given back, what is finished is kept."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, before)


def show_log() -> None:
    """Send the program's log to stderr, around the progress bar."""
    handler = AroundProgress()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("uvit_dist", "data_tools"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        if not logger.handlers:
            logger.addHandler(handler)


def positive(text: str) -> int:
    """A whole number above 0, for argparse. Raises ``ValueError``."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def this_device() -> torch.device:
    """The GPU of this worker among those of its machine (LOCAL_RANK); without any, the CPU.

    Raises ``ConfigError`` where the machine has fewer.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(f"LOCAL_RANK {local_rank}: this machine has {count} GPUs; start one worker for each")
    return torch.device("cuda", local_rank)
