"""Images from (seed, image id): conditions, solvers, the command's mistakes."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.golden_values import GOLDEN
from tests.systems import command
from tests.tiny import DEMO, ROOT
from uvit_dist import sample
from uvit_dist.config_yaml import load_config
from uvit_dist.data.latents import Provenance, Sample, TextProvenance
from uvit_dist.data.shards import ShardIndex, read_index, write_index, write_shard
from uvit_dist.errors import ConfigError
from uvit_dist.models.uvit import UViT
from uvit_dist.pipeline import UViTPipeline
from uvit_dist.sampler import ImageConditions, Sampler

SMALL = ["model.embed_dim=32", "model.depth=2", "sample.steps=4"]


class Recorder(torch.nn.Module):
    """A network that says what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x, timesteps, y=None, context=None):
        self.asked.append((x.shape[0], timesteps[0].item(), y, context))
        return 0.1 * x


def config_of(name, *overrides):
    path = DEMO if name == "digits_demo" else ROOT / "configs" / f"{name}.yaml"
    return load_config(path, [*SMALL, "model.num_heads=2", *overrides])


@pytest.mark.parametrize(
    ("solver", "calls", "first", "last"),
    [
        ("dpm_solver", 4, 999.0, None),
        ("euler_maruyama_sde", 4, 999.0, 0.999),
        ("euler_maruyama_ode", 4, 999.0, 0.999),
    ],
)
def test_the_configured_solver_calls_the_network_in_its_time(solver, calls, first, last):
    """In continuous time the network sees 999·t; Euler–Maruyama's last call is at t = 1e-3."""
    net = Recorder()
    config = config_of("uvit_s_cifar10", f"sample.solver={solver}")
    images = Sampler(config, net, None).generate(torch.arange(3), {}, seed=5)
    assert images.shape == (3, 3, 32, 32)
    assert images.dtype == torch.uint8
    times = [time for _, time, _, _ in net.asked]
    assert len(times) == calls
    assert times[0] == pytest.approx(first)
    assert times == sorted(times, reverse=True)
    if last is not None:
        assert times[-1] == pytest.approx(last)


def test_discrete_systems_call_the_network_from_1000_on():
    net = Recorder()
    config = config_of("uvit_h_imagenet256")
    y = torch.tensor([3, 4])
    sampler = Sampler(without_autoencoder(config), net, None)
    sampler.generate(torch.arange(2), {"y": y}, seed=5)
    assert net.asked[0][0] == 4, "guidance asks for both at once"
    assert net.asked[0][1] == 1000.0
    assert torch.equal(net.asked[0][2], torch.tensor([3, 4, 1000, 1000]))


def without_autoencoder(config):
    """The same without an autoencoder, so that latents come out as they are."""
    return config.model_copy(update={"autoencoder": None})


def test_an_image_depends_on_its_id_and_the_seed_alone():
    config = config_of("uvit_s_cifar10", "sample.solver=euler_maruyama_sde")
    sampler = Sampler(config, Recorder(), None)
    whole = sampler.generate(torch.arange(6), {}, seed=5)
    assert torch.equal(sampler.generate(torch.tensor([4, 1]), {}, seed=5), whole[[4, 1]])
    assert not torch.equal(sampler.generate(torch.arange(6), {}, seed=6), whole)
    assert len({image.numpy().tobytes() for image in whole}) == 6


