"""Evaluation: noise and label of every image from (seed, image id); the same scores however the work is cut."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from uvit_dist import dist, storage, watchdog
from uvit_dist.config import Config
from uvit_dist.data.latents import check_same_text_encoder
from uvit_dist.data.shards import ShardIndex, read_index
from uvit_dist.dist import Ranks
from uvit_dist.errors import ConfigError, DataError, MissingInputError
from uvit_dist.fid import FeatureMoments, frechet_distance, knn_classify, nearest_neighbour_recall
from uvit_dist.models.autoencoder import Autoencoder
from uvit_dist.models.features import Extractor
from uvit_dist.models.uvit import UViT
from uvit_dist.preflight import check_provenance, empty_context
from uvit_dist.pretrained import load_decoder, load_extractor
from uvit_dist.sampler import ImageConditions, Sampler, labels_of
from uvit_dist.weights import Kind, Weights, check_trained_as, load_weights
from uvit_dist.work import Result, WorkDirectory

Pixels = NDArray[np.uint8]
log = logging.getLogger(__name__)
FEATURES_KEPT = 10_000
"""Scores that need the features themselves use the images of lower id."""
GRID_COLUMNS = 10
OFFICIAL_STATISTICS = (
    "the published FIDs are against the official files, in the folder fid_stats of the downloads that the README of "
    "github.com/baofff/U-ViT links to; for a reference of your own, not comparable with those, "
)


def evaluate(config: Config, ranks: Ranks) -> dict[str, Any]:
    """Sample, decode, extract features and score; called on every rank, the scores come back on all.

    Units of work that an interrupted evaluation finished are not done again. Raises ``UserError`` of the right kind.
    """
    started = time.monotonic()
    reference: dict[str, Any] = {}  # rank 0 alone scores
    dist.on_main(ranks, lambda: reference.update(read_reference(config)))
    index: ShardIndex | None = dist.on_main(ranks, lambda: condition_index(config))
    dist.on_main(ranks, lambda: choose_weights(config))  # read in full and checked by one rank, for all
    weights = choose_weights(config, verify="size")
    net = load_network(config, weights).to(ranks.device)
    if index and index.provenance.text and weights:
        hashes = {"evaluate.captions": index.provenance.text.encoder_fingerprint, "training": weights.text_encoder}
        check_same_text_encoder(hashes)
    dist.on_main(ranks, lambda: load_pretrained(config))  # a URL is fetched by one rank, for all
    decoder, (extractor, extractor_identity) = load_pretrained(config)
    step = weights.step if weights else 0
    identity = [
        weights.fingerprint if weights else f"untrained {config.seed}",
        decoder.fingerprint if decoder else "",
        extractor_identity,
        index.sha256 if index else "",
    ]
    directory = evaluation_dir(config, step, identity)
    work = WorkDirectory(str(directory / "units"), -(-config.evaluate.samples // config.evaluate.chunk_size))
    empty = empty_context(index) if index and config.model.clip_dim is not None else None
    sampler = Sampler(config, net, decoder.to(ranks.device) if decoder else None, empty)
    conditions = ImageConditions(config, index)

    def prepare() -> list[int]:
        storage.make_directory(work.directory)
        return work.missing()

    mine = dist.on_main(ranks, prepare)[ranks.rank :: ranks.world_size]
    for number, unit in enumerate(tqdm(mine, unit="chunk", disable=None if ranks.is_main else True)):
        work.put(unit, do_unit(unit, config, sampler, conditions, extractor, ranks.device))
        watchdog.progress(watchdog.WORKING, number + 1)
    watchdog.progress(watchdog.PREPARING)  # others may have a unit to do yet, and scoring takes its time
    dist.barrier()

    def finish() -> dict[str, Any]:
        grid = directory / "grid.png"
        scores, images = score(work.results(), reference, config)
        storage.write_bytes(str(grid), png(torch.from_numpy(images), GRID_COLUMNS))
        record = {
            **scores,
            "reference": config.evaluate.reference,
            "weights": config.evaluate.weights,
            "checkpoint": weights.origin if weights else None,
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


def load_pretrained(config: Config) -> tuple[Autoencoder | None, tuple[Extractor, str]]:
    """The decoder, and the extractor with what identifies its weights. Raises ``UserError`` of the right kind."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return load_decoder(config), load_extractor(config.evaluate, device)


def evaluation_dir(config: Config, step: int, identity: list[str]) -> Path:
    """Where the units of one protocol on one set of weights lie: what changes an image or its features changes it, and
    nothing else does.

    identity: what identifies the weights of all networks, and the conditions.
    """
    scored = {"reference", "neighbours", "inception", "inception_sha256", "checkpoint", "captions"}
    protocol = {
        "evaluate": config.evaluate.model_dump(mode="json", exclude=scored),
        "sample": config.sample.model_dump(mode="json"),
        "schedule": config.diffusion.schedule,
        "null_label": config.diffusion.null_label,
        "model": config.model.model_dump(mode="json", exclude={"use_checkpoint"}),
        "scale_factor": config.autoencoder.scale_factor if config.autoencoder else None,
        "identity": identity,
    }
    digest = hashlib.sha256(json.dumps(protocol).encode()).hexdigest()[:12]
    return Path(config.run_dir, "evaluation", f"step-{step:08d}-{config.evaluate.weights}-{digest}")


