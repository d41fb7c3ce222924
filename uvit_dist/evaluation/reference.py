"""The statistics of real images that samples are scored against: files of ours, official ones, ADM's batches."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from uvit_dist import storage
from uvit_dist.config import Config
from uvit_dist.errors import DataError, MissingInputError
from uvit_dist.fid import Matrix
from uvit_dist.models.features import Extractor
from uvit_dist.scores.kinds import (
    ADM_POOL,
    ADM_SPATIAL,
    COMPARED,
    FRECHET,
    OF_INCEPTION,
    OF_PIXELS,
    PIXELS,
    POOL,
    REFERENCE_KEYS,
    WIDTHS,
    needed,
)

log = logging.getLogger(__name__)
OFFICIAL_STATISTICS = (
    "the published FIDs are against the official files (about 34 MB each), in the folder fid_stats of the downloads "
    "that the README of github.com/baofff/U-ViT links to; for a reference of your own, not comparable with those, "
)
ADM_BATCHES = (
    "ADM's reference batches, VIRTUAL_imagenet256_labeled.npz (about 2 GB) and its like, are listed in evaluations/"
    "README.md of github.com/openai/guided-diffusion; for a reference of your own, "
)
MAKE = "make it: python -m data_tools.fid_reference --config YOUR_CONFIG.yaml"
KEYS_OF_ADM = {ADM_POOL: ("mu", "sigma"), ADM_SPATIAL: ("mu_s", "sigma_s")}
"""Kind → names of mean and covariance in a file of ADM's."""


@dataclass(frozen=True)
class Reference:
    """What samples are scored against.

    moments: kind → mean (D,) and covariance (D, D), float64; features: kind → (n, D); labels: (n,) of those; halves:
    scores of one half of the real images against the other; batch: a file of ADM's with the images themselves.
    """

    moments: dict[str, tuple[Matrix, Matrix]]
    features: dict[str, NDArray[Any]] = field(default_factory=dict)
    labels: NDArray[Any] | None = None
    halves: dict[str, float] = field(default_factory=dict)
    batch: str | None = None

    @property
    def lacks(self) -> set[str]:
        """Scores that compare samples and cannot be made of what is here."""
        if not self.features and self.batch is None:
            return set(COMPARED)
        return {"class_accuracy"} if self.labels is None else set()

    def features_of(
        self, kind: str, most: int, extract: Extractor, device: torch.device, sub_batch: int
    ) -> NDArray[Any]:
        """(n, D), of at most so many real images; of ADM's batch, extracted now."""
        if kind in self.features:
            return self.features[kind][:most]
        assert self.batch is not None
        parts = [
            extract(torch.from_numpy(images).permute(0, 3, 1, 2).to(device))[kind].cpu().numpy()
            for images in images_of_batch(self.batch, most, sub_batch)
        ]
        return np.concatenate(parts)


def paths(config: Config) -> dict[str, str]:
    """Setting → file, of the references that the scores asked for need."""
    evaluate = config.evaluate
    kinds = {kind for kind in needed(evaluate.features, evaluate.asked) if kind in REFERENCE_KEYS}
    of_adm = kinds & set(KEYS_OF_ADM) if evaluate.adm_reference is not None else set()
    out = {"evaluate.reference": evaluate.reference} if kinds - of_adm else {}
    if of_adm and evaluate.adm_reference is not None:
        out["evaluate.adm_reference"] = evaluate.adm_reference
    return out


def hash_of_reference(config: Config) -> str:
    """SHA-256 (hex) of the files. Raises ``MissingInputError``."""
    digest = hashlib.sha256()
    for key, path in paths(config).items():
        with _opened(key, path) as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_reference(config: Config, extractor: str) -> Reference:
    """What the scores asked for need. extractor: what identifies the weights of the feature network.

    Raises ``MissingInputError``; ``DataError`` where a file is of another kind, resolution, number of images or feature
    network, or has not what a score needs.
    """
    evaluate, out = config.evaluate, Reference({})
    for key, path in paths(config).items():
        read = _read(key, path, config, extractor)
        out = Reference(
            moments={**out.moments, **read.moments},
            features={**out.features, **read.features},
            labels=read.labels if out.labels is None else out.labels,
            halves={**out.halves, **read.halves},
            batch=read.batch or out.batch,
        )
    table = OF_INCEPTION if evaluate.features == "inception" else OF_PIXELS
    missing = [name for name in evaluate.asked if name in FRECHET and table[name] not in out.moments]
    if evaluate.scores is not None:
        missing += [name for name in evaluate.asked if name in out.lacks]
    if missing:
        raise DataError(
            f"evaluate.scores {', '.join(missing)}: {' and '.join(paths(config).values())} hold no statistics for them;"
            f" {ADM_BATCHES if evaluate.features == 'inception' else ''}{MAKE}"
        )
    return out


def require_there(key: str, path: str) -> None:
    """Raises ``MissingInputError``, with where to get it, where a file is neither there nor at its URL."""
    if not storage.exists(path):
        name = Path(path).name
        known = OFFICIAL_STATISTICS if name.startswith("fid_stats_") else ADM_BATCHES if "VIRTUAL" in name else ""
        raise MissingInputError(f"{key} {path}: no such file; {known}{MAKE}")