@pytest.mark.parametrize(
    ("name", "file", "more"),
    [
        ("uvit_h_imagenet256", "dpm_solver_pp_discrete_50", []),
        ("uvit_h_imagenet512", "dpm_solver_pp_discrete_50", []),
        ("uvit_s_mscoco", "dpm_solver_pp_discrete_50", []),
        ("uvit_l_imagenet256", "dpm_solver_vpsde_50", []),
        ("uvit_l_imagenet512", "dpm_solver_vpsde_50", []),
        ("uvit_m_imagenet64", "dpm_solver_vpsde_50", []),
        ("uvit_s_cifar10", "euler_maruyama_ode_20", ["sample.steps=20", "sample.solver=euler_maruyama_ode"]),
    ],
)
def test_a_published_configuration_follows_the_golden_trajectory(name, file, more):
    """golden/dpm_solver_*.npz and euler_maruyama_ode_20.npz: the solver and the steps that the YAML names."""
    golden = np.load(GOLDEN / f"{file}.npz")
    config = load_config(ROOT / "configs" / f"{name}.yaml", more)
    times = []

    def toy(x, t):
        times.append(t)
        last = 0.0 if file.startswith("euler") else 0.1 * t
        return 0.7 * torch.tanh(x) + 0.3 * torch.sin(3 * x + 2 * t) + last

    sampler = Sampler(without_autoencoder(config), Recorder(), None)
    out = sampler._solve(toy, torch.from_numpy(golden["x_T"]), torch.arange(len(golden["x_T"])), seed=0)
    seen = torch.stack(times).numpy() * (999 if file.startswith("euler") else 1)
    np.testing.assert_allclose(seen, golden["model_times"], rtol=1e-11, atol=0)
    assert np.abs(out.numpy() - golden["output"]).max() <= 1e-6 * np.abs(golden["output"]).max()


def index_of(counts):
    made = Provenance("pixels", "uint8", (3, 64, 64), "made in a test", 64, "adm", False, len(counts), sum(counts))
    return ShardIndex("index.json", dataclasses.replace(made, class_counts=tuple(counts)), (), "")


def test_labels_are_even_or_as_frequent_as_in_training():
    ids = torch.arange(40_000)
    even = ImageConditions(config_of("uvit_l_imagenet256"), None).of(ids)["y"]
    assert (even.min(), even.max()) == (0, 999), "the null label is never asked for"
    config = config_of("uvit_m_imagenet64", "model.num_classes=3")
    labels = ImageConditions(config, index_of([100, 300, 600])).of(ids)["y"]
    shares = np.bincount(labels, minlength=3) / len(ids)
    assert shares == pytest.approx([0.1, 0.3, 0.6], abs=0.01)
    assert torch.equal(ImageConditions(config, index_of([100, 300, 600])).of(ids[77:80])["y"], labels[77:80])


@pytest.mark.parametrize(
    ("name", "labels", "prompts", "message"),
    [
        ("uvit_h_imagenet256", None, [], "labels: missing; say which classes, from 0 to 999"),
        ("uvit_h_imagenet256", [3, 1000], [], r"labels \[3, 1000\]: must be numbers from 0 to 999"),
        ("uvit_h_imagenet256", None, ["a cat"], "prompts: this system knows no texts; give labels"),
        ("uvit_s_cifar10", [3], [], r"labels \[3\]: this system is unconditional; give the count alone"),
        ("uvit_s_mscoco", [3], [], "prompts: this system is asked with texts"),
        ("uvit_s_mscoco", None, [], "prompts: this system is asked with texts"),
    ],
)
def test_a_system_is_asked_in_its_own_terms(name, labels, prompts, message):
    with pytest.raises(ConfigError, match=message):
        UViTPipeline(config_of(name), Recorder(), None, None)(labels, prompts)


def test_the_command_takes_numbers_with_commas():
    assert sample.labels_of("3,207") == [3, 207]
    assert sample.labels_of(None) is None
    with pytest.raises(ConfigError, match="--labels cat: give numbers"):
        sample.labels_of("cat")


def test_rows_are_repeated_and_the_last_batch_is_padded():
    net = Recorder()
    config = without_autoencoder(config_of("uvit_h_imagenet256", "sample.cfg_scale=0"))
    images = UViTPipeline(config, net, None, None).tensors([207, 360], count=3, batch_size=4)
    assert len(images) == 6
    asked = [y.tolist() for _, time, y, _ in net.asked if time == 1000.0]
    assert asked == [[207, 207, 207, 360], [360, 360, 360, 360]]


