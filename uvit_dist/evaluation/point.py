"""One protocol on one set of weights: its images in chunks that any workers share, and its scores.

A chunk is a range of image ids, done in sub-batches of a fixed size, the last one padded. Noise and label of an image
are functions of (seed, id): so what a chunk holds depends neither on who does it nor on what else is done. What is kept
of it are the features of its images, exactly as the extractor gives them: the float64 moments of 250 images of 2,048
features take 33 MB, and the features themselves, which all scores can be made of, 2 MB.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from uvit_dist import stopping, storage, watchdog
from uvit_dist.config import Config
from uvit_dist.data.shards import write_image_shard
from uvit_dist.evaluation.networks import Networks, choose_weights
from uvit_dist.evaluation.reference import hash_of_reference, read_reference
from uvit_dist.evaluation.scoring import LABELS, score
from uvit_dist.sampler import ImageConditions, Sampler, labels_of
from uvit_dist.scores.kinds import needed
from uvit_dist.spool import spooled
from uvit_dist.work import Result, SharedWork

log = logging.getLogger(__name__)
GRID_COLUMNS = 10
IMAGES, SHARD = "images", ".tar"
SCORED_BY = ("reference", "adm_reference", "reference_images", "neighbours", "scores", "compared")
"""Settings that change the scores and no image."""
FREE = {*SCORED_BY, "samples", "inception", "inception_sha256", "clip", "clip_sha256", "clip_model", "checkpoint",
        "captions", "small_samples", "sweep", "lease_s", "save_samples"}  # fmt: skip
"""Settings of the section that change neither an image nor its features (files count by their content)."""


def chunk_names(samples: int, chunk_size: int) -> list[str]:
    """The chunks of a number of images, in order. One that is cut short has a name of its own, so that whoever scores
    more images later makes use of all the others."""
    whole, rest = divmod(samples, chunk_size)
    return [f"chunk-{number:06d}" for number in range(whole)] + ([f"chunk-{whole:06d}-of-{rest}"] if rest else [])


def protocol_of(config: Config) -> str:
    """A hash of all settings that an image or its features depend on, the weights apart: 12 hexadecimal digits."""
    protocol = {
        "evaluate": config.evaluate.model_dump(mode="json", exclude=FREE),
        "sample": config.sample.model_dump(mode="json"),
        "schedule": config.diffusion.schedule,
        "null_label": config.diffusion.null_label,
        "model": config.model.model_dump(mode="json", exclude={"use_checkpoint"}),
        "scale_factor": config.autoencoder.scale_factor if config.autoencoder else None,
    }
    return _digest(protocol)


def directory_of(config: Config, step: int, identity: Sequence[str]) -> Path:
    """Where all lies that is of one protocol and these weights. identity: of the networks, as ``Networks`` has it."""
    name = f"step-{step:08d}-{config.evaluate.weights}-{_digest([protocol_of(config), *identity])}"
    return Path(config.run_dir, "evaluation", name)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


class Point:
    """One worker's view of an evaluation under one configuration. ``close`` gives back what it holds."""

    def __init__(
        self,
        config: Config,
        networks: Networks,
        publish: Callable[[dict[str, Any], Config], dict[str, Any]] = lambda record, config: record,
    ) -> None:
        """publish: called with a new record of scores by the worker that made it, before others see it; what it returns
        is the record."""
        self.config, self._networks, self._publish = config, networks, publish
        self._protocol = protocol_of(config)
        own = config.evaluate
        self.directory = directory_of(config, networks.step, networks.identity)
        self.chunks = chunk_names(own.samples, own.chunk_size)
        self._reference = hash_of_reference(config)
        self._scored_by = _digest([self._reference, own.model_dump(mode="json", include=set(SCORED_BY)), own.samples])
        self._sampler = Sampler(config, networks.net, networks.decoder, networks.empty)
        self._conditions = ImageConditions(config, networks.index)
        self._started = time.time()
        beside = [SHARD] if own.save_samples else []
        self._work = SharedWork(str(self.directory / "chunks"), self.chunks, own.lease_s, beside)
        self._done = 0

    def close(self) -> None:
        """Give back what this worker holds."""
        self._work.close()

    # -- images --------------------------------------------------------------------------------------------------------

    def do_chunks(self, tell: Callable[[int], None] = lambda done: None) -> None:
        """Do chunks until all are done or in other hands. tell: takes the number that are done, by all.

        Raises ``KeyboardInterrupt`` between two sub-batches where the job was asked to stop.
        """
        if self._finished():
            return
        self._check_inputs()
        while (chunk := self._work.claim()) is not None:
            tell(len(self.chunks) - len(self._work.missing()))
            self._work.put(chunk, self._made(chunk))
            self._done += 1
            watchdog.progress(watchdog.WORKING, self._done)
        tell(len(self.chunks) - len(self._work.missing()))

    def _check_inputs(self) -> None:
        """Have one worker, for all, read what is expensive to check, before any work is spent on it."""
        mark = self._work.path(f"inputs-{self._scored_by}", ".checked")

        def check() -> bool:
            read_reference(self.config, self._networks.feature_network)
            choose_weights(self.config)
            return storage.create(mark, b"{}")

        self._work.once("inputs", lambda: storage.exists(mark) or None, check)

    def _made(self, chunk: str) -> Result:
        """The images of a chunk in sub-batches of the fixed size, the last one padded: their features by kind, their
        labels and, of the first ids, the images."""
        protocol, device = self.config.evaluate, self._networks.device
        first = self.chunks.index(chunk) * protocol.chunk_size
        last = min(first + protocol.chunk_size, protocol.samples)
        parts: dict[str, list[Tensor]] = {}
        captions: list[str] = []
        for begin in range(first, last, protocol.sub_batch_size):
            stopping.check()
            ids = torch.arange(begin, begin + protocol.sub_batch_size, device=device)  # ids beyond the last: padding
            condition = self._conditions.of(ids)
            texts = self._conditions.texts(ids) if self._wants_texts else None
            batch = self._sampler.generate(ids, condition, protocol.seed)
            found = {
                **self._networks.extract(batch, texts), LABELS: labels_of(condition, len(ids)), IMAGES: batch
            }  # fmt: skip
            for kind, values in found.items():
                parts.setdefault(kind, []).append(values[: last - begin].cpu())
            captions += (texts or [])[: last - begin]
        arrays = {kind: torch.cat(several).numpy() for kind, several in parts.items()}
        if protocol.save_samples:
            path = self._work.path(chunk, SHARD)
            write_image_shard(path, range(first, last), arrays[IMAGES], arrays[LABELS], captions)
        shown = max(0, min(last, protocol.grid_rows * GRID_COLUMNS) - first)
        return {**arrays, IMAGES: arrays[IMAGES][:shown]}

    @property
    def _wants_texts(self) -> bool:
        return self.config.evaluate.save_samples or "clip_score" in self.config.evaluate.asked

    # -- scores --------------------------------------------------------------------------------------------------------

    def scores(self) -> dict[str, Any]:
        """The scores, once all chunks are done: one worker makes them, all wait for them and get them.

        Raises what scoring raises, and ``KeyboardInterrupt`` as ``do_chunks``.
        """
        while not self._finished() and self._work.missing():
            stopping.check()
            self.do_chunks()  # of a worker that died
            if self._work.missing():
                self._work.wait()
        return self._work.once(f"scores-{self.config.evaluate.samples}", self.scored, self._score)

    def _finished(self) -> bool:
        """Whether nothing is left to do: scored, and, where images are to be kept, all of them there."""
        return self.scored() is not None and not (self.config.evaluate.save_samples and self._work.missing())

    @property
    def _file(self) -> Path:
        return self.directory / f"scores-{self.config.evaluate.samples}.json"

    def scored(self) -> dict[str, Any] | None:
        """The scores, if they are there, and of the reference as it is now."""
        if not self._file.exists():
            return None
        record: dict[str, Any] = json.loads(self._file.read_text())
        return record if record.get("scored_by") == self._scored_by else None

    def _score(self) -> dict[str, Any]:
        config, weights = self.config, self._networks.weights
        networks, kinds = self._networks, needed(config.evaluate.features, config.evaluate.asked)
        reference = read_reference(config, networks.feature_network)
        with spooled(self._work, [*kinds, LABELS], config.evaluate.samples) as spool:
            scores = score(spool, reference, config, networks.extract, networks.device)
        grid = self.directory / "grid.png"
        images = self._first_images()
        storage.write_bytes(str(grid), png(torch.from_numpy(images), GRID_COLUMNS))
        record = {
            **scores,
            "samples": config.evaluate.samples,
            "weights": config.evaluate.weights,
            "step": self._networks.step,
            "checkpoint": weights.origin if weights else None,
            "of_run": weights is not None and _is_within(weights.origin, config.run_dir),
            "cfg_scale": config.sample.cfg_scale,
            "solver": config.sample.solver,
            "solver_steps": config.sample.steps,
            "sample_precision": config.sample.precision,
            "seed": config.evaluate.seed,
            "labels": self._asked_for(),
            "sub_batch_size": config.evaluate.sub_batch_size,
            "reference": config.evaluate.reference,
            "reference_sha256": self._reference,
            "protocol": self._protocol,
            "scored_by": self._scored_by,
            "seconds": round(time.time() - self._started, 2),
            "grid": str(grid),
        }
        record = self._publish(record, config)
        storage.write_bytes(str(self._file), json.dumps(record, indent=1).encode())
        return record

    def _asked_for(self) -> str:
        """What the images were asked for."""
        model, evaluate = self.config.model, self.config.evaluate
        if model.clip_dim is not None:
            return f"captions of {evaluate.captions}"
        return f"classes, {evaluate.labels}" if model.num_classes > 0 else "nothing: unconditional"

    def _first_images(self) -> NDArray[np.uint8]:
        """(n, 3, H, W) uint8, n = grid_rows * GRID_COLUMNS if there are as many."""
        wanted, found, parts = self.config.evaluate.grid_rows * GRID_COLUMNS, 0, []
        for result in self._work.results():
            parts.append(result[IMAGES])
            found += len(result[IMAGES])
            if found >= wanted:
                break
        return np.concatenate(parts)[:wanted]


def _is_within(path: str, directory: str) -> bool:
    return Path(directory).resolve() in Path(path).resolve().parents


def png(images: Tensor, columns: int) -> bytes:
    """Images (N, 3, H, W) uint8 as one picture, so many in a row, with grey gaps."""
    grid = make_grid(images, nrow=columns, padding=2, pad_value=96)
    out = io.BytesIO()
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(out, "PNG")
    return out.getvalue()


def all_done(points: Iterable[Point], progress: Callable[[int], None]) -> list[dict[str, Any]]:
    """The scores of all points. The chunks of all are done before any point is waited for: no worker is idle."""
    points = list(points)
    done = [0] * len(points)
    for number, point in enumerate(points):

        def tell(count: int, number: int = number) -> None:
            done[number] = count
            progress(sum(done))

        point.do_chunks(tell)
    return [point.scores() for point in points]
