"""C5, C6 and C7: the parts of an evaluation against the official code's.

    make bench-eval OFFICIAL=DIR     DIR: a checkout of https://github.com/baofff/U-ViT

C5: the Fréchet distance of 2048 features from means and covariances; and the memory that a process needs to come from
50,000 features to mean and covariance. C6: images as the decoder gives them to Inception's input: theirs through PNG
files, with the official writer and reader; ours by rounding as that writer does. C7: guided sampling, 50 calls of the
network with DPM-Solver++, from the same weights, noise and labels; the network has S/2's blocks, BLOCKS of them. The
official code is imported as it is; only Inception and the accelerator around it are stand-ins, in C5 and C6. In C7
each side has a process of its own, as its users have it. Sides take turns within each round; a ratio is the median over
rounds. The gates run first.
Exit code 1 below "pass" or where a gate fails, 2 without the official code.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import ROOT, commit_of
from benchmarks.rounds import AT_LEAST, Apart, Side, keep, ratios, result, rounds, show, timed
from uvit_dist.diffusion.guidance import noise_predictor
from uvit_dist.diffusion.schedule import SCHEDULES
from uvit_dist.diffusion.solvers import dpm_solver_pp
from uvit_dist.fid import FeatureMoments, frechet_distance
from uvit_dist.host_memory import keep_memory
from uvit_dist.models.cpu import for_inference
from uvit_dist.models.features import to_uint8, to_unit_range
from uvit_dist.models.uvit import UViT

COMMAND = "make bench-eval OFFICIAL=DIR"
DIM, FULL, FEW, STREAM = 2048, 10_000, (500, 400), 50_000
"""Features; samples of the full-rank covariances, of the rank-deficient ones, and of the stream."""
IMAGES, SIDE_PX, BATCH = 500, 512, 50
STEPS, SCALE, CLASSES, BLOCKS = 50, 0.4, 1000, 3
FEWEST_B2 = 3 * AT_LEAST
"""Rounds of C7 with 2 images, whatever was asked: on some machines a single one is off by a fifth."""
NETWORK: dict[str, Any] = {"img_size": 32, "patch_size": 2, "in_chans": 4, "embed_dim": 512, "depth": BLOCKS - 1,
                           "num_heads": 8, "num_classes": CLASSES + 1, "conv": False}  # fmt: skip
LIMITS = {
    "C5": {"vs_reference": (12, 20), "memory_ratio": (0.1, 0.1)},
    "C6": {"vs_official": (20, 50)},
    "C7": {"b16": (1.05, 1.05), "b2": (1.2, 1.2)},
}
"""Of each ratio, pass and stretch."""
Moments = tuple[NDArray[np.float64], NDArray[np.float64]]


def official_module(official: Path, name: str) -> ModuleType:
    """A module of the official checkout."""
    if str(official) not in sys.path:
        sys.path.insert(0, str(official))
    return importlib.import_module(name)


# -- C5 ----------------------------------------------------------------------------------------------------------------


def drawn(count: int, seed: int) -> NDArray[np.float64]:
    """Features (count, DIM), never negative, of spreads over two orders of magnitude, related through 64 factors."""
    draw = np.random.default_rng(seed)
    loads = np.random.default_rng(0).standard_normal((64, DIM)) * 0.1
    spread = np.geomspace(0.02, 2, DIM)
    values = draw.standard_normal((count, 64)) @ loads + draw.standard_normal((count, DIM)) * spread * (1 + 0.05 * seed)
    return np.maximum(values + 0.3 + 0.02 * seed, 0)


def moments_of(features: NDArray[np.float64]) -> Moments:
    """Mean and covariance."""
    return features.mean(0), np.cov(features, rowvar=False)


def exact_distance(one: NDArray[np.float64], two: NDArray[np.float64]) -> float:
    """By eigenvalues of a matrix as small as the smaller set: with factors of the covariances, tr (S1 S2)^½ is the sum
    of the roots of the eigenvalues of (A Bᵀ)(A Bᵀ)ᵀ."""
    a, b = ((side - side.mean(0)) / np.sqrt(len(side) - 1) for side in (two, one))
    product = a @ b.T
    roots = np.sqrt(np.linalg.eigvalsh(product @ product.T).clip(0)).sum()
    means = ((one.mean(0) - two.mean(0)) ** 2).sum()
    return float(means + (a**2).sum() + (b**2).sum() - 2 * roots)


def relative(value: float, right: float) -> float:
    """How far apart."""
    return abs(value - right) / abs(right)


def peak_bytes(official: Path, side: str) -> int:
    """Memory that the process ``side`` needed more than before it began."""
    command = [sys.executable, "-m", "benchmarks.evaluation", "--official", str(official), "--memory-of", side]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()[-1])


def memory_of(official: Path, side: str) -> int:
    """What peak_bytes measures, in this process: from STREAM features, in batches, to mean and covariance."""
    fid_score = official_module(official, "tools.fid_score")
    torch.zeros(4, 4).double().addmm_(torch.ones(4, 4).double(), torch.ones(4, 4).double())
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here: getrusage's includes that of the parent
    before = resident_bytes("VmRSS")
    draw = np.random.default_rng(1)
    if side == "ours":
        moments = FeatureMoments(DIM)
        for _ in range(0, STREAM, BATCH):
            moments.update(torch.from_numpy(draw.standard_normal((BATCH, DIM), dtype=np.float32)))
        assert moments.mean.shape == (DIM,)
        assert moments.covariance.shape == (DIM, DIM)
    else:

        def get_activations(files: list[str], *_: object) -> NDArray[np.float64]:
            out = np.empty((len(files), DIM))  # as theirs
            for first in range(0, len(files), BATCH):
                out[first : first + BATCH] = draw.standard_normal((BATCH, DIM), dtype=np.float32)
            return out

        fid_score.get_activations = get_activations  # type: ignore[attr-defined]
        fid_score.calculate_activation_statistics([""] * STREAM, None)
    return resident_bytes("VmHWM") - before


def resident_bytes(which: str) -> int:
    """Memory of this process: VmRSS, what it holds now; VmHWM, the most it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{which}:"))
    return int(kilobytes) << 10