def test_a_call_may_change_how_it_samples():
    net = Recorder()
    config = without_autoencoder(config_of("uvit_h_imagenet256", "sample.cfg_scale=0"))
    pipeline = UViTPipeline(config, net, None, None)
    assert len(pipeline([7], batch_size=1, steps=5)) == 1
    assert len(net.asked) == 5
    with pytest.raises(ConfigError, match="stepz: no such key; did you mean steps"):
        pipeline([7], stepz=5)


def test_guidance_without_a_null_condition_is_refused():
    config = config_of("uvit_h_imagenet256").model_copy(update={"autoencoder": None})
    broken = config.model_copy(update={"diffusion": config.diffusion.model_copy(update={"null_label": None})})
    with pytest.raises(ConfigError, match="guidance needs a null condition"):
        Sampler(broken, Recorder(), None).generate(torch.arange(2), {"y": torch.tensor([1, 2])}, seed=0)


def test_the_command_explains_what_it_cannot_read(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        command(sample.main, "--checkpoint", str(tmp_path / "nowhere"), "--grid", str(tmp_path / "out.png"))
    assert left.value.code == 66
    assert "nowhere: no such file or directory" in capsys.readouterr().err


def test_beyond_their_number_captions_come_with_others_of_the_same_samples(tmp_path):
    """Twice as many images as held-out samples: each sample is asked for twice, with captions drawn anew."""
    made = Provenance("moments", "float16", (8, 2, 2), "test", 16, "coco", False, 0, 40, text=TextProvenance(
        "t" * 64, "float16", (2, 3), ""), autoencoder="a", encoder_fingerprint="f", scale_factor=1.0)  # fmt: skip
    samples = [
        Sample(f"{i:03d}", -1, np.zeros((8, 2, 2), np.float16), [f"{10 * i + k}" for k in range(3)],
               np.stack([np.full((2, 3), 10 * i + k, np.float16) for k in range(3)]))
        for i in range(40)
    ]  # fmt: skip
    records = [write_shard(str(tmp_path), "latents-0", samples, made)]
    write_index(str(tmp_path / "index.json"), records, made)
    config = config_of("uvit_s_mscoco", f"evaluate.captions={tmp_path}/index.json")
    conditions = ImageConditions(config, read_index(str(tmp_path / "index.json")))
    values = conditions.of(torch.arange(80))["context"][:, 0, 0].long()
    first, second = values[:40], values[40:]
    assert torch.equal(first // 10, second // 10)
    assert sorted((first // 10).tolist()) == list(range(40))
    assert 5 < (first != second).sum() < 40
    assert torch.equal(conditions.of(torch.tensor([77, 3]))["context"][:, 0, 0].long(), values[[77, 3]])
    assert conditions.texts(torch.arange(80)) == [str(value) for value in values.tolist()], "these very captions"


def test_an_override_cannot_make_a_network_another(tmp_path, capsys):
    """The configuration comes with the weights; what it says of them cannot be changed with it."""
    config = config_of("digits_demo")
    net = UViT(**config.model.model_dump())
    model = json.dumps(config.model.model_dump(mode="json", exclude={"use_checkpoint"}))
    metadata = {"config": config.model_dump_json(), "model": model, "step": "3", "kind": "ema"}
    save_file(net.state_dict(), tmp_path / "ema.safetensors", metadata)
    common = ["--checkpoint", str(tmp_path / "ema.safetensors"), "--grid", str(tmp_path / "out.png"), "--labels", "1"]
    for change in ("diffusion.schedule=vpsde", "autoencoder.scale_factor=5", "model.depth=4"):
        with pytest.raises(SystemExit) as left:
            command(sample.main, *common, change)
        assert left.value.code == 65
        assert "trained with" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()
    assert "4 images" in command(sample.main, *common, "sample.cfg_scale=0.3")
    assert (tmp_path / "out.png").exists()
