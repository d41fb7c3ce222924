"""G0 to G8: ceilings, training, sampling, autoencoder and saves of U-ViT-H/4 on one GPU, in one call.

    make bench-gpu                    nine minutes at most; --budget-s changes that
    make bench-gpu OFFICIAL=DIR       with the official code on the same GPU, from https://github.com/baofff/U-ViT
    python -m benchmarks.gpu --tiny   the same at tiny size, on a CPU too: whether it runs, no figure counts

Weights are random, the shards of latents are made here. Each part is tried by itself: what fails, or comes after the
time is over, is said and the others go on. A rate is the median of its repetitions, after warm-ups, with the GPU's work
awaited on both sides. The way to train (checkpointing, compiling, the attention's back end) is chosen by measuring it.
FLOPs of a training step are three times the forward pass's, counted from the network's shape: recomputation is no use.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import provenance
from benchmarks.gpu_official import Official
from benchmarks.gpu_sampling import sampling
from benchmarks.gpu_session import DEVICE, FULL, TINY, Session, Size, seconds
from benchmarks.gpu_training import against_official, saves, training
from uvit_dist import dist
from uvit_dist.acceleration import KERNELS


def ceilings(session: Session) -> None:
    """G0: what the GPU does in the best case."""
    size = session.size
    n = size.product
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    rate = 2.0 * n**3 / seconds(lambda: a @ b, size.repeat)
    session.found["product"] = rate
    session.tell(f"G0 product {n}^3 bf16, TFLOP/s", rate / 1e12)
    source = torch.empty(n * n, device=DEVICE, dtype=torch.float32)
    target = torch.empty_like(source)
    copied = 2.0 * source.nbytes / seconds(lambda: target.copy_(source), size.repeat)
    session.tell("G0 copy, read and written, GB/s", copied / 1e9)
    dim, rows = size.network["embed_dim"], size.gemm_rows
    shapes = (("qkv", dim, 3 * dim), ("proj", dim, dim), ("fc1", dim, 4 * dim), ("fc2", 4 * dim, dim))
    for name, k, m in shapes:
        x = torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16)
        w = torch.randn(k, m, device=DEVICE, dtype=torch.bfloat16)
        rate = 2.0 * rows * k * m / seconds(lambda x=x, w=w: x @ w, size.repeat)
        session.tell(f"G0 product {name} ({rows}, {k}, {m}) bf16, TFLOP/s", rate / 1e12)
    batch, heads, tokens, each = size.attention
    shape = (batch, heads, tokens, each)
    q, k_, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    flop = 3.5 * 4.0 * batch * heads * tokens * tokens * each
    rates = {}
    for name, backend in KERNELS.items():

        def both(backend: SDPBackend = backend) -> None:
            with sdpa_kernel([backend]):
                scaled_dot_product_attention(q, k_, v).sum().backward()

        try:
            rates[name] = flop / seconds(both, size.repeat)
        except RuntimeError as error:
            print(f"G0 attention by {name}: not here ({str(error).splitlines()[0][:80]})", flush=True)
    for name, rate in rates.items():
        session.tell(f"G0 attention {size.attention} forward and backward, {name}, TFLOP/s", rate / 1e12)
    session.found["attention"] = max(rates, key=lambda name: rates[name])


PARTS: tuple[Callable[[Session], None], ...] = (ceilings, training, against_official, saves, sampling)


def measure(size: Size, directory: Path, official: Path | None, budget_s: float) -> dict[str, Any]:
    """All parts, as far as the time goes. Returns the record."""
    began = time.monotonic()
    other = Official(official, size.network, DEVICE) if official is not None else None
    session = Session(size, directory, other)
    failed: dict[str, str] = {}
    dist.start(dist.Ranks(), 600)
    for part in PARTS:
        if time.monotonic() - began > budget_s:
            failed[part.__name__] = "the time was over"
            continue
        try:
            part(session)
        except Exception as error:  # noqa: BLE001 - the other parts are worth having
            traceback.print_exc()
            failed[part.__name__] = f"{type(error).__name__}: {error}"
    dist.stop()
    for name, reason in failed.items():
        print(f"{name}: not measured: {reason}", flush=True)
    where = provenance()
    if DEVICE.type == "cuda":
        where["versions"] |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return {
        "id": "gpu",
        "figures": session.rows,
        "ways": session.found.get("ways", []),
        "not_measured": failed,
        "setting": {"tiny": size is TINY, **size.__dict__},
        "seconds": time.monotonic() - began,
        **where,
    }


def main() -> int:
    """Returns the exit code: 1 where a part was not measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny size: whether it runs")
    parser.add_argument("--official", help="checkout of the official code")
    parser.add_argument("--budget-s", type=float, default=480, help="seconds after which no further part begins")
    parser.add_argument("--out", type=Path, help="file of the result, JSON")
    arguments = parser.parse_args()
    if DEVICE.type != "cuda" and not arguments.tiny:
        print("error: no GPU here; --tiny runs on a CPU, to see whether all parts run", file=sys.stderr)
        return 2
    official = Path(arguments.official).resolve() if arguments.official else None
    with tempfile.TemporaryDirectory() as name:
        record = measure(TINY if arguments.tiny else FULL, Path(name), official, arguments.budget_s)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if record["not_measured"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