@contextmanager
def _opened(key: str, path: str) -> Iterator[io.BufferedReader | io.BytesIO]:
    """A file, local or at a URL. Raises ``MissingInputError``, with where to get it."""
    require_there(key, path)
    if storage.is_remote(path):
        yield io.BytesIO(storage.read_bytes(path))
        return
    with open(path, "rb") as file:
        yield file


def _read(key: str, path: str, config: Config, extractor: str) -> Reference:
    try:
        with _opened(key, path) as file, np.load(file, allow_pickle=False) as archive:
            names = set(archive.files)
            if "provenance" in names:
                made = json.loads(str(archive["provenance"]))
                _check_provenance(key, path, made, config, extractor)
                return _ours({name: archive[name] for name in names}, config.evaluate.features)
            if "mu_s" in names:
                return _of_adm(key, path, {name: archive[name] for name in names - {"arr_0", "arr_1"}}, config)
            reference = Reference({POOL: (archive["mu"], archive["sigma"])})
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError | MissingInputError):
            raise
        raise DataError(f"{key} {path}: not a reference made by data_tools.fid_reference ({error}); {MAKE}") from None
    _check_shapes(key, path, reference, config)
    log.warning("%s %s says nothing of its images; resolution, number and crop are not checked", key, path)
    return reference


def _ours(arrays: dict[str, NDArray[Any]], space: str) -> Reference:
    moments, features = {}, {}
    for kind in (POOL, ADM_POOL, ADM_SPATIAL) if space == "inception" else (PIXELS,):
        mean, covariance, kept = REFERENCE_KEYS[kind]
        if mean in arrays:
            moments[kind] = arrays[mean], arrays[covariance]
        if kept in arrays:
            features[kind] = arrays[kept]
    halves = {name.removesuffix("_halves"): float(arrays[name]) for name in arrays if name.endswith("_halves")}
    return Reference(moments, features, arrays.get("labels"), halves)


def _of_adm(key: str, path: str, arrays: dict[str, NDArray[Any]], config: Config) -> Reference:
    moments = {kind: (arrays[mu], arrays[sigma]) for kind, (mu, sigma) in KEYS_OF_ADM.items()}
    size, ours = shape_of_batch(path), config.data.image_size
    reference = Reference(moments, batch=path if size is not None else None)
    _check_shapes(key, path, reference, config)
    if size is not None and size[1:] != (ours, ours, 3):
        raise DataError(
            f"{key} {path}: images of {size[1]}x{size[2]}, and data.image_size is {ours}; give the batch of"
            f" {ours}x{ours} images"
        )
    return reference


def _check_shapes(key: str, path: str, reference: Reference, config: Config) -> None:
    for kind, (mu, sigma) in reference.moments.items():
        dim = WIDTHS[kind]
        if config.evaluate.features != "inception" or mu.shape != (dim,) or sigma.shape != (dim, dim):
            raise DataError(
                f"{key} {path}: mu {mu.shape}, sigma {sigma.shape} without provenance: official files hold {dim} "
                f"Inception features, evaluate.features is {config.evaluate.features}; make it anew"
            )


def _check_provenance(key: str, path: str, made: dict[str, Any], config: Config, extractor: str) -> None:
    evaluate, data = config.evaluate, config.data
    ours = {"features": evaluate.features, "image_size": data.image_size, "crop": data.crop, "extractor": extractor}
    if evaluate.features != "inception":
        ours["neighbours"] = evaluate.neighbours  # of its halves' scores
    if evaluate.reference_images is not None:
        ours["images"] = evaluate.reference_images
    wrong = [
        f"{name}: the configuration says {value}, the reference {made.get(name)}"
        for name, value in ours.items()
        if made.get(name) != value
    ]
    if wrong:
        raise DataError(f"{key} {path} does not fit:\n  " + "\n  ".join(wrong) + "\nMake it again.")


# -- ADM's batches of images -------------------------------------------------------------------------------------------


def shape_of_batch(path: str) -> tuple[int, ...] | None:
    """Shape (N, H, W, 3) of the images in a file of ADM's; none: only statistics. Raises ``DataError``."""
    with _opened("evaluate.adm_reference", path) as file, zipfile.ZipFile(file) as archive:
        if "arr_0.npy" not in archive.namelist():
            return None
        with archive.open("arr_0.npy") as member:
            return _header(member, path)


def images_of_batch(path: str, most: int, batch: int) -> Iterator[NDArray[np.uint8]]:
    """The first images of a file of ADM's, (batch, H, W, 3) uint8 at a time: the whole need not fit into memory."""
    with (
        _opened("evaluate.adm_reference", path) as file,
        zipfile.ZipFile(file) as archive,
        archive.open("arr_0.npy") as member,
    ):
        count, *shape = _header(member, path)
        for first in range(0, min(most, count), batch):
            number = min(batch, min(most, count) - first)
            content = member.read(number * math.prod(shape))
            yield np.frombuffer(content, dtype=np.uint8).reshape(number, *shape).copy()


def _header(member: IO[bytes], path: str) -> tuple[int, ...]:
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = read[np.lib.format.read_magic(member)](member)
    if dtype != np.uint8 or fortran or len(shape) != 4:
        raise DataError(
            f"{path}: arr_0 of shape {shape} and {dtype}: expected images (N, H, W, 3) uint8; download it again"
        )
    return tuple(shape)
