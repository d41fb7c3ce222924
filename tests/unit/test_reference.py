"""References of real images: ours, official ones, ADM's batches; what does not fit is refused; same bits at any cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools import fid_reference
from data_tools.fid_reference import ReferenceJob, write_reference
from tests.tiny import tiny_config
from uvit_dist.config import Config
from uvit_dist.errors import ConfigError, DataError, MissingInputError
from uvit_dist.evaluation.reference import Reference, images_of_batch, read_reference
from uvit_dist.scores.kinds import ADM_POOL, ADM_SPATIAL, PIXELS, POOL, WIDTHS

CPU = torch.device("cpu")


def config_of(tmp_path: Path, *changes: str) -> Config:
    return tiny_config(tmp_path, tmp_path / "run", *changes)


def inception(tmp_path: Path, scores: str, *changes: str) -> Config:
    return config_of(tmp_path, "evaluate.features=inception", f"evaluate.scores=[{scores}]", *changes)


def moments(kind: str) -> tuple[np.ndarray, np.ndarray]:
    return np.ones(WIDTHS[kind]), np.ones((WIDTHS[kind], 1)) * np.ones(WIDTHS[kind])


def adm_batch(path: Path, size: int = 32, count: int = 7) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    (mu, sigma), (mu_s, sigma_s) = moments(ADM_POOL), moments(ADM_SPATIAL)
    np.savez(path, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, arr_0=images, arr_1=np.arange(count))
    return images


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", np.lib.format.MAGIC_PREFIX, None])
def test_a_damaged_reference_is_explained(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "reference.npz"
    if content is None:
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"evaluate\.reference .*reference\.npz: not a reference"):
        read_reference(config_of(tmp_path), "digits_pixels_8x8")


@pytest.mark.parametrize(
    ("name", "key", "told"),
    [
        (
            "fid_stats_imagenet256_guided_diffusion.npz",
            "reference",
            "the published FIDs are against the official files",
        ),
        ("VIRTUAL_imagenet256_labeled.npz", "adm_reference", r"\(about 2 GB\) .*guided-diffusion"),
    ],
)
def test_missing_files_are_named_with_their_source(tmp_path: Path, name: str, key: str, told: str) -> None:
    config = inception(tmp_path, "adm_fid" if key == "adm_reference" else "fid", f"evaluate.{key}={tmp_path / name}")
    with pytest.raises(MissingInputError, match=rf"evaluate\.{key} .*: no such file; .*{told}"):
        read_reference(config, "")


def test_an_official_file_serves_the_papers_fid_alone(tmp_path: Path) -> None:
    mu, sigma = moments(POOL)
    np.savez(tmp_path / "reference.npz", mu=mu, sigma=sigma)
    read = read_reference(inception(tmp_path, "fid"), "any")
    assert read.moments[POOL][1].shape == (2048, 2048)
    for scores in ("fid, sfid", "fid, precision", "adm_fid", "kid"):
        with pytest.raises(DataError, match="hold no statistics for them; ADM's reference batches"):
            read_reference(inception(tmp_path, scores), "any")
    with pytest.raises(DataError, match="official files hold 2048 Inception features"):
        read_reference(config_of(tmp_path), "digits_pixels_8x8")
    np.savez(tmp_path / "reference.npz", mu=mu[:64], sigma=sigma[:64, :64])
    with pytest.raises(DataError, match=r"mu \(64,\), sigma \(64, 64\) without provenance"):
        read_reference(inception(tmp_path, "fid"), "any")


def test_adms_batch_serves_all_but_the_papers_fid(tmp_path: Path) -> None:
    images = adm_batch(tmp_path / "adm.npz")
    every = "adm_fid, sfid, inception_score, precision, recall, kid"
    config = inception(tmp_path, every, f"evaluate.adm_reference={tmp_path}/adm.npz")
    read = read_reference(config, "any")
    assert {kind: mean.shape for kind, (mean, _) in read.moments.items()} == {ADM_POOL: (2048,), ADM_SPATIAL: (2023,)}

    def extract(batch: torch.Tensor, texts: object = None) -> dict[str, torch.Tensor]:
        assert batch.shape[1:] == (3, 32, 32)
        return {ADM_POOL: batch.flatten(1).float()}

    expected = images.transpose(0, 3, 1, 2).reshape(7, -1)
    assert np.array_equal(read.features_of(ADM_POOL, 100, extract, CPU, sub_batch=3), expected)
    assert np.array_equal(read.features_of(ADM_POOL, 5, extract, CPU, sub_batch=3), expected[:5])
    with pytest.raises(MissingInputError, match=r"evaluate\.reference .*no such file"):
        read_reference(inception(tmp_path, f"fid, {every}", f"evaluate.adm_reference={tmp_path}/adm.npz"), "any")


def test_a_batch_of_other_images_is_refused(tmp_path: Path) -> None:
    adm_batch(tmp_path / "adm.npz", size=64)
    config = inception(tmp_path, "adm_fid", f"evaluate.adm_reference={tmp_path}/adm.npz")
    with pytest.raises(DataError, match=r"images of 64x64, and data\.image_size is 32"):
        read_reference(config, "any")
    (mu, sigma), (mu_s, sigma_s) = moments(ADM_POOL), moments(ADM_SPATIAL)
    np.savez(tmp_path / "bare.npz", mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    read_reference(inception(tmp_path, "adm_fid, sfid", f"evaluate.adm_reference={tmp_path}/bare.npz"), "any")
    with pytest.raises(DataError, match=r"scores kid: .*bare\.npz hold no statistics"):
        read_reference(inception(tmp_path, "adm_fid, kid", f"evaluate.adm_reference={tmp_path}/bare.npz"), "any")
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(DataError, match="expected images"):
        list(images_of_batch(str(tmp_path / "floats.npz"), 2, 1))


def folder_of_images(tmp_path: Path, count: int = 30) -> list[str]:
    from PIL import Image

    draw = np.random.default_rng(1)
    for number in range(count):
        folder = tmp_path / "images" / f"class-{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 128 * (1 + number % 2), (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return ["data.format=folder", f"data.source={tmp_path}/images", "data.crop=adm", "data.mirror=true",
            "model.num_classes=3", "diffusion.null_label=2", "evaluate.features=pixels_8x8",
            "evaluate.scores=[frechet_distance, precision, recall, kid, class_accuracy]", "evaluate.neighbours=2",
            "evaluate.compared=20", "evaluate.sub_batch_size=4"]  # fmt: skip


def arrays_of(path: str) -> dict[str, Any]:
    with np.load(path) as archive:
        return dict(archive)


@pytest.mark.slow
def test_a_reference_has_the_same_bits_however_it_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fid_reference, "UNIT", 4)
    changes = folder_of_images(tmp_path)
    alone = config_of(tmp_path, *changes)
    assert "30 images in pixels_8x8; one half against the other: frechet_distance" in write_reference(alone)
    whole = Path(alone.evaluate.reference).read_bytes()
    arrays = arrays_of(alone.evaluate.reference)
    assert arrays["features"].shape == (20, 192)
    assert set(json.loads(str(arrays["provenance"]))["halves"]) == {"frechet_distance", "precision", "recall",
                                                                    "class_accuracy"}  # fmt: skip
    (Path(alone.evaluate.reference)).unlink()
    one, other = ReferenceJob(alone), ReferenceJob(alone)  # two workers take turns; a third finishes after both died
    for job in (one, other, one):
        unit = job._work.claim()
        assert unit is not None
        job._work.put(unit, job._result(unit))
    one.close()
    other.close()
    last = ReferenceJob(alone)
    assert len(last._work.missing()) == 8 - 3
    last.run()
    last.close()
    assert Path(alone.evaluate.reference).read_bytes() == whole
    reader = read_reference(alone, "pixels_8x8")
    assert reader.moments[PIXELS][0].shape == (192,)
    assert reader.features[PIXELS].shape == (20, 192)
    assert reader.labels is not None

    features = np.concatenate([job_features(last, half) for half in last._halves])
    np.testing.assert_allclose(arrays["mu"], features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(arrays["sigma"], np.cov(features.T), rtol=1e-9, atol=1e-12)


def job_features(job: ReferenceJob, numbers: np.ndarray) -> np.ndarray:
    return torch.cat(job._features(numbers)[PIXELS]).numpy()


@pytest.mark.slow
def test_a_reference_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    changes = folder_of_images(tmp_path)
    config = config_of(tmp_path, *changes)
    write_reference(config)
    for change, told in (
        ("evaluate.neighbours=3", "neighbours: the configuration says 3, the reference 2"),
        ("evaluate.reference_images=50", "images: the configuration says 50, the reference 30"),
        ("data.crop=none", "crop: the configuration says none, the reference adm"),
        ("data.image_size=64", "image_size: the configuration says 64, the reference 32"),
    ):
        changed = config_of(tmp_path, *changes, change, *(["model.img_size=16"] if "size" in change else []))
        with pytest.raises(DataError, match=told):
            read_reference(changed, "pixels_8x8")
    with pytest.raises(DataError, match="extractor: the configuration says another, the reference pixels_8x8"):
        read_reference(config, "another")
    first = Path(config.evaluate.reference).read_bytes()
    write_reference(config_of(tmp_path, *changes, "evaluate.neighbours=3"))  # another is made in its place
    assert Path(config.evaluate.reference).read_bytes() != first


def test_scores_that_a_space_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be some of frechet_distance, precision"):
        config_of(tmp_path, "evaluate.scores=[fid]")
    with pytest.raises(ConfigError, match="clip_score needs the weights of ViT-L-14-quickgelu: set clip"):
        config_of(tmp_path, "evaluate.scores=[clip_score]")


def test_a_bare_reference_lacks_what_compares_samples() -> None:
    assert Reference({}).lacks == {"precision", "recall", "kid", "class_accuracy"}
    assert Reference({}, batch="adm.npz").lacks == {"class_accuracy"}
