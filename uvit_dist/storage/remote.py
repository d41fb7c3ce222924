"""What is behind URLs: ranged reads of S3 by obstore, all else by fsspec and s3fs, under one policy of retries.

obstore reads at the speed of the link where s3fs does not (benchmarks/README.md, C2). Its own retries are off: the ones
here go on at the byte where the last try broke off, are counted, and end with an error that says what to do.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import botocore.session
import fsspec
import obstore
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from obstore.exceptions import AlreadyExistsError, PermissionDeniedError, UnauthenticatedError
from obstore.exceptions import BaseError as ObstoreError
from obstore.store import S3Store
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from uvit_dist.config_data import StorageConfig
from uvit_dist.errors import ConfigError, MissingInputError, UnavailableError, UserError

T = TypeVar("T")
log = logging.getLogger(__name__)
CHUNK = 1 << 18
"""Bytes of a body that are handed on at once; what has arrived is not asked for again."""

GIVE_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, storage.profile, or storage.anonymous true for a public bucket"
)
_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
_BEYOND_THE_END = 416
_PERMANENT = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


@dataclass
class Counts:
    """What this process has read from URLs so far. bytes: received; the others: numbers of events."""

    requests: int = 0
    bytes: int = 0
    retries: int = 0
    cache_hits: int = 0
    cache_misses: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, **amounts: int) -> None:
        """Add to some of the counts; safe from several threads."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def snapshot(self) -> Counts:
        """A copy of the counts as they are."""
        with self._lock:
            return Counts(*astuple(self))


COUNTS = Counts()
_settings = StorageConfig()
_clients: dict[tuple[Any, ...], Any] = {}
_clients_lock, _creating = threading.Lock(), threading.Lock()


def configure(settings: StorageConfig) -> None:
    """Set how this process reaches servers, and its cache."""
    global _settings
    _settings = settings
    with _clients_lock:
        _clients.clear()


def settings() -> StorageConfig:
    """How this process reaches servers."""
    return _settings


def _client(make: Callable[..., T], *key: str) -> T:
    """One client for each process: none survives a fork."""
    name = (os.getpid(), make.__name__, *key)
    with _clients_lock:
        if name not in _clients:
            _clients[name] = make(*key)
        return _clients[name]


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the key in it."""
    if path.startswith("s3://"):
        return _client(_s3_filesystem), path.removeprefix("s3://")
    return fsspec.core.url_to_fs(path, use_listings_cache=False)


def _s3_filesystem() -> Any:
    options: dict[str, Any] = {"profile": _settings.profile} if _settings.profile else {}
    if _settings.region:
        options["client_kwargs"] = {"region_name": _settings.region}
    return fsspec.filesystem(
        "s3",
        anon=_settings.anonymous,
        endpoint_url=_settings.endpoint,
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={"read_timeout": _settings.stall_s, "connect_timeout": 10, "retries": {"max_attempts": 1}},
        **options,
    )


def _s3_store(bucket: str) -> S3Store:
    """obstore's client of a bucket, with the endpoint, region and credentials that botocore finds, as s3fs does."""
    session, endpoint, region_name = _session()

    def credentials() -> Any:
        given = session.get_credentials()
        if given is None:
            raise ValueError("no AWS credentials")
        frozen = given.get_frozen_credentials()
        expires = getattr(given, "_expiry_time", None)
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": expires,
        }

    if not _settings.anonymous and session.get_credentials() is None:
        raise _no_credentials(bucket)
    amazon = endpoint.rstrip("/").endswith(".amazonaws.com")
    server: dict[str, Any] = {} if amazon else {"endpoint": endpoint}
    return S3Store(
        bucket,
        region=region_name if region_name not in (None, "aws-global") else "us-east-1",
        virtual_hosted_style_request=amazon,
        client_options={
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=10),
            "read_timeout": timedelta(seconds=_settings.stall_s),
            "timeout": timedelta(seconds=10 * _settings.stall_s),  # of one request, which then goes on at its byte
        },
        retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=1)},
        **server,
        **({"skip_signature": True} if _settings.anonymous else {"credential_provider": credentials}),
    )


def access(path: str) -> tuple[str | None, str]:
    """How an s3:// URL would be reached: what the credentials come from, as env or shared-credentials-file, and the
    server's URL. No request is made, but to a cloud's own service of credentials.

    Raises ``ConfigError``; ``MissingInputError`` where there are no credentials.
    """
    session, endpoint, _ = _session()
    if _settings.anonymous:
        return None, endpoint
    given = session.get_credentials()
    if given is None:
        raise _no_credentials(path.removeprefix("s3://").partition("/")[0])
    return given.method, endpoint


def _session() -> tuple[Any, str, str]:
    """botocore's session, with the server's URL and the region that it finds. Raises ``ConfigError``."""
    try:
        session = botocore.session.Session(profile=_settings.profile)
        found = session.create_client("s3", region_name=_settings.region, endpoint_url=_settings.endpoint).meta
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(f"storage: {error}; correct storage.profile, storage.endpoint or the AWS variables") from None
    return session, found.endpoint_url, found.region_name


def _no_credentials(bucket: str) -> MissingInputError:
    return MissingInputError(f"s3://{bucket}: no AWS credentials; {GIVE_CREDENTIALS}")


class Progress:
    """When the last byte moved."""

    def __init__(self) -> None:
        self.at = time.monotonic()

    def moved(self) -> None:
        """Some byte did now."""
        self.at = time.monotonic()

    def stuck(self, state: RetryCallState) -> bool:
        """Whether nothing has come for ``storage.retry_s``."""
        return time.monotonic() - self.at > _settings.retry_s


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error, if there is one."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    found = re.search(r"status[: ]+(\d{3})", str(error)) if isinstance(error, ObstoreError) else None
    return int(found[1]) if found else None


