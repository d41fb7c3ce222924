"""The weights of a network from wherever they lie: a run, one of its checkpoints, a safetensors file; and fine-tuning.

Fine-tuning may go to another resolution or another number of classes: ``adapt``.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import interpolate

from uvit_dist import checkpoint
from uvit_dist.config import Config
from uvit_dist.errors import CheckpointError, DataError, MissingInputError
from uvit_dist.models.uvit import WEIGHTS, UViT
from uvit_dist.safetensors_stream import bytes_of

Kind = Literal["ema", "master"]
LISTED = 8
"""Differences that an error lists before it only counts them."""

XXH3 = "xxh3"
"""Key of an exported file's metadata: the hash of each tensor's bytes."""
FROM_OFFICIAL = "python -m uvit_dist.convert from-official"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """The weights of one network and where they come from.

    tensors: fp32, by official key, in shape; config: the dumped Config that trained them, or {}; model: arguments of
    UViT; step: updates made; origin: path read; fingerprint: hash of the content; text_encoder: hash of the one whose
    contexts it was trained on, if known.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    model: dict[str, Any]
    step: int
    kind: str
    origin: str
    fingerprint: str
    text_encoder: str | None = None


def load_weights(path: str | Path, kind: Kind = "ema", verify: str = "hash") -> Weights:
    """Read weights.

    path: a run directory (its newest whole checkpoint), a step directory of one, or a safetensors file or a folder with
    one, as ``uvit_dist.export`` and ``uvit_dist.convert`` write them; verify: as ``checkpoint.verify`` of the
    configuration.

    Raises ``MissingInputError`` where there is nothing, ``CheckpointError`` where no checkpoint is whole, ``DataError``
    where a file holds something else, or weights of the other kind.
    """
    path = Path(path)
    if path.is_dir() and (path / WEIGHTS).is_file():
        path = path / WEIGHTS
    if path.is_file():
        return _from_file(path, kind)
    return _from_checkpoint(find_checkpoint(path, verify), kind)


def find_checkpoint(path: str | Path, verify: str = "hash") -> Path:
    """The step directory meant by a run directory (the newest whole one) or by a step directory itself, checked.

    Raises ``MissingInputError``, ``CheckpointError``, or ``DataError`` for a directory of the official code.
    """
    path = Path(path)
    if not path.is_dir():
        raise MissingInputError(f"{path}: no such file or directory; give a run directory, a checkpoint or an export")
    if (path / "nnet_ema.pth").exists():
        raise DataError(f"{path}: a checkpoint of the official code; convert it first: {FROM_OFFICIAL}")
    in_a_run = path.parent.name == "checkpoints" and path.name.startswith("step-")
    if in_a_run or (path / checkpoint.MANIFEST).exists():
        reason = checkpoint.defect(path, verify)
        if reason is not None:
            raise CheckpointError(f"{path}: not a whole checkpoint: {reason}; give another, or bring back a copy")
        return path
    found = checkpoint.newest_whole(str(path), verify)
    if found is None:
        raise MissingInputError(f"{path}: holds no checkpoint; train first, or give the path of an export")
    return found


def _from_checkpoint(directory: Path, kind: Kind) -> Weights:
    reader = checkpoint.CheckpointReader(directory)
    manifest = reader.manifest
    return Weights(
        tensors=reader.full(kind),
        config=manifest["config"],
        model={key: value for key, value in manifest["config"]["model"].items() if key != "use_checkpoint"},
        step=manifest["step"],
        kind=kind,
        origin=str(directory),
        fingerprint=fingerprint_of(manifest),
        text_encoder=manifest.get("text_encoder"),
    )


def fingerprint_of(manifest: Mapping[str, Any]) -> str:
    """The hash of a checkpoint's content."""
    return xxhash.xxh3_128_hexdigest(str(manifest["files"]).encode())


