"""Weights from wherever they lie, and what fine-tuning starts from on another grid or with other classes."""

import dataclasses
import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from uvit_dist import dist
from uvit_dist.config import CheckpointConfig
from uvit_dist.dist import Ranks
from uvit_dist.errors import CheckpointError, DataError, MissingInputError
from uvit_dist.export_weights import export_weights
from uvit_dist.models.uvit import UViT
from uvit_dist.saving import save_now
from uvit_dist.weights import Weights, adapt, load_weights, resize_positions

ALONE = Ranks()
MODEL = dict(img_size=8, patch_size=2, in_chans=4, embed_dim=16, depth=2, num_heads=2, num_classes=5)


@pytest.fixture(scope="module", autouse=True)
def process_group():
    dist.start(ALONE, 10)
    yield
    dist.stop()


def network(seed=0, **changes):
    torch.manual_seed(seed)
    return UViT(**{**MODEL, **changes})


def save(run_dir, step):
    """A checkpoint whose EMA is network(step) and whose masters are network(step + 1)."""
    nets = {"ema": network(step).state_dict(), "master": network(step + 1).state_dict()}
    state = {f"{kind}/{name}/0": value.flatten() for kind, net in nets.items() for name, value in net.items()}
    manifest = {
        "step": step,
        "shapes": {name: list(value.shape) for name, value in nets["ema"].items()},
        "config": {"model": {**MODEL, "use_checkpoint": True}, "diffusion": {"null_label": 4}},
    }
    return save_now(str(run_dir), CheckpointConfig(every=1), ALONE, state, manifest)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    save(directory, 5)
    save(directory, 10)
    return directory


def same(tensors, net):
    state = net.state_dict()
    return tensors.keys() == state.keys() and all(torch.equal(tensors[key], state[key]) for key in state)


def test_a_run_a_step_and_an_export_give_the_same_weights(run_dir, tmp_path):
    of_run = load_weights(run_dir)
    of_step = load_weights(run_dir / "checkpoints/step-00000010")
    export_weights(str(run_dir), tmp_path / "ema.safetensors", "ema")
    of_file = load_weights(str(tmp_path / "ema.safetensors"))
    for weights in (of_run, of_step, of_file):
        assert same(weights.tensors, network(10))
        assert (weights.step, weights.kind, weights.model) == (10, "ema", MODEL)
        assert weights.config["diffusion"] == {"null_label": 4}
    assert of_run.fingerprint == of_step.fingerprint != of_file.fingerprint
    assert of_run.origin == of_step.origin != of_file.origin


def test_a_run_may_lie_in_a_directory_called_checkpoints(tmp_path):
    save(tmp_path / "checkpoints/run", 5)
    assert load_weights(tmp_path / "checkpoints/run").step == 5


def test_kind_and_step_are_those_asked_for(run_dir, tmp_path):
    assert same(load_weights(run_dir, "master").tensors, network(11))
    early = load_weights(run_dir / "checkpoints/step-00000005")
    assert same(early.tensors, network(5))
    assert early.fingerprint != load_weights(run_dir).fingerprint
    export_weights(str(run_dir), tmp_path / "file", "master")
    assert same(load_weights(tmp_path / "file", "master").tensors, network(11))
    with pytest.raises(DataError, match="holds 'master' weights, 'ema' are asked for"):
        load_weights(tmp_path / "file")


def test_the_fingerprint_of_a_file_is_of_its_content(run_dir, tmp_path):
    for name in ("a", "b"):
        export_weights(str(run_dir), tmp_path / name, "ema")
    first = load_weights(tmp_path / "a").fingerprint
    assert first == load_weights(tmp_path / "b").fingerprint
    data = bytearray((tmp_path / "b").read_bytes())
    data[-1] ^= 1
    (tmp_path / "b").write_bytes(data)
    with pytest.raises(DataError, match=r"b: damaged: \S+ differs from its hash; export or copy it again"):
        load_weights(tmp_path / "b")
    export_weights(run_dir, tmp_path / "c", "ema", step=5)
    assert first != load_weights(tmp_path / "c").fingerprint


