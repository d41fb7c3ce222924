"""Strict YAML: every mistake at once, with its key, the rule and the nearest name."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.tiny import DEMO, ROOT
from uvit_dist.config_rules import micro_batch_size, smaller_node_counts
from uvit_dist.config_yaml import dump_config, load_config
from uvit_dist.errors import ConfigError


def mistakes(*overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(DEMO, overrides)
    return str(caught.value)


def test_a_dumped_config_reads_back_equal(tmp_path):
    config = load_config(DEMO, ["optimizer.lr=3e-4", "run_dir=else where"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert (again.optimizer.lr, again.run_dir) == (3e-4, "else where")


def test_a_config_cannot_be_changed():
    config = load_config(DEMO)
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3


def test_all_mistakes_are_told_at_once_each_with_its_key():
    text = mistakes(
        "model.embed_dims=64",
        "optimiser.lr=1",
        "train.steps=many",
        "train.log_every=0",
        "zero.stage=4",
        "run_dir=s3://bucket/run",
    )
    assert "6 mistake(s)" in text
    assert "run_dir s3://bucket/run must be a local path" in text, "rules between values that are right in themselves"
    assert "model.embed_dims: no such key; did you mean model.embed_dim?" in text
    assert "optimiser: no such key; did you mean optimizer?" in text
    assert "train.steps: 'many': Input should be a valid integer" in text
    assert "train.log_every: 0: Input should be greater than or equal to 1" in text or "greater than 0" in text
    assert re.search(r"zero\.stage: 4: Input should be 0, 1, 2 or 3", text)


def test_types_are_strict_but_yaml_numbers_are_numbers():
    assert load_config(DEMO, ["optimizer.lr=1"]).optimizer.lr == 1.0
    assert "optimizer.lr: '1e-4': Input should be a valid number" in mistakes("optimizer.lr='1e-4'")
    assert "model.conv: 'yes'" in mistakes("model.conv=yes"), "yes is a string in YAML 1.2"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.global_batch_size=60"], "train.global_batch_size 60 must be divisible by data.lanes 8"),
        (["launch.processes_per_node=3"], "3 ranks must divide data.lanes 8; valid numbers of ranks: [1, 2, 4, 8]"),
        (["model.num_heads=3"], "model: embed_dim 128 must be divisible by num_heads 3"),
        (["diffusion.null_label=11"], "diffusion.null_label 11 must be the last label, 10 = model.num_classes - 1"),
        (["diffusion.null_label=null"], "sample.cfg_scale 1.5 needs diffusion.null_label"),
        (["train.precision=bf16", "zero.stage=0"], "train.precision bf16 needs zero.stage 1, 2 or 3"),
        (["diffusion.null_label=3"], "diffusion.null_label 3 must be the last label, 10"),
        (["launch.nodes=2"], "launch.target local is this machine alone; set launch.nodes 1"),
        (["launch.spares=-1"], "launch.spares: -1: Input should be greater than or equal to 0"),
        (["launch.spares=1"], "launch.spares 1: launch.target local has no other nodes; set launch.spares 0"),
        (["launch.min_nodes=0"], "launch.min_nodes: 0: Input should be greater than 0"),
        (["launch.min_nodes=2"], "launch.min_nodes 2 must be at most launch.nodes 1; lower it, or leave it out"),
        (
            ["launch.target=slurm", "launch.nodes=4", "launch.min_nodes=3"],
            "launch.min_nodes 3: no number of nodes from 3 to 3 will do: their ranks, 2 each, must divide data.lanes 8",
        ),
        (["run_dir=s3://bucket/run"], "run_dir s3://bucket/run must be a local path, not a URL"),
        (["seed=18446744073709551616"], "seed: 18446744073709551616: Input should be less than"),
        (["data.format=folder"], "data: source: missing; format folder needs it"),
        (["data.format=coco", "data.source=x"], "data: captions: missing; format coco needs it"),
        (["data.split=test"], "data: split test: only cifar10, celeba, imagenet_tars have parts"),
        (["data.space=pixels"], "autoencoder: data.space pixels has none"),
        (["data.space=pixels", "autoencoder=null"], "must be 3 and data.image_size 32, the shape of the pixels"),
        (["autoencoder=null"], "autoencoder: missing; latents need it"),
        (
            ["model.num_classes=-1", "diffusion.null_label=null", "model.clip_dim=8"],
            "text: missing; model.clip_dim needs",
        ),
        (["text.encoder=x"], "text: needs model.clip_dim"),
        (["text.encoder=x", "text.tokenizer=y"], "text.tokenizer: needs text.tower"),
        (["model.num_classes=-1"], "diffusion.null_label 10: the model has no labels"),
        (["sample.solver=euler_maruyama_sde"], "sample.solver euler_maruyama_sde needs diffusion.schedule vpsde"),
        (["sample.solver=ddim"], "sample.solver: 'ddim': Input should be 'dpm_solver_pp', 'dpm_solver'"),
        (["checkpoint.keep=1"], "checkpoint.keep: 1: Input should be greater than or equal to 2"),
        (["model.use_checkpoint=some"], "model.use_checkpoint: 'some': Input should be False, True or 'selective'"),
        (["speed.cuda_graphs=true"], "speed: cuda_graphs needs compile true"),
        (["speed.cuda_graphs=true", "speed.compile=true", "zero.stage=3"], "needs zero.stage 1 or 2, not 3"),
        (
            ["speed.cuda_graphs=true", "speed.compile=true", "model.use_checkpoint=true"],
            "speed.cuda_graphs: with model.use_checkpoint true",
        ),
        (["speed.attention=fast"], "speed.attention: 'fast': Input should be 'auto', 'flash'"),
        (["speed.peak_tflops=0"], "speed.peak_tflops: 0: Input should be greater than 0"),
        (["profile.steps=25:20"], "profile: steps '25:20': write first:end with first < end"),
        (["profile.steps=20"], "profile.steps: 20: Input should be a valid string"),
        (["profile.steps=some"], "profile: steps 'some': write first:end"),
        (["profile.steps=20:1000000000"], "profile.steps 20:1000000000 must end within train.steps"),
        (["profile.steps=20:25", "profile.ranks=[2]"], "profile.ranks [2]: launch has the ranks 0 to 1"),
        (["profile.ranks=[-1]"], "profile.ranks.0: -1: Input should be greater than or equal to 0"),
        (["train.steps"], "override 'train.steps': write it as section.key=value"),
        (["run_dir.x=1"], "override 'run_dir.x=1': run_dir is a value, not a section"),
        (["train.steps=[1"], "not valid YAML"),
    ],
)
def test_broken_rules_are_explained(overrides, message):
    assert message in mistakes(*overrides)


@pytest.mark.parametrize(
    ("overrides", "counts"),
    [
        (["launch.nodes=4"], ()),
        (["launch.nodes=4", "launch.min_nodes=4"], ()),
        (["launch.nodes=4", "launch.min_nodes=2"], (2,)),
        (["launch.nodes=4", "launch.min_nodes=1"], (2, 1)),
        (["launch.nodes=8", "launch.processes_per_node=1", "launch.min_nodes=1"], (4, 2, 1)),
        # ZeRO-1 under CUDA graphs takes a rank's batch in one forward pass
        (
            ["launch.nodes=4", "launch.min_nodes=1", "speed.compile=true", "speed.cuda_graphs=true", "zero.stage=1",
             "train.global_batch_size=64", "train.micro_batch_size=16"],
            (2,),
        ),
    ],
)  # fmt: skip
def test_the_numbers_of_nodes_that_a_training_may_shrink_to(overrides, counts):
    config = load_config(DEMO, ["launch.target=slurm", *overrides])
    assert smaller_node_counts(dict(config)) == counts


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ConfigError, match=r"--config .*none\.yaml: cannot be read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds list, not a mapping"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "control.yaml").write_text("a: \x01\n")
    with pytest.raises(ConfigError, match=r"control\.yaml: not valid YAML"):
        load_config(tmp_path / "control.yaml")
    (tmp_path / "twice.yaml").write_text("a: 1\na: 2\n")
    with pytest.raises(ConfigError, match="line 2: not valid YAML: found duplicate key"):
        load_config(tmp_path / "twice.yaml")


def test_a_file_holds_only_what_differs_from_its_base(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "one.yaml").write_text(f"base: {DEMO}\nseed: 7\nmodel:\n  depth: 2\noptimizer: {{lr: 1e-3}}\n")
    (tmp_path / "deep/two.yaml").write_text("base: ../one.yaml\nmodel:\n  conv: false\n")
    one, two, demo = (load_config(path) for path in (tmp_path / "one.yaml", tmp_path / "deep/two.yaml", DEMO))
    assert (two.seed, two.model.depth, two.model.conv) == (7, 2, False)
    assert two.model_copy(update={"model": one.model}) == one
    assert one.train == demo.train
    assert load_config(tmp_path / "deep/two.yaml", ["seed=8"]).seed == 8

    (tmp_path / "lost.yaml").write_text("base: nowhere.yaml\n")
    with pytest.raises(ConfigError, match=r"base .*nowhere\.yaml of .*lost\.yaml: cannot be read"):
        load_config(tmp_path / "lost.yaml")
    (tmp_path / "one.yaml").write_text("base: deep/two.yaml\n")
    with pytest.raises(ConfigError, match="is based on itself"):
        load_config(tmp_path / "deep/two.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_in_the_repository_is_valid(path):
    config = load_config(path)
    assert config.run_dir.endswith(path.stem), "no two write into one directory"


@pytest.mark.parametrize(
    ("ablation", "base", "change"),
    [
        ("uvit_s_cifar10_no_skip", "../uvit_s_cifar10", {"skip": False}),
        ("uvit_s_cifar10_no_conv", "../uvit_s_cifar10", {"conv": False}),
        ("uvit_s_cifar10_mlp_time", "../uvit_s_cifar10", {"mlp_time_embed": True}),
        ("digits_no_skip", "digits_skips", {"skip": False}),
        ("digits_no_conv", "digits_skips", {"conv": False}),
        ("digits_mlp_time", "digits_skips", {"mlp_time_embed": True}),
    ],
)
def test_an_ablation_changes_one_thing(ablation, base, change):
    directory = ROOT / "configs" / "ablations"
    ours, theirs = (load_config(directory / f"{name}.yaml") for name in (ablation, base))
    changed = theirs.model_copy(update={"model": theirs.model.model_copy(update=change), "run_dir": ours.run_dir})
    assert ours == changed
    assert ours.model != theirs.model


def test_the_command_ends_with_78_and_no_traceback_before_anything_starts(tmp_path):
    command = [
        sys.executable,
        "-m",
        "uvit_dist.launch",
        "--config",
        str(DEMO),
        f"run_dir={tmp_path}/run",
        "train.step=5",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 78
    assert "train.step: no such key; did you mean train.steps?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_every_key_is_described():
    from uvit_dist.config import Config
    from uvit_dist.config_yaml import _section

    for name, field in Config.model_fields.items():
        section = _section(field.annotation)
        fields = section.model_fields if section else {name: field}
        assert all(field.description for field in fields.values()), name


def test_the_nearest_name_is_found_in_optional_sections():
    assert "autoencoder.encoders: no such key; did you mean autoencoder.encoder?" in mistakes("autoencoder.encoders=x")


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "found"), [(24, 6, 2, 6), (24, 6, 3, 4), (24, 24, 2, 12), (24, 5, 1, 4), (26, 4, 2, 1)]
)
def test_a_rank_s_batch_is_cut_as_large_as_asked_for_and_evenly(batch, micro, ranks, found):
    assert micro_batch_size(SimpleNamespace(global_batch_size=batch, micro_batch_size=micro), ranks) == found
