"""Weights and whole training states from the official U-ViT code and back; every number stays as it is.

    python -m uvit_dist.convert from-official imagenet256_uvit_huge.pth --config CFG.yaml --out huge.safetensors
    python -m uvit_dist.convert from-official ckpts/50000.ckpt --config CFG.yaml --out ema.safetensors
    python -m uvit_dist.convert from-official ckpts/50000.ckpt --config CFG.yaml run_dir=runs/goes_on
    python -m uvit_dist.convert to-official runs/digits_demo --out ema.pth
    python -m uvit_dist.convert to-official runs/digits_demo --out ckpts/2000.ckpt

Without --out, from-official commits the state as a checkpoint of the configuration's run_dir: uvit_dist.launch goes on
from there. What the numbers mean is for the configuration to say: the official files name neither the attention heads
nor the noise schedule.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uvit_dist import checkpoint, dist, preflight, safetensors_stream, storage
from uvit_dist.config import Config
from uvit_dist.config_yaml import load_config
from uvit_dist.data.journal import Journal
from uvit_dist.data.shards import read_index
from uvit_dist.dist import Ranks
from uvit_dist.errors import DataError, MissingInputError, OutputError, UserError, explained_exit
from uvit_dist.guard import Guard
from uvit_dist.models.uvit import UViT
from uvit_dist.saving import save_now
from uvit_dist.weights import XXH3, Kind, differences, find_checkpoint, listed, load_weights

FILE_OF_KIND = {"master": "nnet.pth", "ema": "nnet_ema.pth"}
MOMENTS = ("exp_avg", "exp_avg_sq")
log = logging.getLogger(__name__)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m uvit_dist.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("direction", choices=["from-official", "to-official"], help="which way")
    parser.add_argument("source", type=Path, help="a .pth file or .ckpt directory; a run, checkpoint or export")
    parser.add_argument("--config", help="from-official: YAML file of the system that the source belongs to")
    parser.add_argument("--out", type=Path, help="a .safetensors file; to-official: a .pth file or .ckpt directory")
    parser.add_argument("--kind", choices=["ema", "master"], help="to-official: which weights (default: ema)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    if args.direction == "from-official":
        if args.config is None:
            parser.error("from-official needs --config: a .pth file does not say what network it is of")
        if args.kind is not None:
            parser.error("--kind is for to-official; from-official takes the EMA, or all of the state")
        with explained_exit():
            print(from_official(args.source, load_config(args.config, args.overrides), args.out))
    else:
        if args.out is None or args.config is not None or args.overrides:
            parser.error("to-official needs --out, and takes its configuration from the source")
        with explained_exit():
            print(to_official(args.source, args.out, args.kind))


def from_official(source: Path, config: Config, out: Path | None) -> str:
    """Convert a ``.pth`` file or ``.ckpt`` directory to ``out``, or to a checkpoint of the run. Returns what was done.

    Raises ``UserError`` of the right kind.
    """
    if out is not None:
        if out.suffix != ".safetensors":
            raise UserError(f"--out {out}: must end in .safetensors; give it such a name")
        _check_new(out)
        step = import_weights(source, config, out)
        return f"{out}: EMA weights of step {step}"
    if source.is_file():
        raise UserError(
            f"{source}: a file holds weights alone, a run goes on with the optimizer's state too; write it with --out"
        )
    return f"{import_checkpoint(source, config)}: committed; uvit_dist.launch goes on from there"


def to_official(source: Path, out: Path, kind: Kind | None) -> str:
    """Convert to a ``.pth`` file or a ``.ckpt`` directory, as the name of ``out`` says. Returns what was done.

    Raises ``UserError`` of the right kind.
    """
    if out.suffix == ".pth":
        _check_new(out)
        step = export_state_dict(source, out, kind or "ema")
        return f"{out}: {kind or 'ema'} weights of step {step}"
    if out.suffix != ".ckpt":
        raise UserError(
            f"--out {out}: must end in .pth (weights alone) or .ckpt (the whole state); give it such a name"
        )
    if kind is not None:
        raise UserError(f"--kind {kind}: a .ckpt directory holds both; leave --kind out")
    step = export_checkpoint(source, out)
    if out.name != f"{step}.ckpt":
        log.warning("%s: the official code resumes only from directories named STEP.ckpt, here %s.ckpt", out, step)
    return f"{out}: the whole state of step {step}"


def _check_new(out: Path) -> None:
    if out.exists():
        raise OutputError(f"--out {out}: is there already; remove it, or give another name")


# -- from the official code -------------------------------------------------------------------------------------------


def read_plain(path: Path) -> Any:
    """What torch.save wrote, if it is tensors and plain values; nothing in the file is executed.

    Raises ``MissingInputError``, ``DataError``.
    """
    if not path.is_file():
        raise MissingInputError(f"{path}: no such file; correct the path")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - a damaged pickle can fail in any way
        raise DataError(
            f"{path}: damaged, or holds more than tensors and plain values ({type(error).__name__}); "
            "only files that the official code saved, or that are released with it, can be converted: download it again"
        ) from None


def checked_network(tensors: Any, model: Mapping[str, Any], origin: str) -> dict[str, Tensor]:
    """Tensors as those of a network, fp32, by key in the official order, in shape. model: arguments of UViT.

    Raises ``DataError`` that lists what differs.
    """
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise DataError(f"{origin}: not a bare state dict (key → tensor); give the file of the network alone")
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in UViT(**model).state_dict().items()}
    wrong = differences(tensors, shapes)
    if wrong:
        raise DataError(
            f"{origin}: this file is of another system than the model section describes:\n{listed(wrong)}\n"
            "Use the configuration of the system that the file belongs to."
        )
    return {key: tensors[key].float().contiguous() for key in shapes}


def _read_network(path: Path, config: Config) -> dict[str, Tensor]:
    return checked_network(read_plain(path), config.model.model_dump(), str(path))


def _read_step(directory: Path) -> int:
    step = read_plain(directory / "step.pth")
    if not isinstance(step, int) or step < 0:
        raise DataError(f"{directory / 'step.pth'}: holds {step!r}, not a number of updates; give another checkpoint")
    return step


def import_weights(source: Path, config: Config, out: Path) -> int:
    """Write the EMA weights of an official file or directory as ``uvit_dist.export`` does. Returns the step, 0 where
    the source does not say it.

    Raises ``MissingInputError``, ``DataError``, ``OutputError``.
    """
    step = 0
    if source.is_dir():
        step, source = _read_step(source), source / FILE_OF_KIND["ema"]
    tensors = _read_network(source, config)
    dumped = config.model_dump(mode="json")
    metadata = {
        "model": json.dumps({key: value for key, value in dumped["model"].items() if key != "use_checkpoint"}),
        "config": json.dumps(dumped),
        "step": str(step),
        "kind": "ema",
    }
    layouts = {key: (value.dtype, value.shape) for key, value in tensors.items()}
    safetensors_stream.write(str(out), layouts, lambda key: [tensors[key]], metadata, XXH3)
    return step


def import_checkpoint(source: Path, config: Config) -> Path:
    """Commit the state of an official ``.ckpt`` directory as a checkpoint of ``config.run_dir``. Returns it.

    Raises ``MissingInputError``, ``DataError``, and ``OutputError`` where the run has checkpoints already.
    """
    _prepare_deepspeed()
    from uvit_dist.resuming import State, make_manifest

    step = _read_step(source)
    index = read_index(config.data.index)
    storage.make_directory(config.run_dir)
    with storage.locked(config.run_dir):
        if checkpoint.any_checkpoint(config.run_dir):
            raise OutputError(
                f"run_dir {config.run_dir}: holds checkpoints already, with which this one must not mix; "
                "use another run_dir"
            )
        kinds = {kind: _read_network(source / name, config) for kind, name in FILE_OF_KIND.items()}
        shapes = {name: value.shape for name, value in kinds["master"].items()}
        state = State(step, Journal(), Guard(config.guard))
        manifest = make_manifest(state, shapes, preflight.make_plan(config, index), config, index)
        kinds |= _read_moments(source / "optimizer.pth", kinds["master"], step, config)
        tensors = {f"{kind}/{name}/0": v.flatten() for kind, all_of in kinds.items() for name, v in all_of.items()}
        return _commit(config, tensors, manifest)


def _commit(config: Config, state: dict[str, Tensor], manifest: dict[str, Any]) -> Path:
    alone = Ranks()
    dist.start(alone, 60)
    try:
        return save_now(config.run_dir, config.checkpoint, alone, state, manifest)
    finally:
        dist.stop()


def _read_moments(path: Path, masters: Mapping[str, Tensor], step: int, config: Config) -> dict[str, dict[str, Tensor]]:
    """Adam's moments by kind and parameter. Its state is numbered in the order of the network's parameters."""
    saved = read_plain(path)
    try:
        (group,) = saved["param_groups"]
        entries = [dict(saved["state"].get(number, {})) for number in group["params"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: no AdamW state of one group ({error!r}); give another checkpoint") from None
    if step == 0 and not saved["state"]:  # before its first update AdamW has no state
        return {kind: {name: torch.zeros_like(value) for name, value in masters.items()} for kind in MOMENTS}
    shapes = {name: tuple(value.shape) for name, value in masters.items()}
    wrong = [] if len(entries) == len(shapes) else [f"{len(entries)} parameters there, {len(shapes)} in nnet.pth"]
    found = {}
    for kind in MOMENTS:
        pairs = zip(shapes, (entry.get(kind) for entry in entries), strict=False)
        found[kind] = {name: value.float() for name, value in pairs if isinstance(value, Tensor)}
        wrong += [f"{kind} of {line}" for line in differences(found[kind], shapes)]
    if wrong:
        raise DataError(
            f"{path}: not the moments of the parameters in nnet.pth:\n{listed(wrong)}\n"
            "Give another checkpoint: these files are not of one training."
        )
    for note in (*_counted(entries, step), *_settings(group, config)):
        log.warning("%s: %s", path, note)
    return found


def _counted(entries: list[dict[str, Any]], step: int) -> Iterator[str]:
    """The official fp16 training counts the updates that it skips for overflow, but Adam does not."""
    counted = {int(entry["step"]) for entry in entries if "step" in entry}
    if counted - {step}:
        yield f"Adam made {sorted(counted)} updates of {step}; here its bias correction goes on from {step}"


def _settings(group: Mapping[str, Any], config: Config) -> Iterator[str]:
    pairs = {"lr": "initial_lr", "betas": "betas", "eps": "eps", "weight_decay": "weight_decay"}
    for ours, theirs in pairs.items():
        value, there = getattr(config.optimizer, ours), group.get(theirs)
        there = tuple(there) if isinstance(there, list) else there
        if there is not None and there != value:
            yield f"optimizer.{ours} was {there}; the configuration says {value}, and training goes on with that"


# -- to the official code ---------------------------------------------------------------------------------------------


def export_state_dict(source: Path, out: Path, kind: Kind = "ema") -> int:
    """Write weights as the bare state dict that the official evaluation loads. Returns the step.

    Raises what ``load_weights`` does, ``OutputError``.
    """
    weights = load_weights(source, kind)
    _save(checked_network(weights.tensors, weights.model, weights.origin), out)
    return weights.step


def export_checkpoint(source: Path, out: Path) -> int:
    """Write a checkpoint as the directory that the official training resumes from. Returns the step.

    Raises what ``find_checkpoint`` does, ``DataError`` for a source without Adam's moments, ``OutputError``.
    """
    if source.is_file():
        raise DataError(f"{source}: holds weights alone; a .ckpt needs a run or checkpoint, or write a .pth file")
    reader = checkpoint.CheckpointReader(find_checkpoint(source))
    manifest = reader.manifest

    def full(kind: str) -> dict[str, Tensor]:
        return checked_network(reader.full(kind), manifest["config"]["model"], str(reader.directory))

    if out.exists():
        raise OutputError(f"{out}: is there already; remove it, or write to another place")
    storage.make_directory(str(out.parent))
    # Not named *.ckpt: the official resume reads a number out of every such name.
    temporary = out.with_name(f".{out.stem}.tmp-{uuid.uuid4().hex}")
    try:
        for kind, name in FILE_OF_KIND.items():
            _save(full(kind), temporary / name)
        optimizer, scheduler = official_optimizer(
            [full(kind) for kind in MOMENTS], manifest["step"], manifest["config"]["optimizer"]
        )
        _save(optimizer, temporary / "optimizer.pth")
        _save(scheduler, temporary / "lr_scheduler.pth")
        _save(manifest["step"], temporary / "step.pth")
        temporary.rename(out)
        storage.fsync_directory(out.parent)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror or error}); make room, or use another") from None
    finally:
        storage.remove_tree(temporary)
    return manifest["step"]


def official_optimizer(
    moments: list[dict[str, Tensor]], step: int, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """State dicts of the official AdamW and of its LambdaLR after ``step`` updates.

    moments: both, by key in the official order, in the parameters' shapes; settings: the optimizer section, dumped.
    """
    _prepare_deepspeed()
    from uvit_dist.engine import learning_rate

    first, second = moments
    rate = learning_rate(step, settings["lr"], settings["warmup_steps"])
    optimizer = torch.optim.AdamW(
        [nn.Parameter(torch.zeros(())) for _ in first],  # taken for the form of the group alone
        lr=settings["lr"],
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    (group,) = optimizer.state_dict()["param_groups"]
    state = {
        number: {"step": torch.tensor(float(step)), "exp_avg": first[name], "exp_avg_sq": second[name]}
        for number, name in enumerate(first)
    }
    passed = {"last_epoch": step, "_step_count": step + 1, "_last_lr": [rate]}
    return {"state": state, "param_groups": [{**group, "lr": rate}]}, {**scheduler.state_dict(), **passed}


def _prepare_deepspeed() -> None:
    """Before what imports DeepSpeed, which takes seconds: weights alone are converted without it."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def _save(value: Any, path: Path) -> None:
    with storage.atomic_write(str(path)) as file:
        torch.save(value, file)


if __name__ == "__main__":
    main()
