"""Safetensors written piece by piece, as safetensors itself writes them; weights exported in little memory."""

import json
import os
import subprocess
import sys

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load, load_file, save

from uvit_dist import checkpoint, export, safetensors_stream, storage
from uvit_dist.errors import CheckpointError, DataError, MissingInputError
from uvit_dist.export_weights import export_weights
from uvit_dist.models.uvit import UViT
from uvit_dist.safetensors_stream import NAMES, write, write_flat
from uvit_dist.weights import fingerprint_of, load_weights

MODEL = dict(img_size=8, patch_size=2, in_chans=4, embed_dim=16, depth=2, num_heads=2, num_classes=5)
MiB = 1 << 20


def tensors_of_all_kinds():
    torch.manual_seed(0)
    numbers = (torch.randn(3, 5) * 100).to(torch.int32)
    kinds = {f"{place}.{dtype}": numbers.to(dtype) for place, dtype in enumerate(NAMES)}
    shapes = {"scalar": torch.tensor(1.5), "none": torch.zeros(0, 3), "ä\n\"'": torch.randn(2, 1, 7), "T": numbers.T}
    return {**kinds, **{key: value.contiguous() for key, value in shapes.items()}}


def layouts(tensors):
    return {key: (value.dtype, value.shape) for key, value in tensors.items()}


def in_pieces(tensors):
    return lambda key: tensors[key].flatten().split(4)


@pytest.mark.parametrize("metadata", [None, {'ä\n"': '{"a": "\x01\x7fü/"}'}])
@pytest.mark.parametrize("place", ["path", "memory URL"])
def test_the_bytes_are_those_of_safetensors_own_save(tmp_path, metadata, place):
    tensors = tensors_of_all_kinds()
    path = str(tmp_path / "f") if place == "path" else f"memory://{tmp_path.name}/f"
    found = write(path, layouts(tensors), in_pieces(tensors), metadata)
    assert storage.read_bytes(path) == save(tensors, metadata)
    for key, value in tensors.items():
        assert found[key] == xxhash.xxh3_128_hexdigest(value.reshape(-1).view(torch.uint8).numpy().tobytes())


def test_hashes_are_in_the_metadata(tmp_path):
    tensors, path = tensors_of_all_kinds(), tmp_path / "f"
    found = write(str(path), layouts(tensors), in_pieces(tensors), {"step": "5"}, hashes="xxh3")
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"step": "5", "xxh3": json.dumps(found)}
        for key, value in tensors.items():
            assert torch.equal(file.get_tensor(key).reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
    assert len(set(found.values())) > 5


def test_pieces_that_do_not_make_up_their_tensor_leave_no_file(tmp_path):
    layout = {"w": (torch.float32, (2, 3))}
    for pieces, told in (
        ([torch.zeros(5)], r"w: its pieces have 5 elements, its shape is \(2, 3\)"),
        ([torch.zeros(6), torch.zeros(1)], "7 elements"),
        ([torch.zeros(6).double()], r"w: a piece is torch\.float64, the header says torch\.float32"),
    ):
        with pytest.raises(ValueError, match=told):
            write(str(tmp_path / "f"), layout, lambda key, pieces=pieces: pieces)
    assert list(tmp_path.iterdir()) == []


def test_a_flat_tensor_is_written_as_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_stream, "PIECE", 100)
    flat = torch.randn(1000)
    parts = [("master/b/0", 1), ("master/a/0", 600), ("ema/empty/0", 0), ("exp_avg/a/7", 399)]
    size, xxh3 = write_flat(tmp_path / "f", parts, flat)
    data = (tmp_path / "f").read_bytes()
    assert (size, xxh3) == (len(data), xxhash.xxh3_128_hexdigest(data))
    read = load_file(tmp_path / "f")
    assert read.keys() == {key for key, _ in parts}
    assert torch.equal(torch.cat([read[key] for key, _ in parts]), flat)
    assert all(torch.equal(value, read[key]) for key, value in load(data).items())
    write_flat(tmp_path / "sorted", [("a", 400), ("b", 600)], flat)
    assert (tmp_path / "sorted").read_bytes() == save({"a": flat[:400].clone(), "b": flat[400:].clone()})
    for wrong in (flat.double(), flat[:999], flat.reshape(10, 100), torch.randn(2000)[::2]):
        with pytest.raises(ValueError, match="1000 contiguous fp32 elements are to be written"):
            write_flat(tmp_path / "wrong", parts, wrong)