def test_half_precision_becomes_fp32(tmp_path):
    told = {"model": json.dumps(MODEL), "config": "{}", "step": "7", "kind": "ema"}
    save_file({key: value.half() for key, value in network().state_dict().items()}, tmp_path / "half", told)
    weights = load_weights(tmp_path / "half")
    assert {value.dtype for value in weights.tensors.values()} == {torch.float32}
    assert (weights.config, weights.step) == ({}, 7)


def test_what_is_not_there_or_not_whole_is_explained(run_dir, tmp_path):
    with pytest.raises(MissingInputError, match="no such file or directory"):
        load_weights(tmp_path / "nothing")
    with pytest.raises(MissingInputError, match="holds no checkpoint; train first"):
        load_weights(tmp_path)
    path = save(tmp_path, 5)
    file = path / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"not a whole checkpoint: rank-00000\.safetensors differs from its"):
        load_weights(path)
    with pytest.raises(CheckpointError, match="none of them whole"):
        load_weights(tmp_path)
    assert load_weights(path, verify="size").step == 5
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        load_weights(path)


def test_files_of_something_else_are_refused_with_the_remedy(tmp_path):
    torch.save(network().state_dict(), tmp_path / "official.pth")
    with pytest.raises(DataError, match=r"official\.pth: .* python -m uvit_dist\.convert from-official"):
        load_weights(tmp_path / "official.pth")
    (tmp_path / "5.ckpt").mkdir()
    (tmp_path / "5.ckpt/nnet_ema.pth").touch()
    with pytest.raises(DataError, match=r"convert it first: python -m uvit_dist\.convert from-official"):
        load_weights(tmp_path / "5.ckpt")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "text").write_text("no weights at all")
    (tmp_path / "empty").touch()
    for name in ("foreign.safetensors", "text", "empty"):
        with pytest.raises(DataError, match=r"no weights exported by uvit_dist .* python -m uvit_dist\.export"):
            load_weights(tmp_path / name)


# -- fine-tuning ------------------------------------------------------------------------------------------------------


def weights_of(net, null_label=None, **changes):
    config = {"diffusion": {"null_label": null_label}}
    return Weights(dict(net.state_dict()), config, {**MODEL, **changes}, 3, "ema", "there", "f")


def test_the_same_network_takes_everything_as_it_is(caplog):
    caplog.set_level(logging.INFO)
    old = network()
    assert same(adapt(weights_of(old, 4), network(1), 4), old)
    assert caplog.messages == []


@pytest.mark.parametrize(("size", "grids"), [(16, "4x4 patches to 8x8"), (4, "4x4 patches to 2x2")])
def test_another_resolution_resizes_the_patches_positions_alone(size, grids, caplog):
    caplog.set_level(logging.INFO)
    old, new = network(), network(1, img_size=size)
    adapted = adapt(weights_of(old, 4), new, 4)
    state = old.state_dict()
    assert torch.equal(adapted["pos_embed"][:, :2], state["pos_embed"][:, :2]), "label and time tokens"
    assert adapted["pos_embed"].shape == new.pos_embed.shape
    assert all(torch.equal(adapted[key], state[key]) for key in state if key != "pos_embed")
    new.load_state_dict(adapted)
    assert caplog.messages == [f"there: pos_embed: interpolated from a grid of {grids}"]