class ShortBodyError(OSError):
    """A server sent less than it was asked for, and called it complete."""


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, (*_PERMANENT, PermissionDeniedError, UnauthenticatedError)):
        return False
    status = _status(error)
    if status is not None and status not in _TRANSIENT_STATUS:
        return status in (200, 206)  # the answer was right, its body broke off
    if "redirect" in str(error).lower():  # another region's bucket
        return False
    kinds = (OSError, ObstoreError, asyncio.TimeoutError, HTTPClientError, BotoConnectionError, ClientError)
    return isinstance(error, kinds) or type(error).__module__.startswith("aiohttp.")


def persistently(path: str, action: Callable[[Progress], T]) -> T:
    """action(progress), again after faults that pass, with growing, random pauses, until nothing moves any more.

    Raises ``UnavailableError`` when nothing came for storage.retry_s seconds, ``MissingInputError`` for what no retry
    mends (refused credentials, another region), ``FileNotFoundError``.
    """
    progress = Progress()

    def note(state: RetryCallState) -> None:
        COUNTS.add(retries=1)
        error = state.outcome.exception() if state.outcome else None
        log.info("%s: %s; trying again", path, _brief(error))

    try:
        for attempt in Retrying(
            retry=retry_if_exception(_is_transient),
            wait=wait_random_exponential(multiplier=0.1, max=15),
            stop=progress.stuck,
            before_sleep=note,
            reraise=True,
        ):
            with attempt:
                return action(progress)
    except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, ProfileNotFound) as error:
        raise MissingInputError(f"{path}: no AWS credentials ({_brief(error)}); {GIVE_CREDENTIALS}") from None
    except (PermissionError, PermissionDeniedError, UnauthenticatedError) as error:
        raise MissingInputError(
            f"{path}: the server refuses access ({_brief(error)}); correct the credentials, storage.profile or "
            "storage.endpoint"
        ) from None
    except (UserError, FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        if _status(error) == _BEYOND_THE_END:
            raise
        if not _is_transient(error):
            where = f"storage.endpoint {_settings.endpoint or 'unset'}, storage.region {_settings.region or 'unset'}"
            raise MissingInputError(f"{path}: cannot be had ({_brief(error)}); correct the URL, or {where}") from None
        raise UnavailableError(
            f"{path}: nothing came for {_settings.retry_s:g} seconds of retries (last: {_brief(error)}); see to the "
            "network and storage.endpoint, or raise storage.retry_s, and start again: nothing is lost"
        ) from None
    raise AssertionError("tenacity returns or raises")


def without_secrets(text: str) -> str:
    """A text to be shown to others: of its URLs neither user and password nor what follows the question mark.

    That may be a signature, as presigned URLs have it.
    """
    text = re.sub(r"(\w://)[^\s/?@\"']+@", r"\1…@", text)
    return re.sub(r"(\w://[^\s?\"']+)\?[^\s\"'),;]*", r"\1?…", text)


def _brief(error: BaseException | None) -> str:
    """The first lines of an error, without what follows a question mark: it may be a signature."""
    lines = [line.strip() for line in without_secrets(str(error)).splitlines() if line.strip()]
    return f"{type(error).__name__}: {re.sub(r'[?][^ ]*', '?…', ' '.join(lines[:3]))[:300]}"


def create(path: str, data: bytes) -> bool:
    """Put an object if there is none of that name, by a conditional request. True.

    Behind other URLs than s3:// only the threads of this process exclude each other.

    Raises ``FileExistsError``, ``OSError``, and what obstore raises.
    """
    if not path.startswith("s3://"):
        other, key = filesystem(path)
        with _creating:  # these look first, and write then
            other.makedirs(key.rsplit("/", 1)[0], exist_ok=True)
            other.pipe_file(key, data, mode="create")
        return True
    bucket, _, key = path.removeprefix("s3://").partition("/")
    try:
        obstore.put(_client(_s3_store, bucket), key, data, mode="create")
    except AlreadyExistsError:
        raise FileExistsError(path) from None
    return True


def read_into(path: str, offset: int, view: memoryview) -> int:
    """Fill ``view`` (flat bytes) from ``offset`` of an object. Returns how much there was: less only at its end.

    Raises ``FileNotFoundError``, ``UnavailableError``, ``MissingInputError``.
    """
    got = 0

    def more(progress: Progress) -> None:
        nonlocal got
        start, end = offset + got, offset + len(view)
        COUNTS.add(requests=1)
        if path.startswith("s3://"):
            bucket, _, key = path.removeprefix("s3://").partition("/")
            chunks: Any = obstore.get(_client(_s3_store, bucket), key, options={"range": (start, end)}).stream(CHUNK)
        else:
            remote, key = filesystem(path)
            chunks = [remote.cat_file(key, start=start, end=end)]
        before = got
        for chunk in chunks:
            piece = memoryview(chunk).cast("B")[: len(view) - got]
            view[got : got + len(piece)] = piece
            got += len(piece)
            progress.moved()
            COUNTS.add(bytes=len(piece))
        if got < len(view) and path.startswith("s3://"):
            raise ShortBodyError(f"{got - before} of {end - start} bytes came")

    if len(view):
        try:
            persistently(path, more)
        except ObstoreError as error:
            if _status(error) != _BEYOND_THE_END:
                raise
    return got
