"""What the frozen networks share: weights from local files, their fingerprint, and products in true fp32."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from uvit_dist.errors import DataError

StateDict = dict[str, torch.Tensor]

_SHOWN_KEYS = 4


@contextmanager
def true_fp32() -> Iterator[None]:
    """Convolutions and products in IEEE fp32 on GPUs, where cuDNN's default is TF32. Autocast is the caller's."""
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 (hex) of names (sorted), dtypes, shapes and bytes of tensors of any shape."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_state_dict(path: Path, what: str) -> StateDict:
    """Name → tensor (any shape, as stored) of a local .safetensors, or of a bare state dict that torch.save wrote.

    ``what`` names the network in errors. Raises ``DataError`` where the file holds something else.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise DataError(f"{what} {path}: not a whole safetensors file ({error}); copy it again") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition(". ")[0] or "it ends early"
        raise DataError(
            f"{what} {path}: not a file of plain tensors ({reason}); copy it again, or convert it to .safetensors"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        held = some_keys(loaded) if isinstance(loaded, dict) else f"a {type(loaded).__name__}"
        raise DataError(
            f"{what} {path}: holds {held}, and a bare state dict (key → tensor) is needed; save the state dict alone"
        )
    return loaded


def load_strictly(network: torch.nn.Module, weights: Mapping[str, torch.Tensor], label: str) -> None:
    """Put the weights (same names and shapes, floats as fp32) in place of the network's, which may be on meta.

    ``label`` begins the error. Raises ``DataError`` where names or shapes disagree.
    """
    floats = {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
    try:
        network.load_state_dict(floats, strict=True, assign=True)
    except RuntimeError as error:
        first = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise DataError(f"{label}: weights and architecture disagree ({first}); give the whole, right file") from error


def some_keys(keys: Iterable[str]) -> str:
    """A few of the keys, for an error."""
    listed = sorted(keys)
    more = f" and {len(listed) - _SHOWN_KEYS} more" if len(listed) > _SHOWN_KEYS else ""
    return f"keys {', '.join(listed[:_SHOWN_KEYS])}{more}" if listed else "no keys"
