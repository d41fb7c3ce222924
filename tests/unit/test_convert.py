"""Official weights and training states come in and go out with every number as it was."""

import json
import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.golden_values import GOLDEN, golden_state_dict
from tests.tiny import ROOT, tiny_config
from uvit_dist import checkpoint, convert, storage
from uvit_dist.config_yaml import dump_config
from uvit_dist.data.journal import Journal
from uvit_dist.errors import DataError, MissingInputError, OutputError, UserError
from uvit_dist.export_weights import export_weights
from uvit_dist.models.uvit import UViT
from uvit_dist.weights import load_weights

WARMUP, STEPS = 4, 3
INDEX = SimpleNamespace(counts=(32, 32, 32, 24), sha256="5" * 64, provenance=SimpleNamespace(text=None))
FILES = ("step.pth", "nnet.pth", "nnet_ema.pth", "optimizer.pth", "lr_scheduler.pth")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    directory = tmp_path_factory.mktemp("config")
    return tiny_config(
        directory, directory, "optimizer.lr=2e-4", "optimizer.betas=[0.9,0.99]", f"optimizer.warmup_steps={WARMUP}"
    )


@pytest.fixture
def config(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "read_index", lambda path: INDEX)
    return settings.model_copy(update={"run_dir": str(tmp_path / "run")})


def official_training(net):
    """AdamW and scheduler over a network as the official code makes them, and one that the EMA is in."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-4, betas=(0.9, 0.99), weight_decay=0.03)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / WARMUP, 1))
    return optimizer, scheduler


def update(net, optimizer, scheduler, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    scheduler.step()


@pytest.fixture(scope="module")
def training(settings):
    """A training as the official code does it, after STEPS updates."""
    torch.manual_seed(0)
    net, ema = (UViT(**settings.model.model_dump()) for _ in range(2))
    optimizer, scheduler = official_training(net)
    for step in range(STEPS):
        update(net, optimizer, scheduler, step)
    return net, ema, optimizer, scheduler


@pytest.fixture
def official(training, tmp_path):
    """Its directory, and the training itself, to be read only."""
    net, ema, optimizer, _ = training
    directory = tmp_path / f"{STEPS}.ckpt"
    directory.mkdir()
    for name, value in zip(FILES, (STEPS, *(thing.state_dict() for thing in training)), strict=True):
        torch.save(value, directory / name)
    return SimpleNamespace(directory=directory, net=net, ema=ema, optimizer=optimizer)


def equal(one, two):
    """Whether two trees of plain values and tensors are the same, types included."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and list(one) == list(two) and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(equal, one, two))
    return type(one) is type(two) and one == two


@pytest.mark.parametrize("preset", ["cifar10_uvit_small", "imagenet256_uvit_huge", "mscoco_uvit_small_deep"])
def test_parameters_are_in_the_official_order(preset):
    """The official optimizer numbers its state by it. Without condition, with labels, with text."""
    record = json.loads((GOLDEN / "presets.json").read_text())[preset]
    with torch.device("meta"):
        net = UViT(**{key: value for key, value in record["config"]["nnet"].items() if key != "name"})
    assert [name for name, _ in net.named_parameters()] == list(record["state_dict"])


def test_a_released_file_gives_the_golden_output_and_comes_back_as_it_was(tmp_path):
    golden = np.load(GOLDEN / "uvit_class_cond.npz")
    model = json.loads(str(golden["config"]))
    shapes = {key: tuple(value.shape) for key, value in UViT(**model).state_dict().items()}
    state = golden_state_dict(shapes, str(golden["salt"]))
    torch.save(state, tmp_path / "released.pth")
    changes = [f"model.{key}={json.dumps(value)}" for key, value in model.items() if key != "name"]
    config = tiny_config(tmp_path, tmp_path, *changes, f"diffusion.null_label={model['num_classes'] - 1}")

    told = convert.from_official(tmp_path / "released.pth", config, tmp_path / "ours.safetensors")
    assert told == f"{tmp_path}/ours.safetensors: EMA weights of step 0"
    net = UViT.from_file(tmp_path / "ours.safetensors")
    with torch.no_grad():
        out = net(*(torch.from_numpy(golden[name]) for name in ("x", "timesteps", "y")))
    assert (out - torch.from_numpy(golden["output"])).abs().max() <= 2e-5
    weights = load_weights(tmp_path / "ours.safetensors")
    assert weights.config == config.model_dump(mode="json")
    assert (weights.kind, weights.step) == ("ema", 0)

    convert.to_official(tmp_path / "ours.safetensors", tmp_path / "back.pth", None)
    assert equal(torch.load(tmp_path / "back.pth"), state)
    assert (tmp_path / "back.pth").stat().st_size < 1.1 * (tmp_path / "released.pth").stat().st_size


