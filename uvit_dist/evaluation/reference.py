"""The statistics of real images that samples are scored against."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from uvit_dist import storage
from uvit_dist.config import Config
from uvit_dist.errors import DataError, MissingInputError

log = logging.getLogger(__name__)
OFFICIAL_STATISTICS = (
    "the published FIDs are against the official files, in the folder fid_stats of the downloads that the README of "
    "github.com/baofff/U-ViT links to; for a reference of your own, not comparable with those, "
)


def bytes_of_reference(config: Config) -> bytes:
    """The file of evaluate.reference as it is. Raises ``MissingInputError``, with where to get it."""
    path = config.evaluate.reference
    if not storage.exists(path):
        official = OFFICIAL_STATISTICS if Path(path).name.startswith("fid_stats_") else ""
        raise MissingInputError(
            f"evaluate.reference {path}: no such file; {official}make it: "
            "python -m data_tools.fid_reference --config YOUR_CONFIG.yaml"
        )
    return storage.read_bytes(path)


def hash_of_reference(config: Config) -> str:
    """SHA-256 (hex) of the file. Raises ``MissingInputError``."""
    return hashlib.sha256(bytes_of_reference(config)).hexdigest()


def read_reference(config: Config) -> dict[str, Any]:
    """Statistics of the real images: a file of ours, or an official one of ``mu`` and ``sigma`` of Inception features.

    Raises ``MissingInputError``, ``DataError`` where they are of another kind.
    """
    path, content = config.evaluate.reference, bytes_of_reference(config)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            reference = dict(archive)
        mu, sigma = reference["mu"], reference["sigma"]
        made = json.loads(str(reference["provenance"])) if "provenance" in reference else None
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"evaluate.reference {path}: not a reference made by data_tools.fid_reference ({error})"
        ) from None
    if made is None:
        if config.evaluate.features != "inception" or mu.shape != (2048,) or sigma.shape != (2048, 2048):
            raise DataError(
                f"evaluate.reference {path}: mu {mu.shape}, sigma {sigma.shape} without provenance: official files "
                f"hold 2048 Inception features, evaluate.features is {config.evaluate.features}; make it anew"
            )
        log.warning("evaluate.reference %s says nothing of its images; resolution and crop are not checked", path)
        return reference
    ours = {
        "features": config.evaluate.features,
        "image_size": config.data.image_size,
        "crop": config.data.crop,
        "neighbours": config.evaluate.neighbours,
    }
    wrong = [
        f"{key}: the configuration says {value}, the reference {made.get(key)}"
        for key, value in ours.items()
        if made.get(key) != value
    ]
    if wrong:
        raise DataError(f"evaluate.reference {path} does not fit:\n  " + "\n  ".join(wrong) + "\nMake it again.")
    return reference
