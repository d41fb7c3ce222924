"""Keys of samples, made of the names of their images."""

from __future__ import annotations

from collections.abc import Callable

from uvit_dist.data.latents import MIRROR_SUFFIX
from uvit_dist.errors import DataError


def as_key(stem: str) -> str:
    """A name without its suffix as a key: without dots, for a webdataset's keys end at the first one."""
    return stem.replace(".", "_")


def require_unique(keys: list[str], origin: Callable[[int], str]) -> None:
    """Raises ``DataError`` where two keys would be the same, mirror images considered. origin: number → its path."""
    seen: dict[str, int] = {}
    for number, key in enumerate(keys):
        other = seen.setdefault(key.removesuffix(MIRROR_SUFFIX), number)
        if other != number:
            raise DataError(
                f"{origin(other)} and {origin(number)}: their keys would be the same ({key}); rename one of them"
            )
