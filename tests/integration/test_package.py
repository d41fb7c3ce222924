"""The wheel, installed where there is no checkout: commands, configurations, profiles, C sources, types."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
SOURCES = ("uvit_dist", "data_tools", "configs", "slurm", "pyproject.toml", "README.md")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A virtual environment with the wheel, which finds this one's libraries and nothing of the checkout."""
    directory = tmp_path_factory.mktemp("package")
    source = directory / "source"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [
        *pip,
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        directory,
        source,
    ]
    subprocess.run(build, check=True)
    (wheel,) = directory.glob("*.whl")
    venv.create(directory / "env", symlinks=True)
    python = directory / "env" / "bin" / "python"
    command = [*pip, "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(command, check=True)
    libraries = sysconfig.get_path("purelib", vars={"base": str(directory / "env")})
    Path(libraries, "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.rmtree(source)
    return directory


def run(directory, *command):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    elsewhere = directory / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    first, *rest = command
    return subprocess.run(
        [directory / "env" / "bin" / first, *rest], cwd=elsewhere, env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def test_the_wheel_holds_what_it_needs(installed):
    told = run(
        installed, "python", "-c",
        "import uvit_dist, data_tools, pathlib as p\n"
        "from uvit_dist.data import ranges\n"
        "from data_tools import resample\n"
        "home = p.Path(uvit_dist.__file__).parent\n"
        "print(home, (home / 'py.typed').is_file(), ranges.kernel() is not None, resample.kernel() is not None)\n"
        "print(len(list((home / 'configs').glob('*.yaml'))), (home / 'profiles' / 'gpu.yaml').is_file())",
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    first, second = told.stdout.splitlines()
    assert first.startswith(str(installed / "env"))
    assert first.endswith("True True True")
    assert second == f"{len(list((ROOT / 'configs').glob('*.yaml')))} True"


def test_a_console_command_finds_configurations_and_profiles_from_anywhere(installed):
    for name in ("uvit_h_imagenet512", "configs/uvit_h_imagenet512.yaml"):
        told = run(installed, "uvit-launch", "--config", name, "--dry-run", "launch.cluster=slurm/gpu.yaml")
        assert told.returncode == 0, told.stderr
        assert "goodput" in told.stdout
    told = run(installed, "uvit-launch", "--config", "uvit_h_imagenet51", "--dry-run")
    assert told.returncode == 78
    assert "uvit_h_imagenet51: cannot be read" in told.stderr
    assert "Traceback" not in told.stderr


def test_a_configuration_of_ones_own_is_based_on_one_that_came_with_the_package(installed):
    elsewhere = installed / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    for base in ("uvit_h_imagenet512", "configs/uvit_h_imagenet512.yaml"):
        (elsewhere / "mine.yaml").write_text(f"base: {base}\nrun_dir: runs/mine\n")
        told = run(installed, "uvit-launch", "--config", "mine.yaml", "--dry-run", "launch.cluster=slurm/gpu.yaml")
        assert told.returncode == 0, told.stderr
        assert "runs/mine" in told.stdout
    (elsewhere / "mine.yaml").write_text("base: uvit_h_imagenet51\n")
    told = run(installed, "uvit-launch", "--config", "mine.yaml", "--dry-run")
    assert told.returncode == 78
    assert "base uvit_h_imagenet51 of mine.yaml: cannot be read" in told.stderr


def test_the_demo_has_its_autoencoder_with_it_and_what_is_beside_the_package_is_not_its_own(installed):
    """In a folder that holds another project. What the demo's first command reads is what the doctor looks at."""
    (site,) = (installed / "env" / "lib").glob("python*/site-packages")
    stray = '[project]\nname = "another"\nrequires-python = ">=4"\ndependencies = ["no-such-package"]\n'
    (installed / "elsewhere").mkdir(exist_ok=True)
    for folder in (site, installed / "elsewhere"):
        (folder / "pyproject.toml").write_text(stray)
    told = run(installed, "uvit-doctor", "--config", "digits_demo", "--json")
    assert told.stdout, told.stderr
    found = {finding["subject"]: finding for finding in json.loads(told.stdout)}
    assert found["autoencoder.encoder"]["level"] == found["versions"]["level"] == "ok"
    assert "no-such-package" not in told.stdout


@pytest.mark.parametrize(
    "name", ["launch", "status", "follow", "sample", "export", "convert", "demo", "tune", "doctor", "page"]
)
def test_every_console_command_has_a_help(installed, name):
    told = run(installed, f"uvit-{name}", "--help")
    assert told.returncode == 0, told.stderr
    assert "usage:" in told.stdout
