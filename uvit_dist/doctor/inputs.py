"""The files that a configuration names: there, whole, with their hashes; and how its server is reached."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial

from uvit_dist import storage
from uvit_dist.config import Config
from uvit_dist.doctor.finding import Finding, of_error, ok, problem, warning
from uvit_dist.errors import MissingInputError, UserError
from uvit_dist.evaluation import reference

WEIGHTS, REFERENCES, SERVER, DATA = "weights", "references", "S3", "data"
Check = Callable[[], Finding]


def named(config: Config) -> Iterator[tuple[str, Check]]:
    """(key, what looks at it) of every file of weights, statistics or originals that the configuration names."""
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
    for key, given in (("data.source", config.data.source), ("data.captions", config.data.captions)):
        if given is not None:
            yield key, partial(check_source, config, key, given)


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

    def look(path: str = path) -> str:
        remedy = "" if os.path.exists(path) else remedy_of(module, name)
        return f"{path}: {described(storage.local_weights(path, sha256, key, remedy))}"

    return _told(WEIGHTS, key, look)


def check_reference(key: str, path: str) -> Finding:
    """A file of statistics, hashed."""

    def look() -> str:
        reference.require_there(key, path)
        return f"{path}: {'remote' if storage.is_remote(path) else described(path)}"

    return _told(REFERENCES, key, look)


def check_source(config: Config, key: str, path: str) -> Finding:
    """What the shards are made from: a file, folder or URL. Once they are there, training needs it no more."""

    def look() -> str:
        _require_originals(key, path, config.data.index)
        return f"{path}: {'remote' if storage.is_remote(path) else described(path)}"

    found = _told(DATA, key, look)
    if found.level == "problem" and _told(DATA, key, lambda: str(storage.size(config.data.index))).level == "ok":
        return warning(DATA, key, found.told, f"{found.remedy}; to train on {config.data.index} it is not needed")
    return found


def _require_originals(key: str, path: str, index: str) -> None:
    if not storage.exists(path):
        raise MissingInputError(f"{key} {path}: not there; make it, or correct the path: {index} is made of it")


def _told(section: str, key: str, look: Callable[[], str]) -> Finding:
    """What ``look()`` says is well, or the problem that it met."""
    try:
        return ok(section, key, look())
    except UserError as error:
        return of_error(section, key, error)
    except OSError as error:
        remedy = "mend its permissions, or see to the disk"
        return problem(
            section, key, f"{error.filename}: {error.strerror or error}", remedy, MissingInputError.exit_code
        )


def described(path: str) -> str:
    """Size and sha256 of a file; of a folder, how many files it has."""
    if os.path.isdir(path):
        with os.scandir(path) as entries:  # of ImageNet there are a million
            names = sorted(entry.name for entry in itertools.islice(entries, 4))
        return f"a folder with {', '.join(names[:3]) or 'nothing in it'}{' …' if len(names) > 3 else ''}"
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
