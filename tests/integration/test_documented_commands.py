"""The commands of the documentation run: as they are written, on the least that stands in for what they name.

Dry runs take the real configurations. For other commands one tiny system on a few digits stands for the published
ones: its images, shards and run are made once, by the README's own commands. Each command line is the program's own
``main`` in a process that is forked after the imports; what it starts itself are processes as always.
"""

import multiprocessing
import os
import re
import shlex
import shutil
import sys
import traceback

import pytest
from PIL import Image

from data_tools.sources import DigitsSource
from tests.documents import DOCUMENTS, ROOT, Command, commands, configurations, main_of
from tests.ranks import CONTEXT
from tests.tiny import SMALL
from uvit_dist.config_yaml import dump_config, load_config

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
PARSED_ONLY = {
    # of "DOCUMENT PROGRAM ARGUMENTS": why it is not run here, and where it, or its like, is
    r"docs/transcript\.md .*": "docs/make_transcript.py types them",
    r"docs/howto_dataset\.md .*my_images.*": "test_docs.py runs them, one after the other",
    r"(README|slurm/README)\.md .*digits_demo.*": "test_demo.py; on a cluster: test_slurm_launch.py",
    r"slurm/README\.md slurm\.rehearsal .*": "test_rehearsal.py",
    r"slurm/README\.md uvit_dist\.status .*": "the states of a job of SLURM: test_slurm_launch.py",
    r"slurm/README\.md uvit_dist\.worker .*": "torchrun on several nodes: test_slurm_jobs.py",
    r".* uvit_dist\.launch (?!.*--dry-run).*my_cluster\.yaml.*": "SLURM: test_slurm_launch.py",
    r".* uvit_dist\.launch (?!.*(--dry-run|--local)).*my_imagenet512\.yaml.*": "SLURM: test_slurm_launch.py",
    r".* uvit_dist\.follow .*": "a job of SLURM: test_slurm_launch.py",
    r".* uvit_dist\.status .* --watch 30": "goes on until it is stopped: test_status.py",
    r".* data_tools\.precompute_latents .*my_imagenet512.*": "ImageNet's tars: test_tar_sources.py, test_precompute.py",
    r".* data_tools\.pack_images .*cifar10.*": "CIFAR-10's files: test_systems.py",
    r".* uvit_dist\.sample .*--prompt.*": "CLIP's weights: test_systems.py",
    r".* data_tools\.\w+ .*my_latents.*": "as the same tools with other configurations",
    r".* uvit_dist\.launch .*my_latents.*": "as training with other configurations",
    r".* uvit_dist\.tune .*": "tries for up to two minutes: test_tune.py",
    r".* uvit_dist\.launch .*train\.init_from=.*": "test_fine_tune.py",
    r"docs/doctor\.md .*run_dir=/scratch/.*": "as the README's",
    r".* uvit_dist\.launch .*profile\.steps=.*": "test_profile.py",
}
STAND_INS = (
    # what a document names → what is there
    (r"configs/(uvit_h_imagenet\d+|my_imagenet512|my_fine_tuning)\.yaml|CONFIG\.yaml|my\.yaml", "configs/tiny.yaml"),
    (r"runs/(uvit_h_imagenet\d+|my_imagenet512|digits_demo)|RUN_DIR", "runs/tiny"),
    (r"data/imagenet\d*_val/", "data/tiny_val/"),
    (r"data/imagenet\d+(?=/|$)", "data/tiny"),
    (r"uvit-h-imagenet512", "exported"),
    (r"s3://my-bucket", "bucket"),
    (r"/tmp/", ""),
    (r" --local 8", ""),
    (r"207,360(,387)?", "3,8"),
    (r"step-00100000", "step-00000002"),
    (r"steps=25,50", "steps=2,3"),
    (r"small_samples=10000", "small_samples=10"),
    (r"workdir/ckpts/(500000\.ckpt --config configs/)tiny", r"\1fresh"),  # whose run has no checkpoint yet
)
TINY = [
    *SMALL, "run_dir=runs/tiny", "data.format=folder", "data.source=data/imagenet/train",
    "data.index=data/tiny/index.json", "evaluate.reference=data/tiny/reference.npz", "evaluate.features=pixels_8x8",
    "launch.processes_per_node=1", "train.steps=4", "checkpoint.every=2", "evaluate.samples=20",
    "data.check_shuffle=false",
]  # fmt: skip


def written():
    """Each command line once, in order: "DOCUMENT PROGRAM ARGUMENTS" → the command."""
    found = {}
    for path in DOCUMENTS:
        for command in commands(path):
            if command.program in ("make", "pytest") or command.error:
                continue
            line = shlex.join([command.program, *command.arguments])
            found.setdefault(line, (f"{path.relative_to(ROOT)} {line}", command))
    return list(found.values())


def why_not(line):
    return next((why for pattern, why in PARSED_ONLY.items() if re.fullmatch(pattern, line)), None)