def c5(official: Path, count: int) -> dict[str, Any]:
    """The result of C5."""
    fid_score = official_module(official, "tools.fid_score")
    full = [moments_of(drawn(FULL, seed)) for seed in (1, 2)]
    few = [drawn(number, seed) for seed, number in enumerate(FEW, 1)]
    deficient, exact = [moments_of(side) for side in few], exact_distance(*few)

    def theirs(pair: list[Moments]) -> float:
        return float(fid_score.calculate_frechet_distance(*pair[0], *pair[1]))

    def ours(pair: list[Moments]) -> float:
        return frechet_distance(*pair[0], *pair[1])

    errors = {
        "full rank, of the reference": relative(ours(full), theirs(full)),
        "rank deficient, of the exact form": relative(ours(deficient), exact),
        "rank deficient, of the reference": relative(ours(deficient), theirs(deficient)),
    }
    limits = dict(zip(errors, (1e-6, 1e-6, 1e-3), strict=True))
    gates = {f"{name}: at most {limits[name]:g}": error <= limits[name] for name, error in errors.items()}

    def side(distance: Callable[[list[Moments]], float], pair: list[Moments]) -> Side:
        return lambda: timed(lambda: int(distance(pair) >= 0))

    found = rounds({"ours": side(ours, full), "official": side(theirs, full), "ours_deficient": side(ours, deficient)},
                   count)  # fmt: skip
    memory = {name: [float(peak_bytes(official, name))] for name in ("ours", "official")}
    against = {
        "vs_reference": ratios(found["ours"], found["official"]),
        "memory_ratio": ratios(memory["ours"], memory["official"]),
        "deficient_vs_full_reference": ratios(found["ours_deficient"], found["official"]),
    }
    return result("C5", LIMITS["C5"], against, gates, {"unit": "distances/s; memory: bytes", **found, "memory": memory},
                  {"dim": DIM, "samples": FULL, "rank_deficient_samples": FEW, "stream": STREAM, "batch": BATCH,
                   "precision": "fp64", "threads": torch.get_num_threads()},
                  COMMAND, at_most=("memory_ratio",), errors=errors, official=commit_of(official))  # fmt: skip


