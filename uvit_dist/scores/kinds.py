"""Kinds of features, and which of them each score is made of."""

from __future__ import annotations

from collections.abc import Iterable

PIXELS = "pixels"
"""Of the spaces that need no weights."""
POOL = "pool3"
"""Inception's last pooling under pytorch-fid's resize: the paper's FID."""
ADM_POOL, ADM_SPATIAL, ADM_LOGITS = "adm_pool3", "adm_spatial", "adm_logits"
"""Under ADM's resize: the same pooling; a layer before any pooling over space (sFID); logits without their bias."""
CLIP = "clip"
"""One number: how well an image fits its caption."""

WIDTHS = {POOL: 2048, ADM_POOL: 2048, ADM_SPATIAL: 2023, ADM_LOGITS: 1008}
"""Inception's features of an image, by kind."""

REFERENCE_KEYS = {
    PIXELS: ("mu", "sigma", "features"),
    POOL: ("mu", "sigma", None),
    ADM_POOL: ("adm_mu", "adm_sigma", "adm_features"),
    ADM_SPATIAL: ("adm_mu_s", "adm_sigma_s", None),
}
"""Names in a reference of ours: mean (D,) and covariance (D, D), float64, and features (n, D) of some images."""

OF_INCEPTION = {
    "fid": POOL,
    "adm_fid": ADM_POOL,
    "sfid": ADM_SPATIAL,
    "inception_score": ADM_LOGITS,
    "precision": ADM_POOL,
    "recall": ADM_POOL,
    "kid": ADM_POOL,
    "clip_score": CLIP,
}
"""Scores in Inception's features, each with the kind that it is made of: all but FID as in ADM's evaluator."""

OF_PIXELS = {
    **dict.fromkeys(("frechet_distance", "precision", "recall", "kid", "class_accuracy"), PIXELS),
    "clip_score": CLIP,
}
"""Scores in the spaces that need no weights."""

FRECHET = ("fid", "adm_fid", "sfid", "frechet_distance")
COMPARED = ("precision", "recall", "kid", "class_accuracy")
"""Scores that compare samples one by one with real ones, and need the features of these."""


def needed(space: str, scores: Iterable[str]) -> tuple[str, ...]:
    """The kinds of features that these scores need, in a fixed order. space: as evaluate.features."""
    table = OF_INCEPTION if space == "inception" else OF_PIXELS
    wanted = {table[score] for score in scores}
    return tuple(kind for kind in dict.fromkeys(table.values()) if kind in wanted)