def condition_index(config: Config) -> ShardIndex | None:
    """The index that conditions are drawn from: of captions, or of the training set for the frequency of its labels.

    Raises ``ConfigError``, ``MissingInputError``, ``DataError``.
    """
    if config.model.clip_dim is not None:
        if config.evaluate.captions is None:
            raise ConfigError(
                "evaluate.captions: missing; a text system is evaluated on the captions of held-out samples: give the "
                "index that data_tools.precompute_text made of them"
            )
        index = read_index(config.evaluate.captions, "evaluate.captions")
        check_provenance(config, index, "evaluate.captions")
        return index
    if config.evaluate.labels == "uniform":
        return None
    index = read_index(config.data.index)
    check_provenance(config, index)
    return index


def choose_weights(config: Config, verify: str | None = None) -> Weights | None:
    """The weights to evaluate; none for untrained ones.

    Raises ``MissingInputError``, or ``DataError`` where they were trained under another model, diffusion or scale
    factor.
    """
    protocol = config.evaluate
    if protocol.weights == "untrained":
        return None
    kind: Kind = "ema" if protocol.weights == "ema" else "master"
    weights = load_weights(protocol.checkpoint or config.run_dir, kind, verify or config.checkpoint.verify)
    check_trained_as(weights, config)
    return weights


def load_network(config: Config, weights: Weights | None) -> UViT:
    """The network with these weights, or untrained ones."""
    torch.manual_seed(config.seed)
    net = UViT(**config.model.model_dump()).eval().requires_grad_(False)
    if weights is not None:
        net.load_state_dict(weights.tensors)
    return net


def do_unit(
    unit: int,
    config: Config,
    sampler: Sampler,
    conditions: ImageConditions,
    extract: Extractor,
    device: torch.device,
) -> Result:
    """Generate the images of one unit in sub-batches of the fixed size, the last one padded. Returns its moments,
    features and, of the first ids, the images."""
    protocol = config.evaluate
    first, last = unit * protocol.chunk_size, min((unit + 1) * protocol.chunk_size, protocol.samples)
    images, labels, features = [], [], []
    for begin in range(first, last, protocol.sub_batch_size):
        ids = torch.arange(begin, begin + protocol.sub_batch_size, device=device)  # ids beyond the last: padding
        condition = conditions.of(ids)
        batch = sampler.generate(ids, condition, protocol.seed)
        wanted = min(last - begin, protocol.sub_batch_size)
        images.append(batch[:wanted].cpu())
        labels.append(labels_of(condition, len(ids))[:wanted])
        features.append(extract(batch)[:wanted].cpu())
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


def score(results: Iterable[Result], reference: dict[str, Any], config: Config) -> tuple[dict[str, Any], Pixels]:
    """Merge the units in order, one in memory at a time, and compare with the reference.

    Returns the scores, and the first images, (N, 3, H, W) uint8.
    """
    moments = FeatureMoments(reference["mu"].shape[0])
    kept: dict[str, list[NDArray[Any]]] = {"features": [], "labels": [], "images": []}
    for result in results:
        part = FeatureMoments(reference["mu"].shape[0])
        part.load_state_dict(
            {key.removeprefix("moments_"): v for key, v in result.items() if key.startswith("moments_")}
        )
        moments.merge(part)
        for name, arrays in kept.items():
            arrays.append(result[name])
    features, labels, images = (np.concatenate(arrays) for arrays in kept.values())
    scores: dict[str, Any] = {
        "feature_space": config.evaluate.features,
        "samples": int(moments.n),
        "fid" if config.evaluate.features == "inception" else "frechet_distance": frechet_distance(
            moments.mean, moments.covariance, reference["mu"], reference["sigma"]
        ),
    }
    halves = ("frechet_distance", "recall", "class_accuracy")
    scores |= {f"{n}_real_halves": float(reference[f"{n}_halves"]) for n in halves if f"{n}_halves" in reference}
    if "features" in reference:  # the official files hold mu and sigma alone
        real, fake, k = torch.from_numpy(reference["features"]), torch.from_numpy(features), config.evaluate.neighbours
        scores["recall"] = nearest_neighbour_recall(real, fake, k)
        if config.model.num_classes > 0 and "labels" in reference:
            found = knn_classify(real, torch.from_numpy(reference["labels"]), fake, k)
            asked = torch.from_numpy(labels)[: len(fake)]
            scores["class_accuracy"] = (found == asked).double().mean().item()
    return scores, images[: config.evaluate.grid_rows * GRID_COLUMNS]


def read_reference(config: Config) -> dict[str, Any]:
    """Statistics of the real images: a file of ours, or an official one of ``mu`` and ``sigma`` of Inception features.

    Raises ``MissingInputError``, ``DataError`` where they are of another kind.
    """
    path = config.evaluate.reference
    if not storage.exists(path):
        official = OFFICIAL_STATISTICS if Path(path).name.startswith("fid_stats_") else ""
        raise MissingInputError(
            f"evaluate.reference {path}: no such file; {official}make it: "
            "python -m data_tools.fid_reference --config YOUR_CONFIG.yaml"
        )
    try:
        with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as archive:
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


def png(images: Tensor, columns: int) -> bytes:
    """Images (N, 3, H, W) uint8 as one picture, so many in a row, with grey gaps."""
    grid = make_grid(images, nrow=columns, padding=2, pad_value=96)
    out = io.BytesIO()
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(out, "PNG")
    return out.getvalue()