def test_a_whole_training_state_comes_in_and_goes_out_as_it_was(config, official, tmp_path, caplog):
    path = convert.import_checkpoint(official.directory, config)
    assert path == tmp_path / f"run/checkpoints/step-{STEPS:08d}"
    assert checkpoint.newest_whole(config.run_dir, "hash") == path
    full = checkpoint.CheckpointReader(path).full
    state = official.optimizer.state_dict()["state"]
    assert equal(full("master"), dict(official.net.state_dict()))
    assert equal(full("ema"), dict(official.ema.state_dict()))
    for kind in ("exp_avg", "exp_avg_sq"):
        assert all(torch.equal(value, state[i][kind]) for i, value in enumerate(full(kind).values()))
    assert caplog.messages == [], "the configuration's optimizer is that of the training"

    told = convert.to_official(tmp_path / "run", tmp_path / "ckpts" / f"{STEPS}.ckpt", None)
    assert told == f"{tmp_path}/ckpts/{STEPS}.ckpt: the whole state of step {STEPS}"
    assert [p.name for p in (tmp_path / "ckpts").iterdir()] == [f"{STEPS}.ckpt"]
    for name in FILES:
        before, after = torch.load(official.directory / name), torch.load(tmp_path / f"ckpts/{STEPS}.ckpt" / name)
        before, after = (dict(x) if isinstance(x, dict) else x for x in (before, after))
        assert equal(before, after), name


def test_the_manifest_is_what_training_writes(config, official):
    from uvit_dist import resuming
    from uvit_dist.engine import KINDS
    from uvit_dist.guard import Guard
    from uvit_dist.preflight import make_plan

    path = convert.import_checkpoint(official.directory, config)
    manifest = json.loads((path / "manifest.json").read_text())
    shapes = {name: p.shape for name, p in official.net.named_parameters()}
    ours = resuming.make_manifest(
        resuming.State(STEPS, Journal(), Guard(config.guard)), shapes, make_plan(config, INDEX), config, INDEX
    )
    assert {key: manifest[key] for key in ours} == json.loads(json.dumps(ours))
    assert set(manifest) - set(ours) == {"version", "world_size", "files", "xxh3"}
    with safe_open(path / "rank-00000.safetensors", framework="pt") as file:
        assert set(file.keys()) == {f"{kind}/{name}/0" for kind in KINDS for name in shapes}


def test_a_real_optimizer_goes_on_from_what_is_written(config, official, tmp_path):
    """The next updates of a training that was converted there and back equal those of the one that was not."""
    convert.import_checkpoint(official.directory, config)
    convert.export_checkpoint(tmp_path / "run", tmp_path / "out.ckpt")
    ends = []
    for directory in (official.directory, tmp_path / "out.ckpt"):
        net = UViT(**config.model.model_dump())
        training = (net, *official_training(net))
        for thing, name in zip(training, ("nnet", "optimizer", "lr_scheduler"), strict=True):
            thing.load_state_dict(torch.load(directory / f"{name}.pth"))
        for step in range(STEPS, STEPS + 3):
            update(*training, step)
        ends.append([dict(thing.state_dict()) for thing in training])
    assert equal(*ends)
    assert not equal(ends[0][0], dict(official.net.state_dict()))


def test_weights_alone_are_taken_from_a_directory(config, official, tmp_path):
    assert convert.import_weights(official.directory, config, tmp_path / "ema.safetensors") == STEPS
    weights = load_weights(tmp_path / "ema.safetensors")
    assert weights.step == STEPS
    assert all(torch.equal(weights.tensors[key], value) for key, value in official.ema.state_dict().items())
    assert not (tmp_path / "run/checkpoints").exists()
    convert.import_checkpoint(official.directory, config)
    for kind, net in (("master", official.net), ("ema", official.ema)):
        convert.to_official(tmp_path / "run", tmp_path / f"{kind}.pth", kind)
        assert equal(torch.load(tmp_path / f"{kind}.pth"), dict(net.state_dict()))