def make(run_dir, step, ranks=3, config=None):
    """A checkpoint whose EMA is network(step) and whose masters are network(step + 1), cut evenly over the ranks."""
    model = config["model"] if config else MODEL
    nets = {"ema": network(step, model), "master": network(step + 1, model)}
    directory = checkpoint.checkpoints_dir(run_dir) / f"step-{step:08d}"
    directory.mkdir(parents=True)
    files = []
    for rank in range(ranks):
        parts, values = [], []
        for kind, net in nets.items():
            for name, value in net.items():
                cut = -(-value.numel() // ranks)
                mine = value.flatten()[cut * rank : cut * (rank + 1)]
                if len(mine):
                    parts.append((f"{kind}/{name}/{cut * rank}", len(mine)))
                    values.append(mine)
        path = directory / f"rank-{rank:05d}.safetensors"
        size, xxh3 = write_flat(path, parts, torch.cat(values))
        files.append({"name": path.name, "size": size, "xxh3": xxh3})
    manifest = {
        "version": checkpoint.VERSION,
        "step": step,
        "shapes": {name: list(value.shape) for name, value in nets["ema"].items()},
        "config": config or {"model": {**MODEL, "use_checkpoint": True}},
        "must_agree": {"sha256 of data.index": "abc"},
        "versions": {"uvit_dist": "0.1.0", "torch": "2"},
        "text_encoder": None,
        "files": files,
    }
    (directory / "manifest.json").write_bytes(checkpoint.sealed(manifest))
    return manifest


def network(seed, model=MODEL):
    torch.manual_seed(seed)
    return UViT(**model).state_dict()


def same(tensors, state):
    return tensors.keys() == state.keys() and all(torch.equal(tensors[key], state[key]) for key in state)


def run_export(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    export.main()


@pytest.mark.parametrize("ranks", [1, 3])
def test_kind_and_step_are_those_asked_for_and_the_origin_is_told(tmp_path, monkeypatch, capsys, ranks):
    monkeypatch.setattr("uvit_dist.export_weights.PIECE", 50)
    monkeypatch.setattr("uvit_dist.export_weights.MAPPED", 1000)
    manifests = {step: make(tmp_path / "run", step, ranks) for step in (5, 10)}
    out = tmp_path / "out.safetensors"
    for arguments, step, kind in (
        ([], 10, "ema"),
        (["--kind", "master"], 10, "master"),
        (["--step", 5], 5, "ema"),
        (["--step", 5, "--kind", "master", "--verify", "size"], 5, "master"),
    ):
        run_export(monkeypatch, "--run-dir", tmp_path / "run", "--out", out, *arguments)
        assert capsys.readouterr().out == f"{out}: {kind} weights of step {step}\n"
        weights = load_weights(out, kind)
        assert same(weights.tensors, network(step + (kind == "master")))
        assert (weights.step, weights.kind, weights.model) == (step, kind, MODEL)
        with safe_open(out, framework="pt") as file:
            told = file.metadata()
        assert json.loads(told["versions"]) == {"uvit_dist": "0.1.0", "torch": "2"}
        assert told["index_sha256"] == "abc"
        assert told["source"] == str(tmp_path / f"run/checkpoints/step-{step:08d}")
        assert told["source_fingerprint"] == fingerprint_of(manifests[step])
        assert json.loads(told["xxh3"]).keys() == network(0).keys()
        assert same(UViT.from_file(out).state_dict(), weights.tensors)


def test_the_same_export_has_the_same_bytes_and_may_go_to_a_url(tmp_path, monkeypatch, capsys):
    make(tmp_path / "run", 5)
    url = f"memory://{tmp_path.name}/ema.safetensors"
    run_export(monkeypatch, "--run-dir", tmp_path / "run", "--out", url)
    assert export_weights(tmp_path / "run", tmp_path / "ema.safetensors", "ema") == 5
    assert storage.read_bytes(url) == (tmp_path / "ema.safetensors").read_bytes()
    assert url in capsys.readouterr().out


def test_damage_is_never_exported_nor_loaded(tmp_path, monkeypatch, capsys):
    for step in (5, 10):
        make(tmp_path / "run", step)
    file = tmp_path / "run/checkpoints/step-00000010/rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    out = tmp_path / "out.safetensors"
    run_export(monkeypatch, "--run-dir", tmp_path / "run", "--out", out)
    assert "step 5" in capsys.readouterr().out, "the one before is taken"
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors differs from its hash"):
        export_weights(tmp_path / "run", tmp_path / "none", "ema", step=10, verify="hash")
    with pytest.raises(MissingInputError, match="holds no checkpoint of step 7; it has 5, 10"):
        export_weights(tmp_path / "run", tmp_path / "none", "ema", step=7)
    assert not (tmp_path / "none").exists()
    exported = bytearray(out.read_bytes())
    exported[-1] ^= 1
    out.write_bytes(exported)
    with pytest.raises(DataError, match=r"safetensors: damaged: \S+ differs from its hash; export or copy it again"):
        load_weights(out)


MEASURED = """
import resource, sys
sys.modules["deepspeed"] = None
from pathlib import Path
import torch
from uvit_dist.export_weights import export_weights
def exported(run_dir):
    export_weights(run_dir, f"{run_dir}/out", "ema", verify="hash")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small = exported(sys.argv[1])
print(exported(sys.argv[2]) - small)
"""


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_size_of_the_model(tmp_path):
    def make_big(run_dir, numel):
        """Three tensors of an EMA that four ranks hold a quarter of each of."""
        directory = checkpoint.checkpoints_dir(run_dir) / "step-00000005"
        directory.mkdir(parents=True)
        files, cut = [], numel // 4
        for rank in range(4):
            path = directory / f"rank-{rank:05d}.safetensors"
            parts = [(f"ema/{name}/{rank * cut}", cut) for name in "abc"]
            size, xxh3 = write_flat(path, parts, torch.full((3 * cut,), float(rank)))
            files.append({"name": path.name, "size": size, "xxh3": xxh3})
        manifest = {
            "version": checkpoint.VERSION,
            "step": 5,
            "shapes": {key: [numel] for key in "abc"},
            "config": {"model": {}},
        }
        (directory / "manifest.json").write_bytes(checkpoint.sealed({**manifest, "files": files}))

    make_big(tmp_path / "small", 1000)
    make_big(tmp_path / "big", 24 * MiB)  # 288 MiB
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "small"), str(tmp_path / "big")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert (tmp_path / "big/out").stat().st_size > 288 * MiB
    assert int(done.stdout) < 160 * MiB, f"{int(done.stdout) / MiB:.0f} MiB"
    with safe_open(tmp_path / "big/out", framework="pt") as file:
        assert file.get_slice("b")[6 * MiB - 1 : 6 * MiB + 1].tolist() == [0.0, 1.0]
