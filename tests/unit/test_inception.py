"""Inception features: equal to pytorch-fid's own network on the same weights; the file's hash; errors."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import pytorch_fid.inception
import torch
import torchvision
from PIL import Image
from pytorch_fid.fid_score import calculate_fid_given_paths
from pytorch_fid.inception import InceptionV3
from torch.nn.functional import interpolate
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from data_tools import fid_reference
from data_tools.fid_reference import write_reference
from tests.inception_weights import StateDict, random_weights
from tests.tiny import tiny_config
from uvit_dist.errors import DataError, MissingInputError
from uvit_dist.evaluation.reference import read_reference
from uvit_dist.fid import frechet_distance
from uvit_dist.models.features import EXTRACTORS, to_unit_range
from uvit_dist.models.inception import FEATURES, Inception, load_inception, resize_as_tensorflow_1
from uvit_dist.scores.kinds import PIXELS, POOL, WIDTHS


@pytest.fixture(scope="module")
def weights() -> StateDict:
    return random_weights()


@pytest.fixture(scope="module")
def theirs(weights: StateDict) -> InceptionV3:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: weights)
        return InceptionV3([3]).eval()


@pytest.fixture(scope="module")
def file(weights: StateDict, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    with path.open("rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()
    path = path.rename(path.with_name(f"random-2015-12-05-{digest[:8]}.pth"))
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def ours(file: Path) -> Inception:
    return load_inception(file)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    drawn = torch.Generator().manual_seed(1)
    noise = torch.randint(0, 256, (3, 3, 40, 32), generator=drawn, dtype=torch.uint8)
    noise[1] //= 4
    noise[2, :, 20:] = 255
    return noise


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.slow
def test_features_are_pytorch_fids(ours: Inception, theirs: InceptionV3, images: torch.Tensor) -> None:
    (features,) = ours(images).values()
    expected = theirs(images.float() / 255)[0].flatten(1)
    assert (features.shape, features.dtype) == ((3, FEATURES), torch.float32)
    assert relative_difference(features, expected) < 1e-5
    assert relative_difference(features[0], features[1]) > 0.01
    assert relative_difference(features[0], features[2]) > 0.01


@pytest.mark.slow
def test_features_of_adms_protocol_are_torch_fidelitys(file: Path, images: torch.Tensor) -> None:
    ours = load_inception(file, WIDTHS)
    kinds = ["2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3("theirs", kinds, feature_extractor_weights_path=str(file))
    features, (pool, logits) = ours(images), theirs(images)
    assert {kind: value.shape[1] for kind, value in features.items()} == WIDTHS
    assert relative_difference(features["adm_pool3"], pool) < 1e-5
    assert relative_difference(features["adm_logits"], logits) < 1e-5
    assert relative_difference(features["adm_pool3"], features["pool3"]) > 1e-3  # the control: another resize

    kept: list[torch.Tensor] = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: kept.append(output))
    theirs(images[:1])
    spatial = features["adm_spatial"].view(-1, 17, 17, 7)
    assert relative_difference(spatial[:1], kept[0][:, :7].permute(0, 2, 3, 1)) < 1e-5


@pytest.mark.parametrize("size", [(32, 64), (299, 300), (512, 17)])
def test_resize_is_tensorflows(size: tuple[int, int]) -> None:
    images = torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(2)).float()
    theirs = interpolate_bilinear_2d_like_tensorflow1x(images, size=(299, 299), align_corners=False)
    assert torch.equal(resize_as_tensorflow_1(images, 299), theirs)


@pytest.mark.slow
def test_both_protocols_on_64_images(file: Path, theirs: InceptionV3) -> None:
    """The published tools on the same weights and images, all features within 1e-5."""
    drawn = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (64, 3, 32, 32), generator=drawn, dtype=torch.uint8)
    images = (images * torch.rand(64, 3, 1, 1, generator=drawn)).to(torch.uint8)
    ours = load_inception(file, WIDTHS)
    fidelity = FeatureExtractorInceptionV3("f", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file))
    for batch in images.split(16):
        features, (pool, logits) = ours(batch), fidelity(batch)
        assert relative_difference(features[POOL], theirs(batch.float() / 255)[0].flatten(1)) < 1e-5
        assert relative_difference(features["adm_pool3"], pool) < 1e-5
        assert relative_difference(features["adm_logits"], logits) < 1e-5


@pytest.mark.slow
def test_the_whole_path_on_500_images(weights: StateDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two folders of PNG files: pytorch-fid with 192 features, and ours by units of work, moments and distance."""
    draw = np.random.default_rng(0)
    for side in range(2):
        for number in range(500):
            folder = tmp_path / f"{side}"
            folder.mkdir(exist_ok=True)
            size = int(draw.integers(3, 33))
            low = draw.integers(0, draw.integers(60, 200 + 50 * side), (size, size, 3), dtype=np.uint8)
            Image.fromarray(low).resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{number:03d}.png")
    bias = "Conv2d_4a_3x3.bn.bias"  # raised: no channel is zero for all images, and the covariance has full rank
    weights = {**weights, bias: weights[bias] + 2}
    torch.save(weights, tmp_path / "weights.pth")
    network = load_inception(tmp_path / "weights.pth").network
    layers = [network.Conv2d_1a_3x3, network.Conv2d_2a_3x3, network.Conv2d_2b_3x3, network.maxpool1,
              network.Conv2d_3b_1x1, network.Conv2d_4a_3x3, network.maxpool2]  # fmt: skip
    stem = torch.nn.Sequential(*layers)

    def extract(images: torch.Tensor, texts: object = None) -> dict[str, torch.Tensor]:
        scaled = interpolate(to_unit_range(images), size=(299, 299), mode="bilinear", align_corners=False)
        with torch.inference_mode():
            return {PIXELS: stem(2 * scaled - 1).mean((2, 3))}

    monkeypatch.setitem(EXTRACTORS, "pixels_8x8", extract)
    monkeypatch.setattr(fid_reference, "UNIT", 130)
    moments = []
    for side in range(2):
        config = tiny_config(tmp_path, tmp_path / f"run-{side}", "data.format=folder", f"data.source={tmp_path}/{side}",
                             "data.crop=none", "model.num_classes=-1", "diffusion.null_label=null",
                             "diffusion.label_dropout=0", "sample.cfg_scale=0", "evaluate.features=pixels_8x8",
                             "evaluate.scores=[frechet_distance]", "evaluate.sub_batch_size=50",
                             "evaluate.chunk_size=50",
                             f"evaluate.reference={tmp_path}/{side}.npz")  # fmt: skip
        write_reference(config)
        moments.append(read_reference(config, "pixels_8x8").moments[PIXELS])
    ours = frechet_distance(*moments[0], *moments[1])

    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: weights)
    folders = [str(tmp_path / "0"), str(tmp_path / "1")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # sqrtm's argument disp
        theirs = calculate_fid_given_paths(folders, 50, "cpu", 192, num_workers=0)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours > 1e-3


@pytest.mark.slow
def test_torchvisions_own_blocks_would_differ(ours: Inception, weights: StateDict, images: torch.Tensor) -> None:
    network = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    network.load_state_dict(weights)
    assert relative_difference(Inception(network.eval())(images[:1])[POOL], ours(images[:1])[POOL]) > 1e-3


@pytest.mark.slow
def test_frozen_and_fp32_under_autocast(ours: Inception, images: torch.Tensor) -> None:
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = ours(images[:1])[POOL]
    assert torch.equal(features, ours(images[:1])[POOL])
    assert not features.requires_grad
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert torch.backends.cudnn.conv.fp32_precision == precision  # type: ignore[attr-defined]


def test_nothing_is_downloaded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    load_inception(str(file))


def test_floats_are_refused(ours: Inception) -> None:
    with pytest.raises(TypeError, match=r"images of torch\.float32: must be uint8"):
        ours(torch.zeros(1, 3, 8, 8))


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(MissingInputError, match=r"evaluate\.inception.*6726825d\.pth \(about 91 MB\).*fid_weights"):
            load_inception(path)


def test_hash_in_the_name_is_checked(file: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    wrong.symlink_to(file)
    with pytest.raises(DataError, match=rf"SHA-256 begins with {file.stem[-8:]}, and by its name with 6726825d"):
        load_inception(wrong)


def test_wrong_contents(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"not a pickle")
    with pytest.raises(DataError, match="not a file of plain tensors"):
        load_inception(path)
    torch.save({"fc.bias": torch.zeros(1008)}, path)
    with pytest.raises(DataError, match=r"disagree \(Missing key"):
        load_inception(path)