def test_nothing_is_written_over(config, official, tmp_path):
    """A .pth given as --out by mistake is not replaced by something else."""
    torch.save(official.net.state_dict(), tmp_path / "released.pth")
    before = (tmp_path / "released.pth").read_bytes()
    with pytest.raises(UserError, match=r"released\.pth: must end in \.safetensors"):
        convert.from_official(tmp_path / "released.pth", config, tmp_path / "released.pth")
    convert.from_official(tmp_path / "released.pth", config, tmp_path / "ours.safetensors")
    with pytest.raises(OutputError, match="is there already; remove it"):
        convert.from_official(tmp_path / "released.pth", config, tmp_path / "ours.safetensors")
    with pytest.raises(OutputError, match="is there already; remove it"):
        convert.to_official(tmp_path / "ours.safetensors", tmp_path / "released.pth", None)
    assert (tmp_path / "released.pth").read_bytes() == before


def test_before_the_first_update_there_are_no_moments(config, official):
    torch.save(0, official.directory / "step.pth")
    torch.save(official_training(official.net)[0].state_dict(), official.directory / "optimizer.pth")
    moments = checkpoint.CheckpointReader(convert.import_checkpoint(official.directory, config)).full("exp_avg_sq")
    assert not any(value.any() for value in moments.values())


def test_what_goes_on_otherwise_is_told(config, official, caplog):
    """fp16 training skips updates that overflow; other settings of the optimizer are the configuration's."""
    caplog.set_level(logging.WARNING)
    torch.save(STEPS + 2, official.directory / "step.pth")
    saved = official.optimizer.state_dict()
    saved["param_groups"][0] |= {"betas": [0.99, 0.999], "initial_lr": 1e-3}
    torch.save(saved, official.directory / "optimizer.pth")
    convert.import_checkpoint(official.directory, config)
    told = "\n".join(caplog.messages)
    assert "Adam made [3] updates of 5" in told
    assert "optimizer.lr was 0.001; the configuration says 0.0002" in told
    assert "optimizer.betas was (0.99, 0.999); the configuration says (0.9, 0.99)" in told
    assert len(caplog.messages) == 3


# -- mistakes ---------------------------------------------------------------------------------------------------------