# -- C6 ----------------------------------------------------------------------------------------------------------------


def decoded(batch: int) -> Tensor:
    """What a decoder might give, (BATCH, 3, SIDE_PX, SIDE_PX) float32 about [-1, 1]: smooth, noisy, some beyond."""
    draw = torch.Generator().manual_seed(batch)
    coarse = torch.randn(BATCH, 3, SIDE_PX // 16, SIDE_PX // 16, generator=draw) * 0.6
    smooth = torch.nn.functional.interpolate(coarse, scale_factor=16, mode="bicubic")
    return smooth + 0.03 * torch.randn(smooth.shape, generator=draw)


def png_path(official: Path, batches: list[Tensor], directory: Path) -> list[Tensor]:
    """Theirs: all samples to PNG files, and from these the batches that Inception sees, (B, 3, H, W) float32."""
    utils, fid_score = official_module(official, "utils"), official_module(official, "tools.fid_score")
    alone = SimpleNamespace(num_processes=1, is_main_process=True, gather=lambda samples: samples)
    samples = iter(batches)
    unpreprocess = official_module(official, "datasets").DatasetFactory.unpreprocess
    utils.sample2dir(alone, str(directory), IMAGES, BATCH, lambda _: next(samples), lambda v: unpreprocess(None, v))
    files = [str(directory / f"{number}.png") for number in range(IMAGES)]
    dataset = fid_score.ImagePathDataset(files, transforms=fid_score.TF.ToTensor())
    return list(torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=8))


def direct_path(batches: list[Tensor]) -> list[Tensor]:
    """Ours: the same batches, rounded to uint8 and back."""
    return [to_unit_range(to_uint8(batch)) for batch in batches]


