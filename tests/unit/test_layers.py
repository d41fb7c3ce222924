"""The architecture, held by parsing: imports only go down, and each third-party system has one owner."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = {
    0: [
        "errors",
        "faults",
        "stopping",
        "compiled",
        "config",
        "config_data",
        "config_evaluate",
        "config_health",
        "checksums",
        "config_rules",
        "config_speed",
        "config_yaml",
        "config_cluster",
        "pins",
        "forecast",
        "tuning",
        "utilisation",
        "host_memory",
        "profile_summary",
        "ema",
        "fid",
        "scores",
        "guard",
        "diffusion",
        "data.latents",
        "data.plan",
        "data.journal",
    ],
    1: ["models"],
    2: [
        "data.loader",
        "data.reader",
        "data.ranges",
        "data.batch",
        "data.shards",
        "work",
        "spool",
        "score_log",
        "health",
        "dist",
        "storage",
        "safetensors_stream",
        "metrics",
        "attempts",
        "beats",
        "verdicts",
        "placement",
        "slurm",
    ],
    3: [
        "engine",
        "gradient_sums",
        "replay",
        "stragglers",
        "attribution",
        "acceleration",
        "profiling",
        "checkpoint",
        "second_home",
        "saving",
        "copier",
        "resuming",
        "divergence",
        "weights",
        "export_weights",
        "model_card",
        "preemption",
        "watchdog",
        "preflight",
        "lease",
        "run_state",
        "rank_check",
        "loss",
        "validation",
        "sampler",
        "pretrained",
    ],
    4: ["train", "trial", "evaluate", "evaluation"],
    5: [
        "submit",
        "snapshot",
        "orders",
        "order_checks",
        "follow",
        "follow_ups",
        "local",
        "dry_run",
        "launch",
        "supervisor",
        "rounds",
        "succession",
        "sentry",
        "notices",
        "misfits",
        "worker",
        "pipeline",
        "sample",
        "convert",
        "export",
        "status",
        "tune",
        "doctor",
        "page",
        "demo",
    ],
}
PURE = {"numpy", "torch", "scipy", "pydantic", "ruamel"}
OWNERS = {
    "deepspeed": {"engine", "doctor.probes"},
    "webdataset": {"data.loader", "data.shards"},
    "fsspec": {"storage.files", "storage.remote"},
    "s3fs": {"storage.remote"},
    "obstore": {"storage.remote"},
    "botocore": {"storage.remote"},
    "submitit": {"submit"},
    "diffusers": {"models.autoencoder"},
    "open_clip": {"models.text", "models.clip"},
    "pytorch_fid": {"models.inception"},
    "wandb": {"metrics"},
    "huggingface_hub": {"model_card"},
    "matplotlib": {"evaluation.sweep", "page.charts"},
}


def modules(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / package).with_suffix("").parts)
        yield name, ast.parse(path.read_text())


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(name):
    for layer, members in LAYERS.items():
        if any(name == member or name.startswith(member + ".") for member in members):
            return layer
    return None


MODULES = [(name, tree) for name, tree in modules("uvit_dist") if not name.endswith("__init__")]


@pytest.mark.parametrize(("name", "tree"), MODULES, ids=[name for name, _ in MODULES])
def test_imports_only_go_down(name, tree):
    layer = layer_of(name)
    assert layer is not None, f"{name} belongs to no layer"
    for imported in imports(tree):
        if imported.startswith("uvit_dist."):
            below = layer_of(imported.removeprefix("uvit_dist."))
            assert below is None or below <= layer, f"{name} (layer {layer}) imports {imported} (layer {below})"
            assert below is not None or imported == "uvit_dist.__version__", imported
        top = imported.split(".")[0]
        if layer == 0:
            assert top in PURE | set(sys.stdlib_module_names) | {"uvit_dist"}, f"{name} imports {imported}"
        if top == "data_tools":
            assert name == "worker", f"{name} imports {imported}"


@pytest.mark.parametrize(("system", "owners"), OWNERS.items())
def test_each_third_party_system_has_one_owner(system, owners):
    users = {name for name, tree in MODULES for imported in imports(tree) if imported.split(".")[0] == system}
    assert users <= owners


def test_torch_distributed_is_spoken_to_in_dist_alone():
    users = {name for name, tree in MODULES for i in imports(tree) if i.startswith("torch.distributed")}
    assert users == {"dist"}


def test_data_tools_stand_on_layers_0_to_3():
    for name, tree in modules("data_tools"):
        for imported in imports(tree):
            if imported.startswith("uvit_dist."):
                assert layer_of(imported.removeprefix("uvit_dist.")) <= 3, f"{name} imports {imported}"


SHAPES = re.compile(r"\([A-Z0-9a-z*]+[,)]|shape|scalar|flat")
ARRAYS = re.compile(r"\b(Tensor|NDArray|ndarray|Pixels|Ids)\b")


def public_functions(package):
    """Functions and methods that others call: not those inside functions, nor scripts' ``main``."""
    for name, tree in modules(package):
        owners = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
        for function in (node for owner in owners for node in owner.body if isinstance(node, ast.FunctionDef)):
            if not function.name.startswith("_") and function.name != "main":
                yield f"{package}.{name}.{function.name}", function


@pytest.mark.parametrize("package", ["uvit_dist", "data_tools"])
def test_public_functions_say_shapes_and_errors(package):
    silent = []
    for name, function in public_functions(package):
        text = ast.get_docstring(function) or ""
        signature = ast.unparse(function.args) + (ast.unparse(function.returns) if function.returns else "")
        if ARRAYS.search(signature) and not SHAPES.search(text):
            silent.append(f"{name}: no shapes")
        raised = [ast.unparse(node.exc) for node in ast.walk(function) if isinstance(node, ast.Raise) and node.exc]
        if any("Error(" in what for what in raised) and "aises" not in text:
            silent.append(f"{name}: no errors")
    assert silent == []


def test_files_stay_readable():
    for package in ("uvit_dist", "data_tools", "tests", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 400, path


def test_the_training_loop_reads_as_the_algorithm():
    tree = dict(MODULES)["train"]
    (function,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train"]
    assert function.end_lineno - function.lineno < 60


@pytest.mark.parametrize("package", ["uvit_dist", "data_tools"])
def test_pickled_weights_load_as_plain_tensors_alone(package):
    loads = [
        (name, {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords})
        for name, tree in modules(package)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.load"
    ]
    assert all(keywords.get("weights_only") == "True" for _, keywords in loads), loads
    assert loads or package == "data_tools"