def _from_file(path: Path, kind: Kind) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            # copied: the tensors of safe_open lie in the mapped file, which somebody may replace
            tensors = {key: file.get_tensor(key).to(torch.float32, copy=True) for key in file.keys()}  # noqa: SIM118
        hashes = json.loads(told.get(XXH3, "{}"))
        weights = Weights(
            tensors=tensors,
            config=json.loads(told["config"]),
            model=json.loads(told["model"]),
            step=int(told["step"]),
            kind=told["kind"],
            origin=str(path),
            fingerprint=_hash_content(tensors, told),
            text_encoder=told.get("text_encoder"),
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        remedy = "make one with python -m uvit_dist.export"
        if _is_pickled(path):
            remedy = f"if it is of the official code, convert it first: {FROM_OFFICIAL}"
        raise DataError(f"{path}: no weights exported by uvit_dist ({error}); {remedy}") from None
    damaged = [
        key
        for key, expected in hashes.items()
        if key in tensors and xxhash.xxh3_128_hexdigest(bytes_of(tensors[key])) != expected
    ]
    if damaged or (hashes and hashes.keys() != tensors.keys()):
        what = f"{damaged[0]} differs from its hash" if damaged else "its tensors are not those that were exported"
        raise DataError(f"{path}: damaged: {what}; export or copy it again")
    if weights.kind != kind:
        raise DataError(
            f"{path}: holds {weights.kind!r} weights, {kind!r} are asked for; ask for these, or export those"
        )
    return weights


def _hash_content(tensors: Mapping[str, Tensor], told: Mapping[str, str]) -> str:
    """Not of the file's bytes: safetensors writes the metadata of the same weights in another order each time."""
    hasher = xxhash.xxh3_128(str(sorted(told.items())).encode())
    for key in sorted(tensors):
        hasher.update(f"{key} {tuple(tensors[key].shape)}".encode())
        hasher.update(bytes_of(tensors[key]))
    return hasher.hexdigest()


def _is_pickled(path: Path) -> bool:
    """Whether a file looks as torch.save writes it: a zip archive, or a bare pickle."""
    try:
        with open(path, "rb") as file:
            return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x04")
    except OSError:
        return False


def adapt(weights: Weights, net: UViT, null_label: int | None) -> dict[str, Tensor]:
    """What fine-tuning starts from: the weights, fitted to a network of another resolution or number of classes.

    The patches' part of ``pos_embed`` is resized (bicubic) to the network's grid. Where labels have another number, or
    one side alone has a null label, the rows of ``label_emb`` are those that the network was initialised with, but the
    null label's row, the last of both, is carried over. null_label: ``diffusion.null_label`` of the new configuration.
    Everything else is as it was. Returns fp32 tensors by key, in the network's shapes, for ``net.load_state_dict``.
    Raises ``DataError`` that lists what differs and cannot.
    """
    tensors, notes = dict(weights.tensors), []
    for key, adapted, note in (*_positions(weights, net), *_labels(weights, net, null_label)):
        tensors[key] = adapted
        notes.append(f"{weights.origin}: {key}: {note}")
    wrong = differences(tensors, {key: tuple(value.shape) for key, value in net.state_dict().items()})
    heads, ours = weights.model.get("num_heads", 12), net.mid_block.attn.num_heads
    if heads != ours:  # no shape tells
        wrong.append(f"model.num_heads: {heads} there, {ours} in this network")
    if wrong:
        raise DataError(
            f"{weights.origin}: this network cannot start from these weights:\n{listed(wrong)}\n"
            "model.img_size and model.num_classes may differ. Width, depth, heads, patch size, channels and kind of "
            f"condition cannot: set the model section as it was there, {json.dumps(weights.model)}, or train anew."
        )
    for line in notes:
        log.info("%s", line)
    return tensors


FREE_TO_CHANGE = {
    "use_checkpoint", "label_dropout",
    "encoder", "encoder_sha256", "encoder_fingerprint", "decoder", "decoder_sha256",
}  # fmt: skip
"""Of the sections model, diffusion and autoencoder: what sampling may have otherwise than the training."""


def check_trained_as(weights: Weights, config: Config) -> None:
    """Raises ``DataError`` where the weights were trained under another model, diffusion or scale factor."""
    ours = config.model_dump(mode="json")
    trained = {**weights.config, "model": weights.model}
    wrong = [
        f"{section}.{key}: trained with {(trained.get(section) or {}).get(key)}, the configuration says {value}"
        for section in ("model", "diffusion", "autoencoder")
        for key, value in (ours[section] or {}).items()
        if key not in FREE_TO_CHANGE and (trained.get(section) or {}).get(key) != value
    ]
    if wrong:
        raise DataError(
            f"{weights.origin} is not of this configuration:\n{listed(wrong)}\nSet these as they were, or give others."
        )


def check_same_noise(weights: Weights, config: Config) -> None:
    """What fine-tuning cannot change: the meaning of the network's time. Another scale of latents is only told.

    Raises ``DataError``.
    """
    before = weights.config.get("diffusion", {}).get("schedule", config.diffusion.schedule)
    if before != config.diffusion.schedule:
        raise DataError(
            f"{weights.origin}: trained with diffusion.schedule {before}, where the network is given another time than "
            f"with {config.diffusion.schedule}; set diffusion.schedule {before}, or train anew"
        )
    scale = (weights.config.get("autoencoder") or {}).get("scale_factor")
    ours = config.autoencoder.scale_factor if config.autoencoder else None
    if weights.config and scale != ours:
        log.warning("%s: trained with autoencoder.scale_factor %s, this run has %s", weights.origin, scale, ours)


def differences(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What keeps tensors from being a network's, one line for each key. shapes: of the network, by key."""
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    keys = [*shapes, *(key for key in found if key not in shapes)]
    return [
        f"{key}: {found.get(key, 'missing')} there, {shapes.get(key, 'none')} in this network"
        for key in keys
        if found.get(key) != shapes.get(key)
    ]


def listed(lines: list[str]) -> str:
    """Lines of a message, indented; beyond the first few only their number."""
    more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "\n".join(f"  {line}" for line in [*lines[:LISTED], *more])


def _positions(weights: Weights, net: UViT) -> Iterator[tuple[str, Tensor, str]]:
    old, new, model = weights.tensors.get("pos_embed"), net.pos_embed, weights.model
    texts = model.get("num_clip_token", 77) if model.get("clip_dim") is not None else 0
    extras = 1 + (model.get("num_classes", -1) > 0) + texts
    if old is None or old.ndim != 3 or old.shape == new.shape or extras != net.extras or old.shape[2] != new.shape[2]:
        return
    before, after = math.isqrt(old.shape[1] - extras), math.isqrt(new.shape[1] - extras)
    if old.shape[1] == extras + before**2:
        note = f"interpolated from a grid of {before}x{before} patches to {after}x{after}"
        yield "pos_embed", resize_positions(old, extras, after), note


def resize_positions(pos_embed: Tensor, extras: int, side: int) -> Tensor:
    """Bicubic interpolation of the patches' embeddings to another grid; the extra tokens' stay.

    pos_embed: (1, extras + h*h, D), fp32. Returns (1, extras + side*side, D).
    """
    tokens, patches = pos_embed[:, :extras], pos_embed[:, extras:]
    old = math.isqrt(patches.shape[1])
    grid = patches.transpose(1, 2).unflatten(2, (old, old))
    grid = interpolate(grid, size=(side, side), mode="bicubic", align_corners=False, antialias=False)
    return torch.cat([tokens, grid.flatten(2).transpose(1, 2)], dim=1)


def _labels(weights: Weights, net: UViT, null_label: int | None) -> Iterator[tuple[str, Tensor, str]]:
    key = "label_emb.weight"
    old = weights.tensors.get(key)
    if old is None or net.label_emb is None:
        return
    rows = net.label_emb.weight.detach().float().cpu().clone()
    null_before = weights.config.get("diffusion", {}).get("null_label")
    same_meaning = not weights.config or (null_before is None) == (null_label is None)
    if old.shape[1:] != rows.shape[1:] or (len(old) == len(rows) and same_meaning):
        return
    note = f"from {len(old)} labels to {len(rows)}: the rows start anew"
    if null_before is not None and null_label is not None:
        rows[-1] = old[-1]
        note += ", but the null label's is carried over"
    yield key, rows, note
