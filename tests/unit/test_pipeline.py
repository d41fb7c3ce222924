"""Weights as a folder and a pipeline: what the Hugging Face Hub and a notebook expect."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import uvit_dist
from tests.systems import ROOT
from tests.unit.test_export import MODEL, make, network, same
from uvit_dist import UViT, UViTPipeline, export, sample, score_log
from uvit_dist.config_yaml import load_config
from uvit_dist.errors import DataError, MissingInputError, OutputError

RECORD = {"fid": 3.25, "recall": 0.5, "samples": 1000, "weights": "ema", "step": 10, "of_run": True, "cfg_scale": 0.5,
          "solver": "dpm_solver_pp", "solver_steps": 5, "labels": "classes, even", "protocol": "abc",
          "sample_precision": "fp32", "reference_sha256": "1234567890abcdef"}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run of a tiny network on labelled pixels, with scores of its last checkpoint."""
    options = [f"model.{key}={value}" for key, value in {**MODEL, "in_chans": 3, "img_size": 32}.items()]
    config = load_config(
        ROOT / "configs" / "uvit_s_cifar10.yaml",
        [*options, "diffusion.null_label=4", "diffusion.label_dropout=0.1", "sample.steps=3",
         "sample.solver=dpm_solver",
         f"run_dir={tmp_path}/run"],
    ).model_dump(mode="json")  # fmt: skip
    make(tmp_path / "run", 10, 1, config=config)
    for record in ({**RECORD, "fid": 9.0}, RECORD, {**RECORD, "step": 5, "fid": 8.0}, {**RECORD, "weights": "master"}):
        score_log.append_line(score_log.path_of(tmp_path / "run"), record)
    return tmp_path / "run"


def exported(monkeypatch, run, out):
    monkeypatch.setattr("sys.argv", ["export", "--run-dir", str(run), "--out", str(out)])
    export.main()
    return out


def test_a_folder_holds_weights_description_and_card(tmp_path, run, monkeypatch):
    folder = exported(monkeypatch, run, tmp_path / "u-vit-tiny")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    described = json.loads((folder / "config.json").read_text())
    assert described["library_name"] == "uvit_dist"
    assert described["embed_dim"] == MODEL["embed_dim"]
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "uvit_dist"
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "fid": 3.25,
        "recall": 0.5,
    }
    assert "| steps | 10 of 128 samples: 1,280 samples |" in card.text
    assert "| FID | 3.25 | 1000 | dpm_solver_pp | 5 | 0.5 | classes, even | fp32 | abc | 1234567890ab |" in card.text


def test_without_an_evaluation_the_card_says_so(tmp_path, run, monkeypatch):
    score_log.path_of(run).unlink()
    card = ModelCard.load(exported(monkeypatch, run, tmp_path / "none") / "README.md")
    assert card.data.eval_results is None
    assert "No evaluation of these weights is on record" in card.text


def test_a_pipeline_gives_the_images_of_the_command(tmp_path, run, monkeypatch):
    folder = exported(monkeypatch, run, tmp_path / "tiny")
    pipe = UViTPipeline.from_pretrained(folder, device="cpu")
    images = pipe(labels=[0, 3], count=2, seed=5)
    assert [image.size for image in images] == [(32, 32)] * 4
    monkeypatch.setattr(
        "sys.argv",
        [
            "sample",
            "--checkpoint",
            str(run),
            "--labels",
            "0,3",
            "--count",
            "2",
            "--seed",
            "5",
            "--grid",
            f"{tmp_path}/g.png",
        ],
    )
    sample.main()
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    for number, image in enumerate(images):
        top, left = (2 + 34 * place for place in divmod(number, 2))
        assert np.array_equal(grid[top : top + 32, left : left + 32], np.asarray(image))
    again = UViTPipeline.from_pretrained(run, "sample.steps=4", device="cpu")
    assert again.config.sample.steps == 4
    assert "step 10" in again.origin


def test_a_network_is_saved_and_loaded_as_it_is(tmp_path):
    torch.manual_seed(0)
    net = UViT(**MODEL, use_checkpoint=True)
    net.save_pretrained(tmp_path / "net")
    loaded = UViT.from_pretrained(tmp_path / "net")
    assert same(loaded.state_dict(), net.state_dict())
    assert not loaded.training
    assert same(UViT.from_pretrained(tmp_path / "net" / "model.safetensors").state_dict(), net.state_dict())
    assert network(1).keys() == loaded.state_dict().keys()


def test_what_cannot_be_read_or_written_is_said(tmp_path):
    with pytest.raises(MissingInputError, match=r"nowhere: no such file"):
        UViT.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(DataError, match="no U-ViT exported"):
        UViT.from_pretrained(tmp_path / "other")
    with pytest.raises(OutputError, match="cannot be written"):
        UViT(**MODEL).save_pretrained(tmp_path / "other" / "model.safetensors" / "x")


def test_the_package_shows_its_classes_and_no_more():
    assert uvit_dist.UViT is UViT
    with pytest.raises(AttributeError, match="no attribute 'UVit'"):
        _ = uvit_dist.UVit
