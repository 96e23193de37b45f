"""No code of ours unpickles or runs what it reads: by its source, and by what the interpreter tells of."""

import ast
import io
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from flwr.app import Array

from smi_fed.files import FileFormatError, load_tensors
from smi_fed.sparse_images import SparseImages
from smi_fed.strategies.payloads import decode
from smi_fed.strategies.records import BadReplyError
from smi_fed.weight_files import read_file
from tests.fuzz.measured import Meter
from tests.fuzz.payloads import Planted, pickled

PROJECT = Path(__file__).parents[1]
PLACES = ("smi_fed", "server", "clients", "simulations", "examples", "deploy", "scripts")

MODULES = frozenset({
    "pickle", "_pickle", "pickletools", "cloudpickle", "dill", "joblib", "jsonpickle", "shelve", "marshal", "code",
    "multiprocessing", "concurrent.futures.ProcessPoolExecutor", "concurrent.futures.process", "xmlrpc",
    "torch.multiprocessing", "torch.package", "torch.distributed.rpc",
})  # fmt: skip
"""Readers that run what they read, and transports that pickle."""

CALLS = frozenset({
    "eval", "exec", "compile", "__import__", "torch.jit.load", "torch.hub.load", "torch.export.load",
    "pandas.read_pickle", "yaml.unsafe_load", "yaml.full_load", "yaml.load",
    "yaml.load_all",
})  # fmt: skip

OWN_PROCESSES = {
    **dict.fromkeys(
        [f"smi_fed/executors/{name}.py" for name in ("processes", "ray_cluster", "worker")],
        "an inversion in a process of its own; an admitted teacher's facts go there, its weights as safetensors",
    ),
    "simulations/runner/loop.py": "a study's piece in a process of its own; settings go there and numbers come back",
}
"""Where our own processes hand each other our own objects, with the reason. Nothing of a client is among them."""


def full_name(node, imported):
    """The dotted name of what is called, as it was imported; empty where it is no name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([imported.get(node.id, node.id), *reversed(parts)])


def within(name, names):
    return any(name == each or name.startswith(f"{each}.") for each in names)


def keyword(call, name):
    return next((each.value for each in call.keywords if each.arg == name), None)


def is_constant(node, value):
    return isinstance(node, ast.Constant) and node.value is value


def dangers(source):
    """What in a source could run what it reads, each as LINE: NAME."""
    tree, imported, found = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
            imported |= {
                key: name if key == name or "." not in name else name.split(".")[0] for key, name in names.items()
            }
            imported |= {alias.asname: alias.name for alias in node.names if alias.asname}
            found += [f"{node.lineno}: {name}" for name in names.values() if within(name, MODULES)]
        elif isinstance(node, ast.ImportFrom):
            names = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            imported |= names
            found += [f"{node.lineno}: {name}" for name in names.values() if within(name, MODULES)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (name := called(node, imported)):
            found.append(f"{node.lineno}: {name}")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and not is_constant(node.value, False):
            found.append(f"{node.value.lineno}: allow_pickle")
    return found


def called(call, imported):
    """The name of a call that could run what it reads; else empty."""
    name = full_name(call.func, imported)
    if name in CALLS or name.endswith((".read_pickle", ".to_pickle")):
        return name
    return name if name == "torch.load" and not is_constant(keyword(call, "weights_only"), True) else ""


def sources():
    return {
        str(path.relative_to(PROJECT)): path.read_text(encoding="utf-8")
        for place in PLACES
        for path in sorted((PROJECT / place).rglob("*.py"))
    }


def test_no_source_unpickles_or_runs_what_it_reads():
    found = {file: dangers(source) for file, source in sources().items()}
    seen = {"smi_fed/weight_files.py", "server/app.py", "clients/app.py", "deploy/credentials.py", "scripts/site.py"}
    assert seen <= found.keys()
    assert {file: lines for file, lines in found.items() if lines and file not in OWN_PROCESSES} == {}
    assert all(found[file] for file in OWN_PROCESSES)  # a reason that nothing needs any more goes


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "import os, pickle as p", "from pickle import loads", "def f():\n    import dill.source",
        "import cloudpickle", "import joblib", "import shelve", "import marshal", "from torch import multiprocessing",
        "from multiprocessing import connection", "from concurrent.futures import ProcessPoolExecutor",
        "import torch\ntorch.load(p)", "import torch\ntorch.load(p, weights_only=False)",
        "import torch\ntorch.load(p, weights_only=w)",
        "import torch as t\nt.load(p)", "from torch import load\nload(p)",
        "from torch import load as read\nread(p)", "import torch\ntorch.jit.load(p)",
        "import torch.jit\ntorch.jit.load(p)",
        "import numpy as np\nnp.load(p, allow_pickle=True)", "np.save(p, x, allow_pickle=anything)",
        "import pandas as pd\npd.read_pickle(p)", "frame.to_pickle(p)", "import yaml\nyaml.load(t)",
        "from yaml import unsafe_load\nunsafe_load(t)", "eval(t)", "exec(t)", "x = [compile(t, '', 'eval')]",
        "__import__(name)",
    ],
)  # fmt: skip
def test_each_way_to_run_what_is_read_is_seen(line):
    assert dangers(line), line


@pytest.mark.parametrize(
    "line",
    [
        "model.eval()", "import torch\ntorch.load(p, weights_only=True)", "import numpy as np\nnp.load(p)",
        "np.load(p, allow_pickle=False)", "import yaml\nyaml.safe_load(t)",
        "'import pickle'", "import re\nre.compile(t)",
        "from safetensors.torch import load\nload(t)",
    ],
)  # fmt: skip
def test_what_only_reads_is_not(line):
    assert dangers(line) == []


READERS = {
    "an array": (
        lambda data, _: decode("x", Array("float32", (8,), "numpy.ndarray", data), torch.zeros(8)),
        BadReplyError,
    ),
    "statistics of the older API": (lambda data, _: safetensors.torch.load(data), Exception),
    "a file of tensors": (lambda _, path: load_tensors(path, "kind", 1), FileFormatError),
    "stored images": (lambda _, path: SparseImages.load(path), FileFormatError),
    "a file of weights": (lambda _, path: read_file(str(path)), ValueError),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("wrapping", range(4), ids=["bare", "npy", "npz", "zip of torch"])
def test_a_pickle_is_never_loaded(tmp_path, reader, wrapping):
    data, (read, refusal) = pickled()[wrapping], READERS[reader]
    path = tmp_path / "x.pth"
    path.write_bytes(data)
    before = Planted.loaded
    with Meter() as seen, pytest.raises(refusal):
        read(data, path)
    assert (Planted.loaded, seen.done) == (before, [])


def test_the_planted_pickle_would_be_seen():
    before = Planted.loaded
    with Meter() as seen:
        pickle.load(io.BytesIO(pickled()[0]))
    assert Planted.loaded == before + 1
    assert seen.done[0].startswith("pickle.find_class")
