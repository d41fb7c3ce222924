"""The forecast of memory against what was allocated: by ZeRO stage, precision and checkpointing, on a CPU."""

import pytest
import torch

from tests.memory import live_bytes, peak_bytes
from tests.ranks import run_ranks
from tests.tiny import DEMO
from uvit_dist import forecast
from uvit_dist.config_yaml import load_config

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
MICRO, PASSES, RANKS = 8, 2, 2


def config_of(*options):
    """Wide enough that ZeRO-3 shards the matrices; its smaller parameters stay whole on every rank."""
    network = ["img_size=16", "embed_dim=384", "depth=4", "num_heads=6"]
    return load_config(
        DEMO,
        [
            *(f"model.{item}" for item in network), "data.image_size=64", "data.lanes=2", "zero.bucket_size=1000000",
            f"train.global_batch_size={MICRO * PASSES * RANKS}", f"train.micro_batch_size={MICRO}",
            "optimizer.warmup_steps=0", f"launch.processes_per_node={RANKS}", *options,
        ],
    )  # fmt: skip


def memory_job(config):
    """Bytes between steps, and at most during one, that the engine takes on this rank."""
    from uvit_dist import dist
    from uvit_dist.engine import Engine
    from uvit_dist.models.uvit import UViT

    ranks = dist.ranks_from_environment()
    dist.start(ranks, 60)
    before = live_bytes()
    engine = Engine(UViT(**config.model.model_dump()), config, ranks)
    draw = torch.Generator().manual_seed(ranks.rank)
    pieces = [(torch.randn(MICRO, 4, 16, 16, generator=draw), torch.rand(MICRO, generator=draw)) for _ in range(PASSES)]
    labels = torch.zeros(MICRO, dtype=torch.long)

    def step():
        engine.train_step(pieces, lambda net, piece: net(*piece, y=labels).float().square().mean(), lambda *_: True)

    step()  # the first makes what all later ones keep
    step()
    held = live_bytes() - before
    return held, held + peak_bytes(step)


@pytest.mark.parametrize("kind", list(forecast.KEPT), ids=str)
@pytest.mark.parametrize(
    ("stage", "precision"),
    [*((stage, "fp32") for stage in range(4)), (0, "bf16_autocast"), (1, "bf16_autocast"), (3, "bf16_autocast"),
     *((stage, "bf16") for stage in range(1, 4))],
)  # fmt: skip
def test_memory_is_as_forecast(stage, precision, kind):
    config = config_of(
        f"zero.stage={stage}", f"train.precision={precision}", f"model.use_checkpoint={str(kind).lower()}"
    )
    held, peak = run_ranks(memory_job, RANKS, config)[0]
    said = forecast.gpu_memory(config.model, config.train, config.zero, RANKS, MICRO)
    assert said.weights + said.optimizer == pytest.approx(held, rel=0.03)
    assert said.total - said.allowance == pytest.approx(peak, rel=0.05)
