"""The files that a configuration names: there, whole, with their hashes; and how its server is reached."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable, Iterator
from functools import partial

from uvit_dist import storage
from uvit_dist.config import Config
from uvit_dist.doctor.finding import Finding, of_error, ok, problem, warning
from uvit_dist.errors import MissingInputError, UserError
from uvit_dist.evaluation import reference

WEIGHTS, REFERENCES, SERVER = "weights", "references", "S3"
Check = Callable[[], Finding]


def weights_and_references(config: Config) -> Iterator[tuple[str, Check]]:
    """(key, what looks at it) of every file of weights or statistics that the configuration names."""
    auto, text, scores = config.autoencoder, config.text, config.evaluate
    if auto is not None:
        if auto.encoder_fingerprint is None:
            yield _weights("autoencoder.encoder", auto.encoder, auto.encoder_sha256, "autoencoder")
        yield _weights("autoencoder.decoder", auto.decoder, auto.decoder_sha256, "autoencoder")
    if text is not None:
        yield _weights("text.encoder", text.encoder, text.encoder_sha256, "text", text.tower)
    if scores.features == "inception":
        yield _weights("evaluate.inception", scores.inception, scores.inception_sha256, "inception")
    if scores.clip is not None:
        yield _weights("evaluate.clip", scores.clip, scores.clip_sha256, "clip", scores.clip_model)
    for key, path in reference.paths(config).items():
        yield key, partial(check_reference, key, path)


def _weights(key: str, path: str | None, sha256: str | None, module: str, name: str | None = None) -> tuple[str, Check]:
    return key, partial(check_weights, key, path, sha256, module, name)


def remedy_of(module: str, name: str | None = None) -> str:
    """Where the weights of ``uvit_dist.models.MODULE`` come from, in its own words. name: of open_clip's model."""
    found = importlib.import_module(f"uvit_dist.models.{module}")
    if module == "clip":
        return str(found.remedy(name))
    if module == "text" and name is not None:
        return str(found.tower_remedy(name))
    return str(found.REMEDY)


def check_weights(key: str, path: str | None, sha256: str | None, module: str, name: str | None = None) -> Finding:
    """A file (or folder) of weights, hashed. module: of ``uvit_dist.models``, that reads it. Fetches nothing."""
    if path is None:
        return problem(WEIGHTS, key, "not set", remedy_of(module, name))
    if storage.is_remote(path):
        if sha256 is None:
            return problem(WEIGHTS, key, f"{path}: a URL needs the file's hash", f"set {key}_sha256")
        if not os.path.exists(storage.kept_weights(path, sha256)):
            told = f"{path}: not fetched yet; it will be, when it is needed first"
            return warning(WEIGHTS, key, told, "fetch it on a machine with access, where the nodes have none")
    try:
        local = storage.local_weights(path, sha256, key, "" if os.path.exists(path) else remedy_of(module, name))
        return ok(WEIGHTS, key, f"{path}: {described(local)}")
    except UserError as error:
        return of_error(WEIGHTS, key, error)


def check_reference(key: str, path: str) -> Finding:
    """A file of statistics, hashed."""
    try:
        reference.require_there(key, path)
        return ok(REFERENCES, key, f"{path}: {'remote' if storage.is_remote(path) else described(path)}")
    except MissingInputError as error:
        return of_error(REFERENCES, key, error)


def described(path: str) -> str:
    """Size and sha256 of a file; of a folder, how many files it has."""
    if os.path.isdir(path):
        names = sorted(os.listdir(path))
        return f"a folder with {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{os.path.getsize(path) / 1e6:,.1f} MB, sha256 {digest[:16]}…"


def data_paths(config: Config) -> list[str]:
    """The paths and URLs of samples, the index first."""
    held_out = config.validation.index if config.validation is not None else None
    return [path for path in (config.data.index, held_out, config.checkpoint.copy_to) if path is not None]


def credentials(config: Config, url: str) -> Finding:
    """Where the credentials come from, never what they are, and the server that gets them. url: one that is read."""
    try:
        source, endpoint = storage.access(url)
    except UserError as error:
        return of_error(SERVER, "credentials", error)
    if config.storage.anonymous:
        return ok(SERVER, "credentials", f"none are sent to {endpoint} (storage.anonymous)")
    return ok(SERVER, "credentials", f"from {source}, for {endpoint}")
