"""Who may import whom, read from the source of every file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
PACKAGES = ("smi_fed", "server", "clients", "deploy", "simulations", "tests")
FILES = {
    str(path.relative_to(PROJECT)): path for package in PACKAGES for path in sorted((PROJECT / package).rglob("*.py"))
}


def imports(source, file):
    """Full names of all that `source` imports, wherever in the file: modules, and what is taken from them."""
    package = list(Path(file).parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def inside(name, *packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def below(file, *places):
    return any(file == place or file.startswith(f"{place}/") for place in places)


def offenders(files, *forbidden):
    return {
        file: found
        for file in files
        if (found := [name for name in imports(FILES[file].read_text(), file) if inside(name, *forbidden)])
    }


RULES = {
    "flwr": (
        lambda file: not below(file, "smi_fed/strategies", "server", "clients", "simulations", "tests"),
        ("flwr",),
    ),
    "flwr_datasets": (lambda file: not below(file, "smi_fed/data", "simulations", "tests"), ("flwr_datasets",)),
    "hydra": (lambda file: not below(file, "smi_fed/config.py", "simulations", "tests"), ("hydra", "omegaconf")),
    "ray": (lambda file: not below(file, "smi_fed/executors", "simulations", "tests"), ("ray",)),
    "executors": (lambda file: below(file, "smi_fed/executors"), ("smi_fed.strategies", "smi_fed.settings")),
    "inversion": (
        lambda file: below(file, "smi_fed/inversion"),
        ("smi_fed.distillation", "smi_fed.pipeline", "smi_fed.config", "smi_fed.strategies", "smi_fed.executors"),
    ),
    "distillation": (
        lambda file: below(file, "smi_fed/distillation", "smi_fed/relabelling.py"),
        ("smi_fed.inversion", "smi_fed.pipeline", "smi_fed.config", "smi_fed.strategies", "smi_fed.executors"),
    ),
    "the library": (
        lambda file: below(file, "smi_fed"),
        ("server", "clients", "deploy", "simulations", "tests"),
    ),
    "the apps": (lambda file: below(file, "server", "clients"), ("deploy", "simulations", "tests")),
    "deploy": (lambda file: below(file, "deploy"), ("server", "clients", "simulations", "tests")),
    "simulations": (lambda file: below(file, "simulations"), ("tests",)),
    "timm.create_model": (
        lambda file: not below(file, "smi_fed/models.py", "tests"),
        ("timm.create_model", "timm.models.create_model"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_imports_point_downwards(rule):
    applies, forbidden = RULES[rule]
    files = [file for file in FILES if applies(file)]
    assert files
    assert offenders(files, *forbidden) == {}


def test_every_file_is_looked_at():
    assert {"smi_fed/data/hub.py", "smi_fed/inversion/loop.py", "server/app.py", "clients/app.py"} <= FILES.keys()
    assert offenders(FILES, "flwr")
    assert offenders(FILES, "flwr_datasets").keys() >= {"smi_fed/data/hub.py", "smi_fed/data/partitions.py"}
    assert {file for file in offenders(FILES, "hydra", "omegaconf") if below(file, "smi_fed")} == {"smi_fed/config.py"}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import flwr", ["flwr"]),
        ("import flwr.app as x, torch", ["flwr.app", "torch"]),
        ("def f():\n    from flwr.app import Array, Message", ["flwr.app.Array", "flwr.app.Message"]),
        ("from smi_fed import distillation", ["smi_fed.distillation"]),
        ("from . import loop", ["smi_fed.inversion.loop"]),
        ("from .. import distillation", ["smi_fed.distillation"]),
        ("from ..distillation import distill", ["smi_fed.distillation.distill"]),
        ("'import flwr'", []),
    ],
)
def test_every_way_to_import_is_seen(source, found):
    assert list(imports(source, "smi_fed/inversion/x.py")) == found


def test_a_similar_name_is_another_package():
    assert inside("flwr.app", "flwr")
    assert not inside("flwr_datasets", "flwr")
    assert below("server/app.py", "server")
    assert not below("servers/app.py", "server")


ALONE = """
import sys
for name in ("flwr", "flwr_datasets", "hydra", "omegaconf", "ray"):
    sys.modules[name] = None  # importing it fails from here on

def loaded(name):
    return [module for module in sys.modules if module == name or module.startswith(name + ".")]

import smi_fed.distillation
assert not loaded("smi_fed.inversion"), loaded("smi_fed.inversion")
for module in loaded("smi_fed"):
    del sys.modules[module]
import smi_fed.inversion
assert not loaded("smi_fed.distillation"), loaded("smi_fed.distillation")

import torch
from smi_fed.distillation import DistillationConfig, distill
from smi_fed.inversion import InversionConfig, invert
from smi_fed.models import ModelSpec, build_model
kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}
teacher, student = (build_model(ModelSpec("vit_tiny_patch16_224", 3, kwargs=kwargs)) for _ in range(2))
found = invert(teacher, torch.tensor([0, 1]), InversionConfig.paper(iterations=2, schedule="1:0.5"))
record = distill(student, [teacher], found, DistillationConfig(steps=2, batch_size=2))
print("steps", record.steps)

import simulations.throughput  # on a machine that has no more
"""


def test_one_vit_and_no_federation():
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "steps 2"
