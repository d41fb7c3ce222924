"""How much of a GPU's arithmetic a training makes use of."""

from __future__ import annotations

from uvit_dist.config import ModelConfig
from uvit_dist.forecast import forward_flop

PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
}
"""Part of a GPU's name → dense bf16 peak by its maker's data sheet, TFLOP/s. The first that fits counts."""


def peak_tflops(gpu: str) -> float | None:
    """Dense bf16 peak of a GPU by its name, as torch tells it, TFLOP/s; none where it is not known."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in gpu), None)


def utilisation(model: ModelConfig, images_per_s: float, world_size: int, peak: float | None) -> dict[str, float]:
    """``tflops_per_rank`` of all ranks' images per second and, where the peak is known, TFLOP/s, ``mfu``, its share.

    Model FLOP: three times the forward pass's for an image. What is recomputed, and what precedes the network, does not
    count.
    """
    tflops = 3 * forward_flop(model) * images_per_s / world_size / 1e12
    return {"tflops_per_rank": tflops} if peak is None else {"tflops_per_rank": tflops, "mfu": tflops / peak}