class Anything:
    """Not a tensor."""


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (Anything(), r"damaged, or holds more than tensors and plain values \(UnpicklingError\)"),
        (b"no pickle", "damaged, or holds more"),
        ([1, 2], "not a bare state dict"),
        ({"state_dict": {}}, "not a bare state dict"),
        ({"weight": torch.zeros(2)}, r"weight: \(2,\) there, none in this network|of another system"),
    ],
)
def test_files_of_something_else_are_refused(config, tmp_path, value, reason):
    path = tmp_path / "file.pth"
    path.write_bytes(value) if isinstance(value, bytes) else torch.save(value, path)
    with pytest.raises(DataError, match=reason):
        convert.import_weights(path, config, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_file_of_another_system_is_named_as_such(config, tmp_path):
    torch.save(UViT(**{**config.model.model_dump(), "depth": 4}).state_dict(), tmp_path / "deep.pth")
    with pytest.raises(DataError, match="this file is of another system than the model section describes") as caught:
        convert.import_weights(tmp_path / "deep.pth", config, tmp_path / "out.safetensors")
    assert "in_blocks.1.norm1.weight: (32,) there, none in this network" in str(caught.value)
    assert "more" in str(caught.value).splitlines()[-2]


def test_what_is_missing_is_named(config, official, tmp_path):
    with pytest.raises(MissingInputError, match=r"nothing\.pth: no such file"):
        convert.import_weights(tmp_path / "nothing.pth", config, tmp_path / "out")
    (official.directory / "optimizer.pth").unlink()
    with pytest.raises(MissingInputError, match=r"optimizer\.pth: no such file"):
        convert.import_checkpoint(official.directory, config)
    assert checkpoint.newest_whole(config.run_dir) is None


def test_an_optimizer_of_another_training_is_refused(config, official):
    path = official.directory / "optimizer.pth"
    saved = official.optimizer.state_dict()
    saved["state"][1] = {**saved["state"][1], "exp_avg": torch.zeros(2, 2)}
    torch.save(saved, path)
    with pytest.raises(DataError, match=r"exp_avg of patch_embed\.proj\.weight: \(2, 2\) there, \(32, 4, 2, 2\)"):
        convert.import_checkpoint(official.directory, config)
    saved["param_groups"][0]["params"].pop()
    torch.save(saved, path)
    with pytest.raises(DataError, match=r"\d+ parameters there, \d+ in nnet\.pth"):
        convert.import_checkpoint(official.directory, config)
    for foreign in ({"state": {}}, [1], {"state": {0: 5}, "param_groups": [{"params": [0]}]}):
        torch.save(foreign, path)
        with pytest.raises(DataError, match="no AdamW state of one group"):
            convert.import_checkpoint(official.directory, config)


def test_a_run_with_checkpoints_is_left_alone(config, official):
    path = convert.import_checkpoint(official.directory, config)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    torch.save(STEPS + 1, official.directory / "step.pth")
    with pytest.raises(OutputError, match="holds checkpoints already"):
        convert.import_checkpoint(official.directory, config)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_nothing_half_written_is_left(config, official, tmp_path, monkeypatch):
    convert.import_checkpoint(official.directory, config)
    out = tmp_path / "ckpts" / f"{STEPS}.ckpt"
    with monkeypatch.context() as patch:
        rename, error = storage.files.os.replace, OSError(28, "No space left on device")

        def full(one, two):
            if str(two).endswith("optimizer.pth"):
                raise error
            rename(one, two)

        patch.setattr(storage.files.os, "replace", full)
        with pytest.raises(OutputError, match="No space left on device"):
            convert.export_checkpoint(tmp_path / "run", out)
    assert list(out.parent.iterdir()) == []
    convert.export_checkpoint(tmp_path / "run", out)
    with pytest.raises(OutputError, match="is there already"):
        convert.export_checkpoint(tmp_path / "run", out)


def test_a_state_needs_more_than_weights(config, official, tmp_path, caplog):
    convert.import_checkpoint(official.directory, config)
    export_weights(config.run_dir, tmp_path / "ema.safetensors", "ema")
    with pytest.raises(DataError, match="holds weights alone"):
        convert.to_official(tmp_path / "ema.safetensors", tmp_path / f"{STEPS}.ckpt", None)
    with pytest.raises(UserError, match="write it with --out"):
        convert.from_official(official.directory / "nnet_ema.pth", config, None)
    with pytest.raises(UserError, match=r"must end in \.pth .* or \.ckpt"):
        convert.to_official(tmp_path / "run", tmp_path / "out.bin", None)
    with pytest.raises(UserError, match="leave --kind out"):
        convert.to_official(tmp_path / "run", tmp_path / "other.ckpt", "ema")
    convert.to_official(tmp_path / "run", tmp_path / "other.ckpt", None)
    assert caplog.messages[-1].endswith("the official code resumes only from directories named STEP.ckpt, here 3.ckpt")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["from-official", "a.pth"], 2, "needs --config"),
        (["from-official", "a.pth", "--config", "c", "--kind", "ema"], 2, "--kind is for to-official"),
        (["to-official", "run"], 2, "needs --out"),
        (["to-official", "run", "--out", "a.pth", "seed=1"], 2, "takes its configuration from the source"),
        (["sideways", "run"], 2, "invalid choice"),
        (["to-official", "nowhere", "--out", "a.pth"], 66, "error: nowhere: no such file or directory"),
        (
            ["from-official", "nowhere.pth", "--config", "CONFIG", "--out", "o.safetensors", "seed=5"],
            66,
            "nowhere.pth: no such",
        ),
        (["from-official", "nowhere.pth", "--config", "CONFIG", "seeds=5", "--out", "o"], 78, "seeds: no such key"),
    ],
)
def test_the_command_line_says_what_is_wrong(monkeypatch, capsys, arguments, code, told):
    arguments = [str(ROOT / "configs/digits_demo.yaml") if word == "CONFIG" else word for word in arguments]
    monkeypatch.setattr(sys, "argv", ["convert", *arguments])
    with pytest.raises(SystemExit) as caught:
        convert.main()
    assert caught.value.code == code
    assert told in capsys.readouterr().err


def test_the_command_line_converts(monkeypatch, capsys, config, official, tmp_path):
    config_file = tmp_path / "config.yaml"
    config_file.write_text(dump_config(config))
    for words in (
        ["from-official", official.directory, "--config", config_file, f"run_dir={tmp_path}/other"],
        ["to-official", tmp_path / "other", "--out", tmp_path / "ema.pth"],
    ):
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, words)])
        convert.main()
    assert "committed; uvit_dist.launch goes on from there" in capsys.readouterr().out
    assert equal(torch.load(tmp_path / "ema.pth"), dict(official.ema.state_dict()))
