"""The weights of a checkpoint as one safetensors file, of any ZeRO stage and number of ranks, in little memory.

Metadata of the file, each a string: ``model`` and ``config`` (JSON), ``step``, ``kind``, ``text_encoder`` (if any), and
where the weights come from: ``versions`` (JSON) of what trained them, ``index_sha256`` of the data, ``source`` (the
checkpoint's path) and ``source_fingerprint``. ``xxh3`` (JSON) is the hash of each tensor's bytes, xxh3 of 128 bits: it
travels with the file, and ``uvit_dist.weights`` checks it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uvit_dist import checkpoint, safetensors_stream, score_log, storage
from uvit_dist.errors import MissingInputError
from uvit_dist.model_card import model_card
from uvit_dist.models.uvit import DESCRIPTION, WEIGHTS, described
from uvit_dist.weights import XXH3, Kind, find_checkpoint, fingerprint_of

PIECE = 4 << 20
"""Elements that are read at once."""
MAPPED = 32 << 20
"""Bytes read after which the mapped files are let go: what was read of them counts as memory of the process, and of
each file up to some MB beside it."""


def export_weights(
    run_dir: str | Path, out: str | Path, kind: Kind, step: int | None = None, verify: str = "size"
) -> int:
    """Write the weights of a checkpoint of a run to ``out``, a path or URL, whole or not at all. Returns its step.

    kind: "ema" or "master" (what the optimizer updates, fp32); step: of which checkpoint; none: the newest whole one;
    verify: what is checked of it before, "size" or "hash". Memory: two pieces and what is mapped.
    Raises ``MissingInputError`` where there is no such checkpoint, ``CheckpointError`` where it is damaged,
    ``OutputError``.
    """
    directory = _choose(run_dir, step, verify)
    manifest = json.loads((directory / checkpoint.MANIFEST).read_text())
    tensors = {name: (torch.float32, shape) for name, shape in manifest["shapes"].items()}
    metadata = _metadata(manifest, kind, directory)
    safetensors_stream.write(str(out), tensors, _source(directory, kind, manifest["shapes"]), metadata, XXH3)
    return int(manifest["step"])


def export_folder(
    run_dir: str | Path, out: str | Path, kind: Kind, step: int | None = None, verify: str = "size"
) -> int:
    """As ``export_weights``, to a folder or URL prefix as the Hugging Face Hub has them. Returns the step.

    ``model.safetensors``, ``config.json``, and the model card ``README.md``. Raises as ``export_weights``.
    """
    directory = _choose(run_dir, step, verify)
    manifest = json.loads((directory / checkpoint.MANIFEST).read_text())
    found = export_weights(run_dir, storage.join(str(out), WEIGHTS), kind, int(manifest["step"]), "size")
    model = {key: value for key, value in manifest["config"]["model"].items() if key != "use_checkpoint"}
    storage.write_bytes(storage.join(str(out), DESCRIPTION), described(model))
    scores = [
        r for r in score_log.records(run_dir) if r.get("of_run") and (r.get("step"), r.get("weights")) == (found, kind)
    ]
    latest = {score_log.alike(record): record for record in scores}
    card = model_card(manifest, kind, list(latest.values()), Path(str(out)).name)
    storage.write_bytes(storage.join(str(out), "README.md"), card.encode())
    return found


def _choose(run_dir: str | Path, step: int | None, verify: str) -> Path:
    if step is None:
        newest = checkpoint.newest_whole(str(run_dir), verify)
        if newest is None:
            raise MissingInputError(f"{run_dir}: holds no checkpoint; train first")
        return newest
    parent = checkpoint.checkpoints_dir(run_dir)
    chosen = parent / f"step-{step:08d}"
    if not chosen.is_dir():
        held = [str(int(path.name.split("-")[1])) for path in sorted(parent.glob("step-*"))]
        raise MissingInputError(
            f"{run_dir}: holds no checkpoint of step {step}; it has {', '.join(held) or 'none'}: give one of these, or "
            "leave --step out"
        )
    return find_checkpoint(chosen, verify)


def _metadata(manifest: dict[str, Any], kind: str, directory: Path) -> dict[str, str]:
    config = manifest["config"]
    told = {
        "model": json.dumps({key: value for key, value in config["model"].items() if key != "use_checkpoint"}),
        "config": json.dumps(config),
        "step": str(manifest["step"]),
        "kind": kind,
        "text_encoder": manifest.get("text_encoder"),
        "versions": json.dumps(manifest.get("versions", {})),
        "index_sha256": manifest.get("must_agree", {}).get("sha256 of data.index"),
        "source": str(directory),
        "source_fingerprint": fingerprint_of(manifest),
    }
    return {key: value for key, value in told.items() if value}


def _source(directory: Path, kind: str, shapes: dict[str, list[int]]) -> Callable[[str], Iterator[Tensor]]:
    """name → its flat tensor in pieces."""
    reader, mapped = checkpoint.CheckpointReader(directory), 0

    def pieces(name: str) -> Iterator[Tensor]:
        nonlocal reader, mapped
        numel = torch.Size(shapes[name]).numel()
        for first in range(0, numel, PIECE):
            if mapped >= MAPPED:
                reader, mapped = checkpoint.CheckpointReader(directory), 0
            piece = reader.read(kind, name, first, min(PIECE, numel - first))
            mapped += piece.nbytes
            yield piece

    return pieces
