"""Evaluation: noise and label of every image from (seed, image id); the same scores however the work is cut."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from uvit_dist import checkpoint, dist, storage
from uvit_dist.config import Config, config_hash
from uvit_dist.diffusion.guidance import noise_predictor
from uvit_dist.diffusion.keyed_random import keyed_integers, keyed_normal
from uvit_dist.diffusion.schedule import DiscreteSchedule
from uvit_dist.diffusion.solvers import dpm_solver_pp
from uvit_dist.dist import Ranks
from uvit_dist.errors import DataError, MissingInputError
from uvit_dist.fid import FeatureMoments, frechet_distance, knn_classify, nearest_neighbour_recall
from uvit_dist.models.autoencoder import Autoencoder, load_autoencoder
from uvit_dist.models.features import EXTRACTORS, to_uint8
from uvit_dist.models.uvit import UViT
from uvit_dist.work import Result, WorkDirectory

log = logging.getLogger(__name__)
FEATURES_KEPT = 10_000
"""Scores that need the features themselves use the images of lower id."""
GRID_COLUMNS = 10
FREE_TO_CHANGE = {"use_checkpoint", "label_dropout", "encoder", "decoder", "encoder_fingerprint"}
"""Of the sections model, diffusion and autoencoder: what an evaluation may have otherwise than the training."""


def evaluate(config: Config, ranks: Ranks) -> dict[str, Any]:
    """Sample, decode, extract features and score; called on every rank, the scores come back on all.

    Units of work that an interrupted evaluation finished are not done again. Raises ``UserError`` of the right kind.
    """
    started = time.monotonic()
    reference: dict[str, Any] = {}  # rank 0 alone scores
    dist.on_main(ranks, lambda: reference.update(read_reference(config)))
    path: Path | None = dist.on_main(ranks, lambda: choose_checkpoint(config))
    net, step, weights = load_network(config, path)
    net = net.to(ranks.device)
    autoencoder = load_autoencoder(config.autoencoder.decoder).to(ranks.device)
    directory = evaluation_dir(config, step, weights + autoencoder.fingerprint)
    work = WorkDirectory(str(directory / "units"), -(-config.evaluate.samples // config.evaluate.chunk_size))

    def prepare() -> list[int]:
        storage.make_directory(work.directory)
        return work.missing()

    mine = dist.on_main(ranks, prepare)[ranks.rank :: ranks.world_size]
    for unit in tqdm(mine, unit="chunk", disable=None if ranks.is_main else True):
        work.put(unit, do_unit(unit, config, net, autoencoder, ranks.device))
    dist.barrier()

    def finish() -> dict[str, Any]:
        results = list(work.results())
        grid = directory / "grid.png"
        storage.write_bytes(str(grid), png(results, config.evaluate.grid_rows * GRID_COLUMNS))
        record = {
            **score(results, reference, config),
            "weights": config.evaluate.weights,
            "precision": "fp32",
            "step": step,
            "solver": config.sample.solver,
            "solver_steps": config.sample.steps,
            "cfg_scale": config.sample.cfg_scale,
            "seconds": round(time.monotonic() - started, 2),
            "grid": str(grid),
        }
        storage.write_bytes(str(directory / "scores.json"), json.dumps(record, indent=1).encode())
        with open(directory.parent / "scores.jsonl", "a", encoding="utf-8") as history:
            history.write(json.dumps(record) + "\n")
        return record

    return dist.on_main(ranks, finish)


def evaluation_dir(config: Config, step: int, weights: str) -> Path:
    """Where the results of one protocol on one set of weights lie: whatever changes an image changes the directory.

    weights: what identifies the weights of network and decoder.
    """
    parts = (config.evaluate, config.sample, config.diffusion, config.model, config.autoencoder)
    protocol = hashlib.sha256("".join([weights, *map(config_hash, parts)]).encode()).hexdigest()[:12]
    return Path(config.run_dir, "evaluation", f"step-{step:08d}-{config.evaluate.weights}-{protocol}")


def choose_checkpoint(config: Config) -> Path | None:
    """The newest whole checkpoint; none for untrained weights.

    Raises ``MissingInputError``, or ``DataError`` where it was trained under another model, diffusion or scale factor.
    """
    if config.evaluate.weights == "untrained":
        return None
    path = checkpoint.newest_whole(config.run_dir, config.checkpoint.verify)
    if path is None:
        raise MissingInputError(f"run_dir {config.run_dir}: holds no checkpoint to evaluate; train first")
    trained = checkpoint.CheckpointReader(path).manifest["config"]
    ours = config.model_dump(mode="json")
    wrong = [
        f"{section}.{key}: trained with {trained[section].get(key)}, the configuration says {value}"
        for section in ("model", "diffusion", "autoencoder")
        for key, value in ours[section].items()
        if trained[section].get(key) != value and key not in FREE_TO_CHANGE
    ]
    if wrong:
        raise DataError(f"{path} is not of this configuration:\n  " + "\n  ".join(wrong))
    return path


def load_network(config: Config, path: Path | None) -> tuple[UViT, int, str]:
    """The network with the weights of a checkpoint, or untrained; their step, 0 if untrained; what identifies them."""
    torch.manual_seed(config.seed)
    net = UViT(**config.model.model_dump()).eval().requires_grad_(False)
    if path is None:
        return net, 0, f"seed {config.seed}"
    reader = checkpoint.CheckpointReader(path)
    kind = {"ema": "ema", "model": "master"}[config.evaluate.weights]
    net.load_state_dict(reader.full(kind))
    return net, reader.manifest["step"], kind + str(reader.manifest["files"])


@torch.inference_mode()
def generate(ids: Tensor, config: Config, net: UViT, autoencoder: Autoencoder) -> tuple[Tensor, Tensor]:
    """Images of the given ids. ids: (B,) int64, on the network's device.

    Returns images (B, 3, H, W) uint8 and labels (B,) int64 (-1 for an unconditional network). Noise and label are
    functions of (evaluate.seed, id); an image's bits also depend on B, which is why B is a part of the protocol.
    """
    seed, model, schedule = config.evaluate.seed, config.model, DiscreteSchedule()
    null = config.diffusion.null_label
    labels, cond, no_cond = torch.full_like(ids, -1), {}, {}
    if model.num_classes > 0:
        labels = keyed_integers(seed, "sample_label", 0, ids, 0, model.num_classes - (null is not None))
        cond = {"y": labels}
        no_cond = {"y": torch.full_like(labels[:1], null)} if null is not None else {}
    x_T = keyed_normal(seed, "sample_noise", 0, ids, (model.in_chans, model.img_size, model.img_size))
    eps = noise_predictor(net, schedule.network_time, cond, no_cond or None, config.sample.cfg_scale)
    z = dpm_solver_pp(eps, schedule, x_T, config.sample.steps)
    return to_uint8(autoencoder.decode(z / config.autoencoder.scale_factor)), labels


def do_unit(unit: int, config: Config, net: UViT, autoencoder: Autoencoder, device: torch.device) -> Result:
    """Generate the images of one unit in sub-batches of the fixed size, the last one padded. Returns its moments,
    features and, of the first ids, the images."""
    protocol = config.evaluate
    extract = EXTRACTORS[protocol.features]
    first, last = unit * protocol.chunk_size, min((unit + 1) * protocol.chunk_size, protocol.samples)
    images, labels, features = [], [], []
    for begin in range(first, last, protocol.sub_batch_size):
        ids = torch.arange(begin, begin + protocol.sub_batch_size, device=device)  # ids beyond the last: padding
        batch, batch_labels = generate(ids, config, net, autoencoder)
        wanted = min(last - begin, protocol.sub_batch_size)
        images.append(batch[:wanted].cpu())
        labels.append(batch_labels[:wanted].cpu())
        features.append(extract(batch[:wanted]).cpu())
    all_features = torch.cat(features)
    moments = FeatureMoments(all_features.shape[1])
    moments.update(all_features)
    kept = max(0, min(last, FEATURES_KEPT) - first)
    shown = max(0, min(last, protocol.grid_rows * GRID_COLUMNS) - first)
    return {
        **{f"moments_{key}": np.asarray(value) for key, value in moments.state_dict().items()},
        "features": all_features[:kept].numpy(),
        "labels": torch.cat(labels).numpy(),
        "images": torch.cat(images)[:shown].numpy(),
    }


def score(results: list[Result], reference: dict[str, Any], config: Config) -> dict[str, Any]:
    """Merge the units in order and compare with the reference."""
    moments = FeatureMoments(reference["mu"].shape[0])
    for result in results:
        part = FeatureMoments(reference["mu"].shape[0])
        part.load_state_dict(
            {key.removeprefix("moments_"): v for key, v in result.items() if key.startswith("moments_")}
        )
        moments.merge(part)
    scores: dict[str, Any] = {
        "feature_space": config.evaluate.features,
        "samples": int(moments.n),
        "frechet_distance": frechet_distance(moments.mean, moments.covariance, reference["mu"], reference["sigma"]),
        **{f"{name}_real_halves": float(reference[f"{name}_halves"]) for name in ("frechet_distance", "recall")},
    }
    features = torch.from_numpy(np.concatenate([result["features"] for result in results]))
    labels = torch.from_numpy(np.concatenate([result["labels"] for result in results]))[: len(features)]
    real, real_labels = torch.from_numpy(reference["features"]), torch.from_numpy(reference["labels"])
    k = config.evaluate.neighbours
    scores["recall"] = nearest_neighbour_recall(real, features, k)
    if config.model.num_classes > 0:
        scores["class_accuracy"] = (knn_classify(real, real_labels, features, k) == labels).double().mean().item()
        scores["class_accuracy_real_halves"] = float(reference["class_accuracy_halves"])
    return scores


def read_reference(config: Config) -> dict[str, Any]:
    """Statistics of the real images. Raises ``MissingInputError``, ``DataError`` where they are of another kind."""
    path = config.evaluate.reference
    if not storage.exists(path):
        raise MissingInputError(
            f"evaluate.reference {path}: no such file; make it: "
            "python -m data_tools.fid_reference --config YOUR_CONFIG.yaml"
        )
    try:
        with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as archive:
            reference = dict(archive)
        made = json.loads(str(reference["provenance"]))
    except (ValueError, KeyError) as error:
        raise DataError(
            f"evaluate.reference {path}: not a reference made by data_tools.fid_reference ({error})"
        ) from None
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


def png(results: list[Result], count: int) -> bytes:
    """The first images as one picture, GRID_COLUMNS in a row, with grey gaps."""
    images = torch.from_numpy(np.concatenate([result["images"] for result in results])[:count])
    grid = make_grid(images, nrow=GRID_COLUMNS, padding=2, pad_value=96)
    out = io.BytesIO()
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(out, "PNG")
    return out.getvalue()
