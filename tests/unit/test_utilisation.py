"""FLOP utilisation: by the data sheets, of model FLOP."""

import pytest

from tests.tiny import ROOT
from uvit_dist.config_yaml import load_config
from uvit_dist.utilisation import peak_tflops, utilisation


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 3090", None),
        ("", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(name, peak):
    assert peak_tflops(name) == peak


def test_utilisation_counts_what_the_model_needs_and_not_what_is_recomputed():
    """U-ViT-H/4 needs 799 GFLOP for an image in training (targets: 266.4 forward), recomputing or not."""
    model = load_config(ROOT / "configs" / "uvit_h_imagenet512.yaml").model
    assert model.use_checkpoint is True
    told = utilisation(model, images_per_s=1000.0, world_size=2, peak=989.0)
    assert told["tflops_per_rank"] == pytest.approx(399.6, rel=2e-3)
    assert told["mfu"] == pytest.approx(0.404, rel=2e-3)
    assert utilisation(model, 1000.0, 2, None) == {"tflops_per_rank": told["tflops_per_rank"]}
