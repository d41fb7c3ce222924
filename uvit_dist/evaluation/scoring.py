"""From the features of all images to scores."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from uvit_dist.config import Config
from uvit_dist.evaluation.reference import Reference
from uvit_dist.fid import FeatureMoments, frechet_distance
from uvit_dist.models.features import Extractor
from uvit_dist.scores.inception_score import inception_score
from uvit_dist.scores.kernel import kernel_distance
from uvit_dist.scores.kinds import ADM_LOGITS, CLIP, COMPARED, FRECHET, OF_INCEPTION, OF_PIXELS
from uvit_dist.scores.neighbours import knn_classify, precision_and_recall

LABELS = "labels"
"""The array of the spool beside the features."""


class Features(Protocol):
    """The features of all images, as ``spool.Spool`` has them."""

    def features(self, kind: str, first: int | None = None) -> NDArray[Any]:
        """(n, D), of the first n images; none: of all."""
        ...

    def moments(self, kind: str) -> FeatureMoments:
        """Those of all images."""
        ...


def score(
    spool: Features, reference: Reference, config: Config, extract: Extractor, device: torch.device
) -> dict[str, Any]:
    """The scores that the configuration asks for. extract: for a reference that holds images instead of features.

    Raises ``DataError`` where features are of another shape, ``NumericalError`` where they are not finite.
    """
    evaluate = config.evaluate
    table = OF_INCEPTION if evaluate.features == "inception" else OF_PIXELS
    out: dict[str, Any] = {"feature_space": evaluate.features}
    for name in evaluate.asked:
        if name in FRECHET:
            moments = spool.moments(table[name])
            out[name] = frechet_distance(moments.mean, moments.covariance, *reference.moments[table[name]])
        elif name == "inception_score":
            out[name], out["inception_score_std"] = inception_score(spool.features(ADM_LOGITS))
        elif name == "clip_score":
            out[name] = float(np.mean(spool.features(CLIP), dtype=np.float64))
    compared = [name for name in COMPARED if name in evaluate.asked and name not in reference.lacks]
    if compared:
        kind, few = table[compared[0]], evaluate.compared
        real = reference.features_of(kind, few, extract, device, evaluate.sub_batch_size)
        out |= _compare(compared, real, spool.features(kind, few), reference, config, spool, device)
    return out | {f"{name}_real_halves": value for name, value in reference.halves.items() if name in out}


def _compare(
    names: list[str],
    real: NDArray[Any],
    generated: NDArray[Any],
    reference: Reference,
    config: Config,
    spool: Features,
    device: torch.device,
) -> dict[str, Any]:
    """The scores by comparison of samples, real (N, D) and generated (M, D) floating."""
    out: dict[str, Any] = {"compared": len(generated), "compared_real": len(real)}
    k, chosen = config.evaluate.neighbours, set(names)
    ours, theirs = (torch.tensor(np.asarray(side), device=device) for side in (real, generated))
    if chosen & {"precision", "recall"}:
        values = dict(zip(("precision", "recall"), precision_and_recall(ours, theirs, k), strict=True))
        out |= {name: value for name, value in values.items() if name in chosen}
    if "class_accuracy" in chosen and config.model.num_classes > 0:
        assert reference.labels is not None
        found = knn_classify(ours, torch.from_numpy(reference.labels[: len(real)]).to(device), theirs, k).cpu()
        out["class_accuracy"] = (found == torch.tensor(spool.features(LABELS, len(generated)))).double().mean().item()
    if "kid" in chosen:
        out["kid"], out["kid_std"] = kernel_distance(real, generated, device=device)
    return out
