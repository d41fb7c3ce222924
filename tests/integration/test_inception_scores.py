"""All scores in Inception's features, from one pass, against our own reference and against a batch of ADM's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.fid_reference import write_reference
from tests.inception_weights import random_weights
from tests.tiny import tiny_config
from uvit_dist.dist import Ranks
from uvit_dist.evaluate import evaluate
from uvit_dist.evaluation.reference import read_reference
from uvit_dist.fid import frechet_distance
from uvit_dist.models.inception import load_inception
from uvit_dist.pretrained import load_extractor
from uvit_dist.scores.kinds import ADM_POOL, ADM_SPATIAL, POOL

pytestmark = pytest.mark.slow
SCORES = ("fid", "adm_fid", "sfid", "inception_score", "precision", "recall", "kid")
IMAGES, SAMPLES = 14, 12


def test_all_scores_from_one_pass(tmp_path: Path) -> None:
    torch.save(random_weights(), tmp_path / "inception.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{number:02d}.png")
    changes = [f"data.source={tmp_path}/images", "data.format=folder", "data.crop=none", "evaluate.features=inception",
               f"evaluate.inception={tmp_path}/inception.pth", f"evaluate.scores=[{', '.join(SCORES)}]",
               "evaluate.neighbours=3", "evaluate.weights=untrained", f"evaluate.samples={SAMPLES}",
               "evaluate.sub_batch_size=4", "evaluate.chunk_size=4"]  # fmt: skip
    config = tiny_config(tmp_path, tmp_path / "run", *changes)
    write_reference(config)
    scores = evaluate(config, Ranks())
    assert set(SCORES) <= scores.keys()
    assert all(np.isfinite(scores[name]) for name in SCORES)
    assert {f"{name}_real_halves" for name in ("fid", "adm_fid", "sfid", "precision")} <= scores.keys()

    _, identity = load_extractor(config.evaluate, torch.device("cpu"))
    reference = read_reference(config, identity.partition(" ")[0])
    real = load_inception(tmp_path / "inception.pth", (POOL, ADM_POOL, ADM_SPATIAL))(
        torch.from_numpy(pixels).permute(0, 3, 1, 2)
    )
    for kind, (mean, covariance) in reference.moments.items():
        features = real[kind].double().numpy()
        np.testing.assert_allclose(mean, features.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(covariance, np.cov(features.T), rtol=1e-3, atol=1e-4)

    chunks = sorted(Path(scores["grid"]).parent.glob("chunks/*.npz"))
    pooled = np.concatenate([np.load(path)[POOL] for path in chunks]).astype(np.float64)
    assert pooled.shape == (SAMPLES, 2048)
    expected = frechet_distance(pooled.mean(0), np.cov(pooled.T), *reference.moments[POOL])
    assert scores["fid"] == pytest.approx(expected, rel=1e-6)

    # ADM's batch holds the same images and moments: the same scores, of the same chunks, without a sample more.
    (mu, sigma), (mu_s, sigma_s) = reference.moments[ADM_POOL], reference.moments[ADM_SPATIAL]
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, arr_0=pixels)
    made = {path: path.stat().st_mtime_ns for path in chunks}
    again = evaluate(tiny_config(tmp_path, tmp_path / "run", *changes, f"evaluate.adm_reference={tmp_path}/adm.npz"),
                     Ranks())  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in chunks} == made
    for name in ("fid", "adm_fid", "sfid", "inception_score"):
        assert again[name] == pytest.approx(scores[name], rel=1e-9), name
    for name in ("precision", "recall", "kid"):
        assert again[name] == pytest.approx(scores[name], rel=1e-4, abs=1e-6), name
    assert json.loads(Path(scores["grid"]).with_name(f"scores-{SAMPLES}.json").read_text()) == again
