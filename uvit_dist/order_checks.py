"""What must hold before a job is submitted: a mistake costs no place in the queue."""

from __future__ import annotations

import logging
from pathlib import Path

from uvit_dist import storage
from uvit_dist.config import Config
from uvit_dist.config_yaml import shipped
from uvit_dist.errors import DataError, MissingInputError, OutputError, UnavailableError

log = logging.getLogger(__name__)


def check(config: Config, job: str) -> list[str]:
    """Look at run_dir and at every input of a job that this machine can reach. Returns what could not be checked.

    Raises ``UserError`` of the right kind.
    """
    storage.configure(config.storage)
    unknown = []
    for key, path in inputs(config, job):
        try:
            if key in ("data.index", "validation.index"):
                _check_index(config, key, path)
            else:
                _require_there(key, path)
        except UnavailableError as error:
            unknown.append(f"{key} {path} was not checked: {error}")
    _require_writable(config.run_dir)
    return unknown


def inputs(config: Config, job: str) -> list[tuple[str, str]]:
    """What a job reads, (key, path or URL): of weights the paths alone, for URLs are fetched where they are needed."""
    auto, scores, data = config.autoencoder, config.evaluate, config.data
    found: list[tuple[str, str | None]]
    if job == "train":
        encoder = auto.encoder if auto is not None and auto.encoder_fingerprint is None else None
        held_out = config.validation.index if config.validation is not None else None
        found = [("data.index", data.index), ("validation.index", held_out), ("autoencoder.encoder", encoder)]
        found += [("train.init_from", config.train.init_from)]
    elif job == "evaluate":
        found = [("evaluate.reference", scores.reference), ("autoencoder.decoder", auto.decoder if auto else None)]
        found += [("evaluate.inception", scores.inception if scores.features == "inception" else None)]
        found += [("evaluate.captions", scores.captions), ("evaluate.checkpoint", scores.checkpoint)]
        found += [("evaluate.adm_reference", scores.adm_reference), ("evaluate.clip", scores.clip)]
    else:
        found = [("data.source", data.source), ("data.captions", data.captions)]
        if job == "precompute":
            text = config.text.encoder if config.text is not None else None
            found += [("autoencoder.encoder", auto.encoder if auto else None), ("text.encoder", text)]
        else:
            found += [("evaluate.inception", scores.inception if scores.features == "inception" else None)]
    web = ("http://", "https://")
    return [(key, path) for key, path in found if path is not None and not path.startswith(web)]


def _require_there(key: str, path: str) -> None:
    if not storage.is_remote(path):
        if not shipped(path, "data_tools").exists():
            raise MissingInputError(f"{key} {path}: not there; nothing was submitted. Make it, or correct the path")
    elif key != "data.source":  # a prefix, which only a listing can tell
        storage.size(path)


def _check_index(config: Config, key: str, path: str) -> None:
    from uvit_dist.data.shards import read_index  # seconds, which the other jobs need not wait
    from uvit_dist.preflight import HELD_OUT_REMEDY, contradictions

    index = read_index(path, key, HELD_OUT_REMEDY) if key == "validation.index" else read_index(path, key)
    wrong = contradictions(config, index.provenance)
    if wrong:
        raise DataError(
            f"{key} {path} does not hold what the configuration describes:\n  "
            + "\n  ".join(wrong)
            + "\nCorrect the configuration, or make the shards again with the commands in docs/shards.md."
        )


def _require_writable(run_dir: str) -> None:
    probe = storage.join(run_dir, ".writable")
    try:
        storage.make_directory(run_dir)
        storage.write_bytes(probe, b"")
        Path(probe).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"run_dir {run_dir}: {error.strerror or error}; mend its permissions or use another"
        ) from None
