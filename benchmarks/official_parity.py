"""Twenty training steps of ours against the official U-ViT code, from equal weights and equal batches.

    git clone https://github.com/baofff/U-ViT DIR && git -C DIR checkout ce55170
    .venv/bin/pip install --constraint constraints.txt --editable '.[dev,parity]'
    OFFICIAL=DIR .venv/bin/python -m benchmarks.official_parity --out benchmarks/results/official_parity.json

The official code is imported as it is: its network, train state, optimizer, rate, EMA, schedules and losses do the
reference steps. Its random draws are recorded, and our Engine and objective make the same steps from them, in fp32.
The same gate then judges negative controls, ours with one thing altered, and must fail each. Exit code 0 only then.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import ROOT, commit_of, provenance
from uvit_dist import dist, engine
from uvit_dist.config_yaml import load_config
from uvit_dist.errors import MissingInputError, explained_exit
from uvit_dist.guard import Guard
from uvit_dist.loss import Example, Objective
from uvit_dist.models.uvit import UViT

RANKS = dist.Ranks()
REPOSITORY, COMMIT = "https://github.com/baofff/U-ViT", "ce55170"
STEPS, WARMUP, BATCH, SEED = 20, 5, 16, 1234
GATE = {"losses": 1e-5, "weights": 1e-3, "ema": 1e-3}
"""Of each loss, relative; of each tensor, the norm of the difference over that of what the official code changed."""

Tensors = Mapping[str, Tensor]
Modules = Mapping[str, ModuleType]
Draw = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]
"""One batch as the official code noised it: x0, time (n or t), noise, conditions."""
RATE = engine.learning_rate
SMALL: dict[str, Any] = {"img_size": 16, "patch_size": 2, "in_chans": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}


@dataclass(frozen=True)
class Case:
    """system: whose optimizer section the official side takes; ema: fp32 resolves 0.9 in 20 steps, not so 0.9999."""

    name: str
    system: str
    net: Mapping[str, Any]
    stage: int
    continuous: bool = False
    betas: str = "[0.99, 0.99]"
    ema: float = 0.9
    ema_gated: bool = True


LABELS = Case("discrete, labels", "imagenet256_uvit_huge", {**SMALL, "num_classes": 11, "conv": False}, 0)
PIXELS = {**SMALL, "img_size": 32, "patch_size": 4, "in_chans": 3, "mlp_time_embed": True}
TEXT = {**SMALL, "clip_dim": 64, "num_clip_token": 16}
CASES = (
    LABELS,
    Case("discrete, text", "mscoco_uvit_small", TEXT, 1, betas="[0.9, 0.9]"),
    Case("continuous, labels", "imagenet256_uvit_large", {**SMALL, "num_classes": 11}, 2, continuous=True),
    Case("continuous, pixels", "celeba64_uvit_small", PIXELS, 3, continuous=True),
    replace(LABELS, name="EMA 0.9999, EMA not gated", ema=0.9999, ema_gated=False),
)


@dataclass(frozen=True)
class Run:
    """Loss of each step, weights and EMA after the last; exact_ema: of the weights of each step, in float64."""

    losses: list[float]
    weights: Tensors
    ema: Tensors
    exact_ema: Tensors


def official_directory() -> Path:
    """Where OFFICIAL says the official code lies. Raises ``MissingInputError``."""
    value = os.environ.get("OFFICIAL", "")
    if not value or not Path(value, "libs", "uvit_t2i.py").is_file():
        raise MissingInputError(
            f"OFFICIAL={value}: no official code there; git clone {REPOSITORY} DIR && git -C DIR checkout {COMMIT}"
        )
    return Path(value).resolve()


def official_modules(directory: Path) -> Modules:
    """The modules of the official code by name. Raises ``MissingInputError`` where something they import is absent."""
    names = ["utils", "sde", "libs.uvit", "libs.uvit_t2i", "train_ldm_discrete", "train_t2i_discrete"]
    modules = {}
    try:
        from absl import flags

        importlib.import_module("accelerate")  # before DIR/datasets.py could be taken for a package of that name
        with mock.patch.object(sys, "path", [str(directory), *sys.path]):
            for name in names + sorted({f"configs.{case.system}" for case in CASES}):
                modules[name] = importlib.import_module(name)
                for flag in {"config", "workdir"} & set(flags.FLAGS):  # each script defines the same ones
                    delattr(flags.FLAGS, flag)
    except ModuleNotFoundError as error:
        raise MissingInputError(
            f"{error.name}: the official code imports it; .venv/bin/pip install --editable '.[dev,parity]' installs it"
        ) from None
    for name, module in modules.items():
        assert Path(str(module.__file__)).is_relative_to(directory), f"{name} is another module: {module.__file__}"
    return modules


def batches(net: Mapping[str, Any]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """x0 and conditions of every step, on the device; pixels lie in [-1, 1]."""
    draw = torch.Generator().manual_seed(SEED)
    shape = (BATCH, net["in_chans"], net["img_size"], net["img_size"])
    for _ in range(STEPS):
        x0 = torch.rand(shape, generator=draw) * 2 - 1 if shape[1] == 3 else torch.randn(shape, generator=draw)
        labels = {"y": torch.randint(net["num_classes"], (BATCH,), generator=draw)} if "num_classes" in net else {}
        text = (BATCH, net.get("num_clip_token", 0), net.get("clip_dim", 0))
        condition = labels | ({"context": torch.randn(text, generator=draw)} if text[1] else {})
        yield x0.to(RANKS.device), {name: value.to(RANKS.device) for name, value in condition.items()}


def official_loss(case: Case, modules: Modules, net: nn.Module) -> tuple[Callable[..., Tensor], Any]:
    """The official loss as a function of (x0, conditions), and the object that draws time and noise."""
    if case.continuous:
        sde = modules["sde"]
        model = sde.ScoreModel(net, pred="noise_pred", sde=sde.VPSDE())
        return lambda x0, **condition: sde.LSimple(model, x0, pred="noise_pred", **condition), model.sde
    script = modules["train_t2i_discrete" if "clip_dim" in case.net else "train_ldm_discrete"]
    schedule = script.Schedule(script.stable_diffusion_beta_schedule())
    return lambda x0, **condition: script.LSimple(x0, net, schedule, **condition), schedule


def run_official(case: Case, modules: Modules) -> tuple[Tensors, list[Draw], Run]:
    """Train with the official code: the weights it started from, what it drew, what it made."""
    utils, settings = modules["utils"], modules[f"configs.{case.system}"].get_config()
    settings.nnet = {"name": "uvit_t2i" if "clip_dim" in case.net else "uvit", **case.net}
    settings.lr_scheduler.warmup_steps = WARMUP
    utils.set_seed(SEED)
    state = utils.initialize_train_state(settings, RANKS.device)
    start = {name: value.clone() for name, value in state.nnet.state_dict().items()}
    exact = {name: value.double() for name, value in start.items()}
    loss_of, sampler = official_loss(case, modules, state.nnet)
    losses: list[float] = []
    draws: list[Draw] = []
    drawn: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    sample = sampler.sample
    sampler.sample = lambda x0: drawn.setdefault(len(drawn), sample(x0))
    for x0, condition in batches(case.net):
        state.optimizer.zero_grad()
        loss = loss_of(x0, **condition).mean()
        loss.backward()
        state.optimizer.step()
        state.lr_scheduler.step()
        state.ema_update(case.ema)
        draws.append((x0, *drawn[len(losses)][:2], condition))
        losses.append(loss.item())
        for name, value in state.nnet.state_dict().items():
            exact[name].lerp_(value.double(), 1 - case.ema)
    return start, draws, Run(losses, state.nnet.state_dict(), state.nnet_ema.state_dict(), exact)


@dataclass(frozen=True)
class Control:
    """One thing altered in ours. earlier: what is subtracted from n; patch: entered around the run."""

    name: str
    options: tuple[str, ...] = ()
    patch: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    earlier: int = 0


class NoDecayOnVectors(torch.optim.AdamW):
    """AdamW whose one-dimensional parameters do not decay."""

    def __init__(self, params: Any, **options: Any) -> None:
        groups = [{"params": [p], **({"weight_decay": 0.0} if p.dim() == 1 else {})} for p in params]
        super().__init__(groups, **options)


def late_rate(step: int, lr: float, warmup_steps: int) -> float:
    """The rate of the step before."""
    return RATE(max(step - 1, 0), lr, warmup_steps)


CONTROLS = (
    Control("beta2 0.999", ("optimizer.betas=[0.99, 0.999]",)),
    Control("no decay on vectors", patch=lambda: mock.patch("torch.optim.AdamW", NoDecayOnVectors)),
    Control("rate one step late", patch=lambda: mock.patch.object(engine, "learning_rate", late_rate)),
    Control("n from 0 to 999", earlier=1),
    Control("EMA with warm-up", ("ema.warmup=true",)),
)


def run_ours(case: Case, draws: list[Draw], start: Tensors, altered: Control) -> Run:
    """Train with our Engine and objective on the recorded draws."""
    options = [
        "optimizer.lr=2e-4", f"optimizer.betas={case.betas}", "optimizer.weight_decay=0.03",
        f"optimizer.warmup_steps={WARMUP}", f"ema.decay={case.ema}", "ema.warmup=false", "train.precision=fp32",
        f"train.global_batch_size={BATCH}", f"train.micro_batch_size={BATCH}", "launch.processes_per_node=1",
        f"zero.stage={case.stage}", f"diffusion.schedule={'vpsde' if case.continuous else 'discrete_sd'}",
        *altered.options,
    ]  # fmt: skip
    config = load_config(ROOT / "configs" / "digits_demo.yaml", options)
    objective, net = Objective(config), UViT(**case.net)
    net.load_state_dict(dict(start))

    def loss_of(net: nn.Module, draw: Draw) -> Tensor:
        x0, time, noise, condition = draw
        asked = Example(x0, noise, time - altered.earlier, condition.get("y"), condition.get("context"))
        return objective.losses(net, asked).mean()

    guard = Guard(config.guard)
    with altered.patch():
        trainer = engine.Engine(net, config, RANKS)
        losses = [trainer.train_step([draw], loss_of, guard.admits).loss for draw in draws]
    parts = {tuple(key.split("/")): value.clone() for key, value in trainer.local_state().items()}
    weights, ema = ({k[1]: v for k, v in parts.items() if k[0] == kind} for kind in ("master", "ema"))
    return Run(losses, weights, ema, {})


def _ratio(off: float, scale: float) -> float:
    return off / scale if scale > 0 and math.isfinite(off) else math.inf


def worst(ours: Tensors, official: Tensors, start: Tensors) -> tuple[str, float]:
    """The tensor whose change differs most, and by how much; infinity where the official code changed nothing."""
    if not ours.keys() == official.keys() == start.keys():
        return "other names", math.inf
    ratios = {}
    for name in start:
        a, b, s = (tensors[name].detach().double().flatten() for tensors in (ours, official, start))
        ratios[name] = _ratio((a - b).norm().item(), (b - s).norm().item())
    return max(ratios.items(), key=lambda item: item[1])


def gate(ours: Run, official: Run, start: Tensors) -> dict[str, Any]:
    """The one judge of cases and controls: the worst of each kind, and what fails."""
    losses = max(_ratio(abs(a - b), abs(b)) for a, b in zip(ours.losses, official.losses, strict=True))
    weights, ema = worst(ours.weights, official.weights, start), worst(ours.ema, official.ema, start)
    value = {"losses": losses, "weights": weights[1], "ema": ema[1]}
    off = [worst(run.ema, official.exact_ema, start)[1] for run in (ours, official)]
    found = {"tensors": len(start), "losses": losses, "weights": weights, "ema": ema, "ema_off_float64": off}
    return {**found, "fails_on": [kind for kind, limit in GATE.items() if not value[kind] <= limit]}


def judge_all(modules: Modules) -> Iterator[dict[str, Any]]:
    """A row for each case and each control, as it is judged; ``right`` where a case passes or a control fails."""
    print(f"{'':28} {'losses':7}  {'weights, worst tensor':37}  {'EMA, worst tensor':37}")
    for case in CASES:
        start, draws, official = run_official(case, modules)
        for control in (Control(""), *(CONTROLS if case is LABELS else ())):
            found = gate(run_ours(case, draws, start, control), official, start)
            name = f"control: {control.name}" if control.name else case.name
            right = bool(set(found["fails_on"]) - (set() if case.ema_gated else {"ema"})) == bool(control.name)
            cells = "  ".join(f"{found[key][1]:.1e} {found[key][0]:29.29}" for key in ("weights", "ema"))
            outcome = f"fails on {', '.join(found['fails_on'])}" if found["fails_on"] else "passes"
            print(f"{name:28} {found['losses']:.1e}  {cells}  {outcome}{'' if right else '  WRONG'}")
            yield {"name": name, "zero_stage": case.stage, "ema_rate": case.ema, **found, "right": right}


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="where the result is written, as JSON")
    parser.add_argument("--official-commit", default="", help="commit of OFFICIAL, where that is no checkout")
    arguments = parser.parse_args()
    directory, commit = official_directory(), arguments.official_commit
    option = f" --official-commit {commit}" if commit else ""
    dist.start(RANKS, 60)
    rows = list(judge_all(official_modules(directory)))
    dist.stop()
    result = {
        "command": f"OFFICIAL=DIR .venv/bin/python -m benchmarks.official_parity{option}",
        "official": f"{REPOSITORY}, commit {commit_of(directory) or commit or 'unknown'}",
        **provenance(),
        "setting": {"steps": STEPS, "warmup_steps": WARMUP, "batch": BATCH, "precision": "fp32"},
        "gate": GATE,
        "passed": all(row["right"] for row in rows),
        "rows": rows,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    with explained_exit():
        raise SystemExit(main())