def c6(official: Path, count: int, directory: Path) -> dict[str, Any]:
    """The result of C6."""
    batches = [decoded(number) for number in range(IMAGES // BATCH)]
    ours, theirs = direct_path(batches), png_path(official, batches, directory)
    equal = all(
        torch.equal((a * 255).round().to(torch.uint8), (b * 255).round().to(torch.uint8)) and torch.equal(a, b)
        for a, b in zip(ours, theirs, strict=True)
    )
    extremes = {int(value) for batch in batches[:1] for value in (to_uint8(batch).min(), to_uint8(batch).max())}
    gates = {"uint8 equal bit for bit": equal, "images reach black and white": extremes == {0, 255}}
    del ours, theirs

    def official_side() -> int:
        return sum(map(len, png_path(official, batches, directory)))

    def our_side() -> int:
        return sum(len(direct_path([batch])[0]) for batch in batches)

    found = rounds({"ours": lambda: timed(our_side), "official": lambda: timed(official_side)}, count)
    return result("C6", LIMITS["C6"], {"vs_official": ratios(found["ours"], found["official"])}, gates,
                  {"unit": "images/s", **found}, {"images": IMAGES, "side": SIDE_PX, "batch": BATCH,
                                                  "official_reading_processes": 8}, COMMAND,
                  official=commit_of(official))  # fmt: skip


# -- C7 ----------------------------------------------------------------------------------------------------------------


def official_sampler(official: Path, network: torch.nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Noise (B, C, H, W) and labels (B,) to samples, as in the official evaluation of the H systems."""
    solver = official_module(official, "dpm_solver_pp")
    betas = torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2
    schedule = solver.NoiseScheduleVP(schedule="discrete", betas=betas.float())

    @torch.no_grad()
    def sample(noise: Tensor, labels: Tensor) -> Tensor:
        def model(x: Tensor, t: Tensor) -> Tensor:
            cond = network(x, t * 1000, y=labels)
            uncond = network(x, t * 1000, y=torch.tensor([CLASSES] * x.size(0)))
            return cond + SCALE * (cond - uncond)

        return solver.DPM_Solver(model, schedule, predict_x0=True, thresholding=False).sample(
            noise, steps=STEPS, eps=1 / 1000, T=1.0
        )

    return sample


def our_sampler(network: torch.nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The same, ours."""
    schedule, network = SCHEDULES["discrete_sd"](), for_inference(network)

    @torch.inference_mode()
    def sample(noise: Tensor, labels: Tensor) -> Tensor:
        null = {"y": torch.tensor([CLASSES])}
        return dpm_solver_pp(
            noise_predictor(network, schedule.network_time, {"y": labels}, null, SCALE), schedule, noise, STEPS
        )

    return sample


def samplers(official: Path) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Both sides' samplers with the same drawn weights."""
    torch.manual_seed(0)
    theirs = official_module(official, "libs.uvit").UViT(**NETWORK).eval()
    ours = UViT(**NETWORK).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    return {"ours": our_sampler(ours), "official": official_sampler(official, theirs)}


def inputs_of(batch: int) -> tuple[Tensor, Tensor]:
    """Noise (batch, 4, H, W) and labels (batch,)."""
    draw = torch.Generator().manual_seed(batch)
    noise = torch.randn(batch, 4, NETWORK["img_size"], NETWORK["img_size"], generator=draw)
    return noise, torch.randint(0, CLASSES, (batch,), generator=draw)


def c7_side(official: Path, name: str, batch: int, threads: int) -> Side:
    """Images in a second of one side, in a process as its users have it."""
    torch.set_num_threads(threads)
    if name == "ours":
        keep_memory()
    sampler, inputs = samplers(official)[name], inputs_of(batch)
    return lambda: timed(lambda: len(sampler(*inputs)))


def c7(official: Path, count: int) -> dict[str, Any]:
    """The result of C7."""
    noise, labels = inputs_of(2)
    sides = samplers(official)
    x0 = {name: sample(noise, labels) for name, sample in sides.items()}
    error = (x0["ours"] - x0["official"]).abs().max().item()
    other = (sides["ours"](noise, (labels + 1) % CLASSES) - x0["official"]).abs().max().item()
    gates = {"samples differ by at most 1e-4": error <= 1e-4, "control: those of other labels differ": other > 1e-3}
    found: dict[str, dict[str, list[float]]] = {}
    for batch in (2, 16):
        apart = {name: Apart(c7_side, official, name, batch, torch.get_num_threads()) for name in sides}
        found[f"b{batch}"] = rounds(apart, max(count, FEWEST_B2) if batch == 2 else count)
        for side in apart.values():
            side.close()
    against = {name: ratios(found[name]["ours"], found[name]["official"]) for name in ("b16", "b2")}
    return result("C7", LIMITS["C7"], against, gates, {"unit": "images/s", **found},
                  {"network": NETWORK, "steps": STEPS, "cfg_scale": SCALE, "precision": "fp32",
                   "threads": torch.get_num_threads()}, COMMAND, error=error, official=commit_of(official))  # fmt: skip


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--official", type=Path, required=True, help="checkout of github.com/baofff/U-ViT")
    parser.add_argument("--only", choices=("C5", "C6", "C7"), help="one of them")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds")
    parser.add_argument("--threads", type=int, default=2, help="of each side")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--memory-of", choices=("ours", "official"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    official = arguments.official.resolve()
    if not (official / "libs" / "uvit.py").is_file():
        print(f"error: {arguments.official}: no checkout of github.com/baofff/U-ViT; {COMMAND}", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # sqrtm's argument disp
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(memory_of(official, arguments.memory_of))
        return 0
    passed = True
    for name in ("C5", "C6", "C7") if arguments.only is None else (arguments.only,):
        with tempfile.TemporaryDirectory() as directory:
            record = (
                c5(official, arguments.rounds) if name == "C5"
                else c6(official, arguments.rounds, Path(directory)) if name == "C6"
                else c7(official, arguments.rounds)
            )  # fmt: skip
        show(record)
        keep(record, arguments.out)
        passed = passed and record["passed"]
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