@pytest.mark.parametrize("side", [5, 8, 12, 16, 32])
def test_constant_and_linear_positions_stay_such(side):
    """torch's cubic kernel (a = -0.75) reproduces a line to a twentieth of a patch, and exactly at the middle."""
    old = 16
    x = torch.arange(old, dtype=torch.float32).repeat(old)
    positions = torch.stack([torch.full_like(x, 3.5), x, x.view(old, old).T.flatten()], dim=-1)[None]
    extras = torch.randn(1, 2, 3)
    out = resize_positions(torch.cat([extras, positions], dim=1), 2, side)
    assert torch.equal(out[:, :2], extras)
    constant, across, down = out[0, 2:].unflatten(0, (side, side)).unbind(-1)
    assert (constant - 3.5).abs().max() <= 1e-5
    expected = (torch.arange(side) + 0.5) * old / side - 0.5
    inside = (expected >= 1) & (expected <= old - 2)
    tolerance = 1e-5 if side == 8 else 0.05
    assert (across[:, inside] - expected[inside]).abs().max() <= tolerance
    assert torch.allclose(across, down.T, atol=1e-5), "rows are rows: x runs fastest"


@pytest.mark.parametrize(("before", "after", "carried"), [(4, 8, True), (None, 8, False), (4, None, False)])
def test_other_classes_start_anew_but_for_the_null_label(before, after, carried, caplog):
    caplog.set_level(logging.INFO)
    old, new = network(), network(1, num_classes=9)
    fresh = new.label_emb.weight.detach().clone()
    adapted = adapt(weights_of(old, before), new, after)
    rows = adapted["label_emb.weight"]
    assert torch.equal(rows[:-1], fresh[:-1])
    assert torch.equal(rows[-1], old.label_emb.weight[-1] if carried else fresh[-1])
    assert torch.equal(new.label_emb.weight, fresh), "the network itself is untouched"
    note = ", but the null label's is carried over" if carried else ""
    assert caplog.messages == [f"there: label_emb.weight: from 5 labels to 9: the rows start anew{note}"]


def test_as_many_rows_of_another_meaning_start_anew():
    """Four classes and the null label are not five classes."""
    old, new = network(), network(1)
    assert torch.equal(adapt(weights_of(old, 4), new, None)["label_emb.weight"], new.label_emb.weight)
    unknown = dataclasses.replace(weights_of(old), config={})
    assert torch.equal(adapt(unknown, new, 4)["label_emb.weight"], old.label_emb.weight)


def test_text_tokens_count_as_extra_tokens():
    text = dict(num_classes=-1, clip_dim=6, num_clip_token=3)
    old, new = network(**text), network(1, img_size=16, **text)
    adapted = adapt(weights_of(old, **text), new, None)["pos_embed"]
    assert torch.equal(adapted[:, :4], old.pos_embed[:, :4])
    assert adapted.shape == new.pos_embed.shape
    with pytest.raises(DataError, match=r"pos_embed: \(1, 20, 16\) there, \(1, 21, 16\) in this network"):
        adapt(weights_of(old, **text), network(**{**text, "num_clip_token": 4}), None)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"embed_dim": 32}, r"pos_embed: \(1, 18, 16\) there, \(1, 18, 32\) in this network"),
        ({"depth": 4}, r"in_blocks\.1\.norm1\.weight: missing there, \(16,\) in this network"),
        ({"patch_size": 4, "img_size": 16}, r"patch_embed\.proj\.weight: \(16, 4, 2, 2\) there, \(16, 4, 4, 4\)"),
        ({"in_chans": 3}, r"decoder_pred\.weight: \(16, 16\) there, \(12, 16\)"),
        ({"num_classes": -1}, r"label_emb\.weight: \(5, 16\) there, none in this network"),
        ({"num_heads": 4}, r"model\.num_heads: 2 there, 4 in this network"),
        ({"conv": False}, r"final_layer\.weight: \(4, 4, 3, 3\) there, none"),
    ],
)
def test_what_cannot_change_is_refused(changes, line, caplog):
    caplog.set_level(logging.INFO)
    with pytest.raises(DataError, match=line) as caught:
        adapt(weights_of(network(), 4), network(**changes), 4)
    message = str(caught.value)
    assert "model.img_size and model.num_classes may differ. Width, depth, heads, patch size" in message
    assert '"embed_dim": 16' in message, "how to set the model section"
    assert len(message.splitlines()) <= 11
    assert ("more" in message) == ("embed_dim" in changes or "depth" in changes)
    assert caplog.messages == []
