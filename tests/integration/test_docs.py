"""The documentation holds: the site builds without a warning, its commands parse, its names and figures are true."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from data_tools.estimate import GB_MONTH_DOLLARS, estimate
from tests.documents import DOCUMENTS, ROOT, Command, blocks, code, commands, configurations, main_of, parsed
from tests.unit.test_layers import LAYERS, MODULES
from uvit_dist import launch
from uvit_dist.config import Config
from uvit_dist.config_cluster import read_profile
from uvit_dist.config_yaml import load_config
from uvit_dist.dry_run import dry_run
from uvit_dist.errors import ConfigError
from uvit_dist.evaluation import sweep
from uvit_dist.models.autoencoder import Autoencoder

COMMANDS = [command for path in DOCUMENTS for command in commands(path)]
PLACEHOLDER = re.compile(r"(configs/|slurm/)?(my\w*|[A-Z_]+)\.yaml")
"""Files that the reader has, and the checkout has not."""
STAND_IN = ROOT / "configs" / "uvit_h_imagenet512.yaml"
"""What the keys are looked up in where a command names such a configuration."""


def build(source, out):
    return subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", f"{source}/docs", "-d", f"{out}/doctrees",
         str(source), f"{out}/html"],
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    done = build(ROOT, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    pages = {str(page.relative_to(tmp_path / "html")) for page in (tmp_path / "html").rglob("*.html")}
    assert {str(path.relative_to(ROOT).with_suffix(".html")) for path in DOCUMENTS} <= pages
    assert "docs/index.html" in (tmp_path / "html/index.html").read_text()


@pytest.mark.slow
def test_dead_links_anchors_and_pictures_fail_the_build(tmp_path):
    dead = ["[a](no.md)", "[b](#nowhere)", "[c](other.md#nowhere)", "![d](no.png)", "[e](../benchmarks/no.json)"]
    site = tmp_path / "checkout"
    shutil.copytree(ROOT / "docs" / "site", site / "docs" / "site")
    for name in ("pyproject.toml", "docs/conf.py"):
        shutil.copy(ROOT / name, site / name)
    (site / "docs" / "index.md").write_text("# Title\n\n" + "\n\n".join(dead) + "\n\n```{toctree}\nother.md\n```\n")
    (site / "docs" / "other.md").write_text("# Other\n")
    done = build(site, tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("index.md:") == len(dead), done.stderr


def test_the_reference_of_keys_is_up_to_date():
    found = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    assert module.PATH.read_text() == module.reference(), "type: make docs"


def test_the_readme_and_the_reference_know_the_same_exit_codes():
    def codes(name):
        return {int(found) for found in re.findall(r"^\| (\d+) \|", (ROOT / name).read_text(), re.MULTILINE)}

    assert codes("README.md") == codes("docs/configuration.md")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The configurations of the checkout, with those beside them that documents tell the reader to write."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "configs", root / "configs")
    for name, text in configurations().items():
        assert not (root / name).exists(), f"{name} is in the checkout; use another name in the document"
        (root / name).write_text(text)
    return root


def test_the_documents_have_commands_and_configurations():
    assert len(COMMANDS) > 80
    assert {"configs/my_imagenet512.yaml", "configs/my_images.yaml"} <= set(configurations())


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.program not in ("make", "pytest")], ids=str)
def test_commands_parse_and_their_keys_exist(command, checkout, capsys):
    try:
        arguments = vars(parsed(command))
    except SystemExit:
        pytest.fail(f"{command}: {capsys.readouterr().err}")
    if not arguments.get("config"):
        return
    changes = [*arguments.get("overrides", ())]
    if command.program == "uvit_dist.launch":
        changes += [*sweep.overrides_of(arguments["sweep"]), *launch._as_overrides(Namespace(**arguments))]
    path = checkout / arguments["config"]
    if not path.exists() and PLACEHOLDER.fullmatch(arguments["config"]):
        path = STAND_IN
    if command.error:
        with pytest.raises(ConfigError) as mistake:
            load_config(path, changes)
        assert str(mistake.value).replace(f"{checkout}/", "") == command.error
        return
    config = load_config(path, changes)
    profile = config.launch.cluster
    if profile is not None and not PLACEHOLDER.fullmatch(profile):
        read_profile(profile)


@pytest.mark.parametrize(
    "line",
    ["--config configs/digits_demo.yaml --task train", "--config configs/digits_demo.yaml --job no", "--job train"],
)
def test_a_command_that_no_longer_runs_is_noticed(line):
    with pytest.raises(SystemExit):
        parsed(Command("here", "uvit_dist.launch", tuple(line.split())))


@pytest.mark.parametrize("goal", sorted({c.arguments for c in COMMANDS if c.program == "make"}), ids=str)
def test_targets_of_make_exist(goal):
    done = subprocess.run(["make", "-n", *goal], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.program == "pytest"], ids=str)
def test_tests_that_are_named_exist(command):
    files = [argument.partition("::")[0] for argument in command.arguments if argument.startswith("tests")]
    assert files
    assert all((ROOT / file).exists() for file in files)


PYTHON = [
    (f"{path.relative_to(ROOT)}:{line}", text)
    for path in DOCUMENTS
    for kind, line, text in blocks(path)
    if kind == "python"
]


@pytest.mark.parametrize(("where", "text"), PYTHON, ids=[where for where, _ in PYTHON])
def test_programs_in_documents_import_what_is_there(where, text):
    lines = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(lines, []), where, "exec"), {})


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_how_to_for_own_images_as_it_is_written(tmp_path):
    """Its configuration and its commands, one after the other, of 200 images; the network smaller, the run shorter."""
    document = ROOT / "docs" / "howto_dataset.md"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/my_images.yaml").write_text(configurations()["configs/my_images.yaml"])
    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "data/my_images" / name).mkdir(parents=True)
        for number in range(100):
            pixels = draw.integers(0, 256, (80, 100, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data/my_images" / name / f"{number:04d}.png")
    steps = [command for command in commands(document) if "my_images" in str(command.arguments)]
    assert len(steps) == 5
    for command in steps:
        small = SMALLER if command.program in ("uvit_dist.launch", "uvit_dist.sample") else ()
        done = subprocess.run(
            [sys.executable, "-m", command.program, *command.arguments, *small],
            cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size[0] >= 4 * 64, "four images in a row"
    scores = json.loads((tmp_path / "runs/my_images/evaluation/scores.jsonl").read_text())
    assert (scores["step"], scores["samples"]) == (6, 60)


SMALLER = (
    "model.embed_dim=32", "model.depth=2", "model.num_heads=2", "train.steps=6", "train.global_batch_size=16",
    "checkpoint.every=3", "sample.steps=4", "evaluate.samples=60",
)  # fmt: skip
TOOLS = sorted(
    f"{path.parent.name}.{path.stem}"
    for package in ("uvit_dist", "data_tools")
    for path in (ROOT / package).glob("*.py")
    if "\ndef main(" in (text := path.read_text()) and "ArgumentParser" in text  # the others are started by programs
)


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_says_how_it_is_used(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [tool, "--help"])
    with pytest.raises(SystemExit) as end:
        main_of(tool)()
    assert end.value.code == 0
    assert "usage:" in capsys.readouterr().out


NAMED = sorted({(str(path.relative_to(ROOT)), text) for path in DOCUMENTS for text in code(path)})
SECTIONS = {
    name: section
    for name, field in Config.model_fields.items()
    for section in (field.annotation, *get_args(field.annotation))  # one that may be none is a union
    if hasattr(section, "model_fields")
}
HOMES = ("", "uvit_dist", "data_tools", "tests", "tests/unit", "tests/integration", "benchmarks")


FOREIGN = "docs/comparison.md"
"""The document that names files of other projects, too."""
OURS = ("uvit_dist/", "data_tools/", "tests/", "benchmarks/", "configs/", "docs/")


def test_files_that_documents_name_exist():
    missing, made = [], {*configurations(), "config.yaml", "table.md"}
    for document, text in NAMED:
        path = re.fullmatch(r"(?:pytest )?((?:[\w.-]+/)*[\w-]+\.(?:py|c|yaml|md))(?: .*)?", text)
        if not path or PLACEHOLDER.fullmatch(path[1]) or path[1] in made:
            continue
        if document == FOREIGN and not path[1].startswith(OURS):
            continue
        if path[1].startswith(("NAME/", "RUN_DIR/")):
            continue
        homes = (*HOMES, str((ROOT / document).parent.relative_to(ROOT)))
        if not any((ROOT / home / path[1]).exists() for home in homes):
            missing.append((document, text))
    assert missing == []


def test_tests_that_the_comparison_names_exist():
    text = re.sub(r"\s+", " ", (ROOT / FOREIGN).read_text())
    named, file = [], ""
    for name, test in re.findall(r"`(?:\w+/)?(test_\w+\.py|…)(?:::(\w+))?`", text):
        file = file if name == "…" else name
        named.append((file, test))
    texts = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(named) > 30
    assert [
        (name, test)
        for name, test in named
        if not any(path.name == name and f"def {test}" in text for path, text in texts.items())
    ] == []


def test_modules_that_documents_name_exist():
    missing = []
    for document, text in NAMED:
        found = re.fullmatch(r"(?:python -m )?((?:uvit_dist|data_tools|benchmarks)(?:\.\w+)+)(?: .*)?", text)
        if found and not resolves(found[1]):
            missing.append((document, text))
    assert missing == []


def resolves(name):
    try:
        if importlib.util.find_spec(name):
            return True
    except ModuleNotFoundError:
        pass
    parent, _, attribute = name.rpartition(".")
    return "." in name and hasattr(importlib.import_module(parent), attribute)


def test_keys_that_documents_name_exist():
    """Of the forms ``train.steps``, ``train.steps=100`` and ``train.steps: 100``."""
    missing = []
    for document, text in NAMED:
        found = re.fullmatch(r"([a-z]+)\.(\w+)(?:\s*[=:].*)?", text)
        if (
            not found
            or found[1] not in SECTIONS
            or text.endswith((".py", ".jsonl", ".json", ".yaml", ".c", ".safetensors"))
        ):
            continue
        keys = SECTIONS[found[1]].model_fields
        if found[2] not in keys and not (ROOT / "uvit_dist" / found[1] / f"{found[2]}.py").exists():
            missing.append((document, text))
    assert missing == []


def test_the_design_names_every_module():
    text = (ROOT / "docs" / "design.md").read_text().split("## Layers")[1].split("Layer 0 needs")[0]
    named = set(re.findall(r"\w+", text))
    members = {name for layer in LAYERS.values() for name in layer}
    there = [name for name, _ in MODULES if name in members]
    there += [name for name in members if (ROOT / "uvit_dist" / name.replace(".", "/")).is_dir()]
    assert {part for name in there for part in name.split(".")} - named == set()


@pytest.mark.slow
def test_the_dry_run_of_the_tutorial_says_what_the_tutorial_says():
    """As a user runs it, each quoted line of its output; and the figures of other dry runs."""
    tutorial = (ROOT / "docs" / "tutorial_imagenet.md").read_text()
    shown = [line.strip() for line in tutorial.splitlines() if re.search(r"^ {4}.*\[computed", line)]
    assert len(shown) >= 5
    done = subprocess.run(
        [sys.executable, "-m", "uvit_dist.launch", "--config", "configs/uvit_h_imagenet512.yaml", "--dry-run"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    printed = {" ".join(line.split()) for line in done.stdout.splitlines()}
    assert [line for line in shown if " ".join(line.split()) not in printed] == []
    for job, change, figure in (
        ("train", "checkpoint.every=2500", "98.36%"),
        ("train", "checkpoint.every=10000", "99.58%"),
        ("evaluate", "evaluate.samples=50000", "1,332.3 PFLOP"),
        ("evaluate", "evaluate.samples=50000", "0.94"),
    ):
        assert figure in tutorial
        assert figure in dry_run(load_config("uvit_h_imagenet512", [change]), job, (), None)


STABLE_DIFFUSION = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
"""The shape of its autoencoder."""
IMAGES, VALIDATION_IMAGES = 1_281_167, 50_000


@pytest.mark.slow
@pytest.mark.parametrize("size", [512, 256])
def test_the_figures_of_precompute_in_the_tutorial(size):
    text = (ROOT / "docs" / "tutorial_imagenet.md").read_text()
    with torch.device("meta"):
        autoencoder = Autoencoder(AutoencoderKL(**STABLE_DIFFUSION))

    def of(images, *changes):
        config = load_config(f"uvit_h_imagenet{size}", changes)
        return estimate(config, images, None, None, autoencoder, None, 3.0)

    train, half = of(IMAGES), of(IMAGES, "precompute.precision=bf16")
    held_out = of(VALIDATION_IMAGES, "data.mirror=false")
    on_s3 = of(IMAGES, "data.index=s3://b/index.json")
    pflop = train.image_flop * train.passes * IMAGES / 1e15
    figures = [
        f"{train.images:,}", f"{train.samples:,}", f"{train.shards:,}", f"{train.output_bytes / 1e9:.1f} GB",
        f"{train.image_flop / 1e9:,.1f} GFLOP", f"{pflop:,.2f} PFLOP", f"{train.gpu_hours:.1f}",
        f"{half.gpu_hours:.1f}", f"{held_out.output_bytes / 1e9:.1f} GB", f"{held_out.gpu_hours:.1f}",
        f"${on_s3.output_bytes / 1e9 * GB_MONTH_DOLLARS:.2f}", f"${on_s3.output_requests.dollars:.2f}",
    ]  # fmt: skip
    assert [figure for figure in figures if figure not in text] == []