def is_dry(command):
    return command.program == "uvit_dist.launch" and "--dry-run" in command.arguments


def on_stand_ins(command):
    """The command with stand-ins for what it names; the stand-in's configuration has one process on this machine."""
    line = shlex.join(command.arguments)
    for pattern, name in STAND_INS:
        line = re.sub(pattern, name, line)
    return Command(command.where, command.program, tuple(shlex.split(line)))


RUN = [command for line, command in written() if why_not(line) is None]
DRY = [command for command in RUN if is_dry(command)]
REAL = list({(c.program, c.arguments): c for c in map(on_stand_ins, RUN) if not is_dry(c)}.values())


def _main(command, directory, out):
    descriptor = os.open(out, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(directory)
    os.environ["PYTHONPATH"] = str(ROOT)
    sys.argv = [command.program, *command.arguments]
    try:
        sys.exit(main_of(command.program)())
    except Exception:
        traceback.print_exc()
        raise


def run(command, directory):
    """(exit code, output) of a command line."""
    out = directory / f"out-{multiprocessing.current_process().pid}.txt"
    process = CONTEXT.Process(target=_main, args=(command, directory, out))
    process.start()
    process.join(200)
    if process.is_alive():
        process.terminate()
        process.join()
    return process.exitcode, out.read_text()


def succeed(command, directory):
    code, told = run(command, directory)
    assert code == 0, f"{command.program} {shlex.join(command.arguments)}\n{told}"
    return told


def now(line, directory):
    program, *arguments = line.split()
    return succeed(Command("here", program, tuple(arguments)), directory)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The checkout's configurations, and those that the documents tell the reader to write."""
    root = tmp_path_factory.mktemp("published")
    shutil.copytree(ROOT / "configs", root / "configs")
    shutil.copytree(ROOT / "slurm", root / "slurm")
    shutil.copy(root / "slurm" / "gpu.yaml", root / "slurm" / "my_cluster.yaml")
    for name, text in configurations().items():
        (root / name).write_text(text)
    return root


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Images, shards, a finished run and what is made of it, as the commands of the documents need them."""
    root = tmp_path_factory.mktemp("tiny")
    digits = DigitsSource()
    for number in range(72):
        part = "train" if number < 48 else "val"
        folder = root / "data" / "imagenet" / part / str(digits.labels[number])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.load(number)).save(folder / f"{number}.png")
    shutil.copytree(ROOT / "configs", root / "configs")
    config = dump_config(load_config(ROOT / "configs" / "digits_demo.yaml", TINY))
    (root / "configs" / "tiny.yaml").write_text(config)
    (root / "configs" / "fresh.yaml").write_text(config.replace("run_dir: runs/tiny", "run_dir: runs/fresh"))
    shutil.copytree(ROOT / "slurm", root / "slurm")
    shutil.copy(root / "slurm" / "gpu.yaml", root / "slurm" / "my_cluster.yaml")
    now("data_tools.precompute_latents --config configs/tiny.yaml precompute.reference=true", root)
    now("uvit_dist.launch --config configs/tiny.yaml --local 1", root)
    now("data_tools.copy_shards data/tiny/index.json bucket/imagenet512", root)
    now("uvit_dist.export --run-dir runs/tiny --out exported", root)
    now("uvit_dist.convert to-official runs/tiny --out imagenet256_uvit_huge.pth", root)
    now("uvit_dist.convert to-official runs/tiny --out 500000.ckpt", root)
    now(
        "uvit_dist.convert from-official imagenet256_uvit_huge.pth --config configs/tiny.yaml --out h256.safetensors",
        root,
    )
    return root


@pytest.mark.parametrize("command", DRY, ids=str)
def test_dry_runs_as_they_are_written(command, published):
    before = sorted(published.rglob("*"))
    told = succeed(command, published)
    assert "[computed" in told
    assert [path for path in sorted(published.rglob("*")) if path not in before and path.suffix != ".txt"] == []


@pytest.mark.parametrize("command", REAL, ids=str)
def test_commands_run(command, tiny):
    if command.program == "uvit_dist.doctor":
        code, told = run(command, tiny)
        assert code in (0, 65, 66, 69, 78), told  # of the first problem that it finds here
        assert "Traceback" not in told
        assert "the check itself failed" not in told
        return
    wanted = [tiny / value for name, value in zip(command.arguments, command.arguments[1:], strict=False)
              if name in ("--out", "--grid")]  # fmt: skip
    for path in wanted:  # what is there already is not written over
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    succeed(command, tiny)
    assert [path for path in wanted if not path.exists()] == []


def test_what_is_not_run_is_still_documented():
    lines = [line for line, _ in written()]
    assert [pattern for pattern in PARSED_ONLY if not any(re.fullmatch(pattern, line) for line in lines)] == []
    assert len(DRY) >= 6
    assert len(REAL) >= 25
